r"""Query2Label: one query for each label, which attends to the regions in a transformer decoder.

Liu et al., "Query2Label: A Simple Transformer Way to Multi-Label Classification", 2021
(arXiv 2107.10834); everything was read in the authors' code (SlongLiu/query2labels: query2label.py,
transformer.py, position_encoding.py, main_mlc.py).

.. math::

    z_m = W x_m ,\qquad z \leftarrow \mathrm{FF}(\mathrm{LN}(z +
          \mathrm{attend}(z + p,\; z + p,\; z)))

    t_c = 0 ,\qquad t \leftarrow \mathrm{FF}(\mathrm{LN}(t +
          \mathrm{attend}(t + q,\; z + p,\; z))) ,\qquad
    s_c = w_c \cdot \mathrm{LN}(t_c) + u_c

The first line is a layer of the encoder, the second one of the decoder; LN is a layer norm, and
FF(x) = LN(x + V ReLU(U x)). :math:`x_m` is the feature of region m, :math:`p_m` its position,
:math:`q_c` the learned query of label c, and attend(queries, keys, values) multi-head attention.
The decoder has no self-attention, as in the code's default.

On regions: positions of a feature map are regions, padding is masked, and :math:`p_m` is made of
the region's box. Lost: the fine-tuning and augmentation. Sizes are far smaller by default
(published: 2048 with 8192, 4 heads, 1 + 2 layers, 80 epochs). `queries: vectors` is not in the
paper: :math:`q_c`, :math:`w_c` and :math:`u_c` are then linear in the label's vector, and the head
keeps nothing else of a label.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.attention.layers import AttentionLayer, AttentionSettings, BoxPositions
from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, scaled_linear
from pipeline.settings.heads import RECIPE


class Query2LabelSettings(AttentionSettings):
    """Query2Label (2021): a transformer whose decoder has a query for each label."""

    head: Literal["query2label"] = "query2label"
    encoder_layers: int = Field(
        1, ge=0, description="Layers in which regions attend to each other. The paper: 1."
    )
    decoder_layers: int = Field(
        1, ge=1, description="Layers in which labels attend to regions. The paper: 2."
    )
    queries: Literal["learned", "vectors"] = Field(
        "learned",
        description="Where queries and classifiers come from: `learned` for each label, as "
        "published, or linear in the label `vectors`.",
    )

    @property
    def scores_new_labels(self) -> bool:
        return self.queries == "vectors"


VARIANTS: dict[str, dict[str, Any]] = {
    "query2label": {
        **RECIPE,
        "learning_rate": 0.0005,
        "network": {
            "head": "query2label",
            "encoder_layers": 0,
            "least_deviation": 1.0,
            "input_dropout": 0.3,
            "dropout": 0.3,
        },
    },
    "query2label-published": {
        **RECIPE,
        "epochs": 80,
        "batch_size": 64,
        "schedule": "one-cycle",
        "warm_up": 0.2,
        "learning_rate": 0.0001,
        "averaging": 0.9997,
        "loss": {"name": "asymmetric", "negative_gamma": 2.0, "positive_gamma": 0.0, "clip": 0.0},
        "network": {
            "head": "query2label",
            "hidden_size": 2048,
            "feedforward_size": 8192,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "boxes": "sine",
        },
    },
}


class Query2Label(Head):
    """Score a label by what its query finds among the regions.

    The attribution is the attention of the decoder's last layer, the mean over its heads. Since an
    encoder spreads what a region shows over the others, the region that wins need not show the
    label; with `encoder_layers: 0` and one attention head it does.
    """

    attribution = "weights"

    def __init__(self, sizes: HeadSizes, settings: Query2LabelSettings) -> None:
        super().__init__(sizes, settings)
        size = settings.hidden_size
        self.dropout = nn.Dropout(settings.input_dropout)
        self.project = scaled_linear(sizes.features, size)
        self.positions = BoxPositions(size, settings.boxes)
        self.encoder = nn.ModuleList(
            AttentionLayer(settings) for _ in range(settings.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            AttentionLayer(settings) for _ in range(settings.decoder_layers)
        )
        self.norm = nn.LayerNorm(size)
        self.of_labels: nn.Module = (
            _Learned(sizes.labels, size)
            if settings.queries == "learned"
            else _OfVectors(sizes.vectors, size)
        )

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`."""
        regions = apply(self.project, apply(self.dropout, self.inputs.features(batch.features)))
        positions = self.positions(batch.boxes, self.inputs)
        for layer in self.encoder:
            placed = regions + positions
            regions, _ = layer(regions, placed, placed, regions, batch.mask)
        queries, weights, bias = self.of_labels(self.inputs.vectors(labels.vectors))
        states, attention = torch.zeros_like(queries)[None], regions
        for layer in self.decoder:
            states, attention = layer(
                states, states + queries, regions + positions, regions, batch.mask
            )
        logits = (apply(self.norm, states) * weights).sum(dim=2) + bias
        return HeadOutput(logits, attention.transpose(1, 2))


class _Learned(nn.Module):
    """A query and a classifier for each label, all of them parameters."""

    def __init__(self, labels: int, size: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(labels, size))
        self.weights = nn.Parameter(torch.randn(labels, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (C, E), weights (C, E) and biases (C,) of the classifiers."""
        return self.queries, self.weights, self.bias


class _OfVectors(nn.Module):
    """A query and a classifier for each label, linear in its vector."""

    def __init__(self, vector_size: int, size: int) -> None:
        super().__init__()
        self.queries = scaled_linear(vector_size, size)
        self.weights = scaled_linear(vector_size, size, gain=1 / size)
        self.bias = scaled_linear(vector_size, 1, gain=0.01)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_Learned`, of the vectors (C, W)."""
        bias = apply(self.bias, vectors).squeeze(1)
        return apply(self.queries, vectors), apply(self.weights, vectors), bias
