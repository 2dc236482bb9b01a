r"""SSGRL: each label attends to regions, then labels that occur together exchange what they saw.

Chen, Xu, Hui, Wu and Lin, "Learning Semantic-Specific Graph Representation for Multi-Label Image
Recognition", ICCV 2019 (arXiv 1908.07325); its equations and settings were read in the authors'
code (HCPLab-SYSU/SSGRL: semantic.py, ggnn.py, models.py, main_voc07.sh; the first version of
ggnn.py computes r with U_z, by mistake). A label's vector w_c decides which regions it reads:

.. math::

    a_{mc} = q\,\tanh\big((U_1 x_m) \odot (U_2 w_c)\big) ,\quad
    f_c = \sum_m \frac{e^{a_{mc}}}{\sum_n e^{a_{nc}}}\,x_m

A gated graph network passes three times over all labels, from :math:`h_c = f_c` on, with the
matrix P of the probabilities P(j|i), which has no threshold:

.. math::

    v = [P h ;\, P^\top h] ,\quad z = \sigma(W_z v + U_z h) ,\quad r = \sigma(W_r v + U_r h) ,\quad
    \tilde h = \tanh(W_h v + U_h (r \odot h)) ,\quad h \leftarrow (1-z) \odot h + z \odot \tilde h

.. math:: s_c = V_c \tanh(O [h_c ; f_c]) + v_c

The authors' code has q as two linear layers without anything between them; they are one here, and
their biases, which the softmax cancels, are left out.

On regions: positions of a feature map are regions. Regions are first projected from D to
`hidden_size`, because the published sizes (2,048 everywhere) suit neither the features nor some
thousand images. The labels' statistics are those of the images that are trained on. Lost: the
resolution of 18x18 positions, and the fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.label_graphs.classifiers import LabelClassifiers
from pipeline.heads.layers import apply, masked_softmax, scaled_linear
from pipeline.settings.heads import RECIPE, RegionSettings


class SsgrlSettings(RegionSettings):
    """SSGRL (ICCV 2019): attention of each label, and a gated graph network over the labels."""

    head: Literal["ssgrl"] = "ssgrl"
    hidden_size: int = Field(128, ge=1, description="Size of regions, label nodes and attention.")
    steps: int = Field(
        3, ge=0, description="Passes over the graph of the labels. 0: without a graph."
    )

    @property
    def reads_conditional(self) -> bool:
        return self.steps > 0


VARIANTS: dict[str, dict[str, Any]] = {
    "ssgrl": {**RECIPE, "network": {"head": "ssgrl", "input_dropout": 0.5}},
    "ssgrl-without-graph": {
        **RECIPE,
        "learning_rate": 0.003,
        "epochs": 10,
        "network": {
            "head": "ssgrl",
            "steps": 0,
            "hidden_size": 256,
            "least_deviation": 1.0,
            "input_dropout": 0.3,
        },
    },
    "ssgrl-published": {
        **RECIPE,
        "epochs": 200,
        "batch_size": 4,
        "optimizer": "adamw",  # Adam, as its weight decay is 0
        "learning_rate": 1e-5,
        "weight_decay": 0.0,
        "schedule": "constant",
        "averaging": 0.0,
        "network": {"head": "ssgrl", "hidden_size": 1024},
    },
}


class Ssgrl(Head):
    """Score labels by what they attended to, and by what their neighbours in the graph did."""

    attribution = "weights"

    def __init__(self, sizes: HeadSizes, settings: SsgrlSettings) -> None:
        super().__init__(sizes, settings)
        size = settings.hidden_size
        self.dropout = nn.Dropout(settings.input_dropout)
        self.projection = scaled_linear(sizes.features, size)
        self.of_regions = scaled_linear(size, size, bias=False)
        self.of_vectors = scaled_linear(sizes.vectors, size, bias=False)
        self.query = scaled_linear(size, 1, bias=False)
        self.propagation = GatedGraph(size, settings.steps) if settings.steps else None
        self.output = scaled_linear(2 * size if settings.steps else size, size)
        self.classifiers = LabelClassifiers(sizes.labels, size)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. The attribution is the attention."""
        features = self.dropout(self.inputs.features(batch.features))
        regions = apply(self.projection, features)
        vectors = self.inputs.vectors(labels.vectors)
        attention = masked_softmax(self._attention_logits(regions, vectors), batch.mask)
        read = attention.transpose(1, 2) @ regions
        nodes = read
        if self.propagation is not None:
            assert labels.conditional is not None
            after = self.propagation(read, labels.conditional)
            nodes = torch.cat([after, read], dim=2)
        logits = apply(self.classifiers, apply(self.output, nodes).tanh())
        return HeadOutput(logits, attention)

    def _attention_logits(self, regions: Tensor, vectors: Tensor) -> Tensor:
        """a_mc: (B, M, H), (C, W) -> (B, M, C)."""
        by_region = apply(self.of_regions, regions)[:, :, None]
        joint = (by_region * apply(self.of_vectors, vectors)).tanh()
        return apply(self.query, joint)[..., 0]


class GatedGraph(nn.Module):
    """Pass over a graph of labels with a gated recurrent unit.

    Args:
        size: H, of the nodes.
        steps: number of passes, which share their parameters.
    """

    def __init__(self, size: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        # Of z, r and the candidate, in this order. The gates' two biases are one.
        self.messages = scaled_linear(2 * size, 3 * size)
        self.gates = scaled_linear(size, 2 * size, bias=False)
        self.candidate = scaled_linear(size, size, bias=False)

    def forward(self, nodes: Tensor, conditional: Tensor) -> Tensor:
        """(B, C, H), (C, C) -> (B, C, H)."""
        size = nodes.shape[2]
        for _ in range(self.steps):
            read = torch.cat([conditional @ nodes, conditional.T @ nodes], dim=2)
            of_gates, of_candidate = apply(self.messages, read).split([2 * size, size], dim=2)
            update, reset = (of_gates + apply(self.gates, nodes)).sigmoid().chunk(2, dim=2)
            candidate = (of_candidate + apply(self.candidate, reset * nodes)).tanh()
            nodes = torch.lerp(nodes, candidate, update)
        return nodes
