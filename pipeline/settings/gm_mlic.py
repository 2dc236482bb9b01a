"""The settings of GM-MLIC, the paper's network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.settings.heads import RegionSettings


class GmMlicSettings(RegionSettings):
    """GM-MLIC, the paper's network (section 3.3)."""

    head: Literal["gm-mlic"] = "gm-mlic"
    instance_graph: bool = Field(True, description="Use edges between instances, equation (1).")
    label_graph: bool = Field(True, description="Use edges between labels, equation (2).")
    matching_edges: bool | Literal["stateless"] = Field(
        True,
        description="Use edges between instances and labels, equation (3). `stateless`: the edges "
        "have no state, and the messages between instances and labels read only the nodes. false: "
        "there are no such messages. Without states of edges, the decoder reads the two nodes.",
    )
    latent_size: int = Field(
        512,
        ge=2,
        multiple_of=2,
        description="H: size of the encoded nodes and edges. The last convolution module halves "
        "it, as in the paper's [512, 256].",
    )
    modules: int = Field(2, ge=1, description="k: number of graph convolution modules.")
    neighbors: int = Field(
        5, ge=1, description="K: number of nearest instances that an instance gathers from."
    )
    label_neighbors: int | None = Field(
        None,
        ge=1,
        description="Number of labels that a label gathers from, nearest by cosine. null: all "
        "others.",
    )
    node_norm: bool = Field(
        True,
        description="Apply LayerNorm to encoded and updated nodes. (Ours; the paper has none.)",
    )
    residual: bool = Field(
        False,
        description="Add each node's state to its update. (Ours; the paper has none.)",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on encoded and updated nodes of instances. With `residual`, on their "
        "updates alone, before they are added.",
    )
    decoder_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the decoder's hidden state."
    )

    @property
    def scores_new_labels(self) -> bool:
        return True

    @property
    def matching_states(self) -> bool:
        """Whether the matching edges have states, as in the paper."""
        return self.matching_edges is True


def _variant(**changes: bool | str) -> dict[str, Any]:
    return {"network": {"head": "gm-mlic", **changes}}


VARIANTS: dict[str, dict[str, Any]] = {
    "full": _variant(),
    "without-label-graph": _variant(label_graph=False),
    "without-instance-graph": _variant(instance_graph=False),
    "without-matching-edges": _variant(matching_edges=False),
    "stateless-matching-edges": _variant(matching_edges="stateless"),
}
"""`full` is the paper's network, the others are its ablations (Table 4). `stateless-matching-edges`
is a milder reading of `without-matching-edges`. They train with the settings of the data set's
block."""
