r"""CMA: labels are embedded by how they occur together, then attend to regions that resemble them.

You, Guo, Cui, Long, Bao and Wen, "Cross-Modality Attention with Semantic Graph Embedding for
Multi-Label Classification", AAAI 2020 (arXiv 1912.07872). No public code was found. The abstract,
the caption of figure 1, and Query2Label's remark that negative cosines are cut off were read; the
equations are from memory. An MLP embeds the label vectors, before anything else is trained (ASGE):

.. math::

    e = \mathrm{MLP}(w) ,\qquad
    L = \sum_{ij} \sigma_{ij} \big(\cos(e_i, e_j) - A_{ij}\big)^2

with :math:`\sigma_{ij} = 0` where neither :math:`A_{ij}` nor the cosine exceeds a small α, and 1
elsewhere. A cosine is symmetric, so :math:`A = \tfrac12(P + P^\top)`, with 1 on the diagonal. (The
re-weighted matrix of ML-GCN, which this has been described with, can't replace it: its edges are
at most 0.25, and less where a label has several.) The value of α is this project's.

Regions are projected to the embeddings' space (CMT), and each label reads them by their cosines:

.. math::

    v_m = \mathrm{MLP}(x_m) ,\quad z_{mc} = \max(\cos(v_m, e_c), 0) ,\quad
    h_c = \frac{\sum_m z_{mc} v_m}{\sum_m z_{mc}} ,\quad s_c = W_c h_c + b_c

The published loss is equation (15) of GM-MLIC's paper (`loss: {name: weighted, beta: 0.4}`).

On regions: positions of a feature map are regions, and the 1x1 convolutions layers on each. A label
that resembles no region reads all of them equally. Lost: attention at several scales, since the
cache doesn't say which level of the pyramid a box came from, and the fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.inputs import InputStatistics
from pipeline.heads.label_graphs.classifiers import LabelClassifiers
from pipeline.heads.layers import apply, scaled_linear
from pipeline.settings.heads import RECIPE, RegionSettings

_STEPS, _RATE = 100, 0.003
"""Of Adam, when the labels are embedded."""


class CmaSettings(RegionSettings):
    """CMA (AAAI 2020): attention by the cosine between regions and embeddings of the labels."""

    head: Literal["cma"] = "cma"
    hidden_size: int = Field(512, ge=1, description="Size of the hidden layers of both MLPs.")
    embedding_size: int = Field(256, ge=1, description="Size of embedded labels and regions.")
    least_similarity: float = Field(
        0.1,
        ge=0,
        le=1,
        description="α: two labels that occur together, and resemble each other, less than this "
        "are left alone when the labels are embedded.",
    )

    @property
    def reads_conditional(self) -> bool:
        return True


VARIANTS: dict[str, dict[str, Any]] = {
    "cma": {**RECIPE, "network": {"head": "cma", "input_dropout": 0.5}},
    "cma-published": {
        **RECIPE,
        "averaging": 0.0,
        "loss": {"name": "weighted", "beta": 0.4},
        "network": {"head": "cma"},
    },
}


class Cma(Head):
    """Score labels by the regions that resemble their embeddings."""

    attribution = "weights"
    embeddings: Tensor

    def __init__(self, sizes: HeadSizes, settings: CmaSettings) -> None:
        super().__init__(sizes, settings)
        self.settings = settings
        size = settings.embedding_size
        self.dropout = nn.Dropout(settings.input_dropout)
        self.first = scaled_linear(sizes.features, settings.hidden_size)
        self.second = scaled_linear(settings.hidden_size, size, gain=2.0)
        self.classifiers = LabelClassifiers(sizes.labels, size)
        self.register_buffer("embeddings", torch.zeros(sizes.labels, size))

    def start(self, statistics: InputStatistics, labels: LabelSet) -> None:
        """Take over the statistics, see `Head.start`, and embed the labels."""
        super().start(statistics, labels)
        assert labels.conditional is not None
        one = self.settings
        self.embeddings.copy_(
            embed_labels(
                self.inputs.vectors(labels.vectors),
                labels.conditional,
                hidden_size=one.hidden_size,
                size=one.embedding_size,
                least_similarity=one.least_similarity,
            )
        )

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. The attribution is the attention.

        Of the labels, only what `start` made of them is read.
        """
        features = self.dropout(self.inputs.features(batch.features))
        regions = apply(self.second, apply(self.first, features).relu())
        attention = self._attention(regions, batch.mask)
        nodes = attention.transpose(1, 2) @ regions
        return HeadOutput(apply(self.classifiers, nodes), attention)

    def _attention(self, regions: Tensor, mask: Tensor) -> Tensor:
        """Weights of the regions for each label, of sum 1: (B, M, E), (B, M) -> (B, M, C)."""
        cosines = normalize(regions, dim=2) @ normalize(self.embeddings, dim=1).T
        similar = cosines.relu().masked_fill(~mask[..., None], 0)
        total = similar.sum(dim=1, keepdim=True)
        equal = (mask.to(similar.dtype) / mask.sum(dim=1, keepdim=True))[..., None]
        some = total > 0
        return torch.where(some, similar / total.where(some, 1), equal)


def embed_labels(
    vectors: Tensor,
    conditional: Tensor,
    *,
    hidden_size: int,
    size: int,
    least_similarity: float,
) -> Tensor:
    """Embed labels so that their cosines are how often they occur together (ASGE).

    The MLP starts from random weights of torch's generator.

    Args:
        vectors: (C, W), scaled.
        conditional: (C, C), P(j|i) in row i.
        hidden_size: of the MLP.
        size: E, of the embeddings.
        least_similarity: α of the module's docstring.

    Returns:
        (C, E) float.
    """
    layers = nn.Sequential(
        scaled_linear(vectors.shape[1], hidden_size),
        nn.ReLU(),
        scaled_linear(hidden_size, size, gain=2.0),
    )
    target = ((conditional + conditional.T) / 2).fill_diagonal_(1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=_RATE)
    with torch.enable_grad():
        for _ in range(_STEPS):
            cosines = similarities(apply(layers, vectors))
            ignored = (target <= least_similarity) & (cosines <= least_similarity)
            loss = (cosines - target).square().masked_fill(ignored, 0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return apply(layers, vectors).detach()


def similarities(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs: (C, E) -> (C, C)."""
    directions = normalize(embeddings, dim=1)
    return directions @ directions.T
