r"""ML-GCN: the classifiers of the labels come from a graph over the labels.

Chen, Wei, Wang and Guo, "Multi-Label Image Recognition with Graph Convolutional Networks", CVPR
2019 (arXiv 1904.03582); its equations and settings were read in the authors' code
(megvii-research/ML-GCN: models.py, util.py, demo_voc2007_gcn.py). With label vectors V,

.. math::

    H = \hat A\,\mathrm{LeakyReLU}(\hat A V W_1)\,W_2 ,\qquad
    s_c = \frac{1}{\sqrt D}\,h_c\,\max_m x_m + u_c

where the max is over regions, component by component, h_c is row c of H, and D the size of x. The
graph keeps what is at least as probable as a threshold t, gives all neighbours of a label together
a share p against the label itself, and is then normalised by the sums d of A's rows:

.. math::

    A = I + \frac{p}{1-p}\,\frac{K_{ij}}{\sum_k K_{kj}} ,\quad K_{ij} = [P(j|i) \ge t] ,\qquad
    \hat A_{ij} = d_i^{-1/2}\,A_{ji}\,d_j^{-1/2}

On regions: the max over a feature map's positions becomes the max over regions. With
`projection_size`, :math:`x_m` is :math:`\mathrm{ReLU}(P x_m + q)`: that layer stands for the
convolutions before the max, which are fine-tuned in the original; without it, all that is left is a
max of frozen components. Features are standardised, where a ResNet's are positive: so there is a
bias u_c for each label, which the original lacks, and a division by :math:`\sqrt D`.
`of: regions` applies the same classifiers to each region by itself, and takes the max over the
regions' logits; it is this project's own, and differs from a linear `max-pool` by the graph only.
The attribution is :math:`h_c\,x_m / \sqrt D + u_c` in both forms: the logit of an image that shows
the region m alone. Lost: the fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.inputs import InputStatistics
from pipeline.heads.layers import apply, masked_max, scaled_linear
from pipeline.settings.heads import RECIPE, RegionSettings

_SLOPE = 0.2
"""Of the leaky ReLU, as published."""


class MlGcnSettings(RegionSettings):
    """ML-GCN (CVPR 2019): a graph convolution over the labels makes their classifiers."""

    head: Literal["ml-gcn"] = "ml-gcn"
    hidden_size: int = Field(512, ge=1, description="Size of the label nodes between both layers.")
    of: Literal["image", "regions"] = Field(
        "image",
        description="What is classified: the maximum of the regions' features, as published, or "
        "each region by itself, of which the best one decides.",
    )
    graph: Literal["statistics", "identity"] = Field(
        "statistics",
        description="Edges between labels: those that occur together in the training images, as "
        "published, or none.",
    )
    projection_size: int | None = Field(
        None,
        ge=1,
        description="Size of a layer with ReLU on each region, before the maximum. It stands for "
        "the convolutions that are fine-tuned in the original. null: none.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout after the layer of `projection_size`."
    )
    threshold: float = Field(
        0.4, ge=0, le=1, description="t: an edge needs a conditional probability of at least this."
    )
    share: float = Field(
        0.2, ge=0, lt=1, description="p: weight of all neighbours of a label together."
    )

    @property
    def reads_conditional(self) -> bool:
        return self.graph == "statistics"


_OF_IMAGE = {
    "head": "ml-gcn",
    "projection_size": 512,
    "least_deviation": 1.0,
    "input_dropout": 0.3,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "ml-gcn": {
        **RECIPE,
        "learning_rate": 0.003,
        "epochs": 10,
        "network": {**_OF_IMAGE, "hidden_size": 128, "dropout": 0.5},
    },
    "ml-gcn-identity": {
        **RECIPE,
        "epochs": 10,
        "network": {**_OF_IMAGE, "graph": "identity", "dropout": 0.3},
    },
    "ml-gcn-regions": {
        **RECIPE,
        "learning_rate": 0.003,
        "epochs": 10,
        "network": {
            "head": "ml-gcn",
            "of": "regions",
            "hidden_size": 256,
            "least_deviation": 1.0,
        },
    },
    "ml-gcn-published": {
        **RECIPE,
        "epochs": 20,
        "batch_size": 16,
        "optimizer": "sgd",
        # Published: a rate of 0.1, a decay of 1e-4 and a norm of 10, with a loss that is the mean
        # over VOC's 20 labels. Here it is their sum, with which these make the same steps.
        "learning_rate": 0.005,
        "momentum": 0.9,
        "weight_decay": 0.002,
        "clip_norm": 200.0,
        "schedule": "step",
        "step_epochs": 30,
        "averaging": 0.0,
        "network": {"head": "ml-gcn", "hidden_size": 1024},
    },
}


class MlGcn(Head):
    """Classify an image with classifiers that a graph over the labels makes of their vectors."""

    attribution = "logits"

    def __init__(self, sizes: HeadSizes, settings: MlGcnSettings) -> None:
        super().__init__(sizes, settings)
        self.settings = settings
        self.dropout = nn.Dropout(settings.input_dropout)
        self.projected_dropout = nn.Dropout(settings.dropout)
        self.first = scaled_linear(sizes.vectors, settings.hidden_size, bias=False)
        gain = 2 / (1 + _SLOPE**2)
        size = settings.projection_size or sizes.features
        self.second = scaled_linear(settings.hidden_size, size, gain, bias=False)
        self.projection = (
            None if settings.projection_size is None else scaled_linear(sizes.features, size)
        )
        self.bias = nn.Parameter(torch.zeros(sizes.labels))

    def start(self, statistics: InputStatistics, labels: LabelSet) -> None:
        """Take over the statistics, see `Head.start`; each bias starts with its label's share.

        From 0 on, the logits of all labels would first have to fall, by which the two layers shrink
        to nothing before they have learnt anything.
        """
        super().start(statistics, labels)
        with torch.no_grad():
            self.bias.copy_(labels.ratio.clamp(0.01, 0.99).logit())

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`."""
        features = self.dropout(self.inputs.features(batch.features))
        if self.projection is not None:
            features = self.projected_dropout(apply(self.projection, features).relu())
        classifiers = self._classifiers(labels).T / features.shape[2] ** 0.5
        logits = features @ classifiers + self.bias
        logits = logits.masked_fill(~batch.mask[..., None], -torch.inf)
        if self.settings.of == "regions":
            return HeadOutput(logits.amax(dim=1), logits)
        return HeadOutput(masked_max(features, batch.mask) @ classifiers + self.bias, logits)

    def _classifiers(self, labels: LabelSet) -> Tensor:
        """The classifier of each label: (C, D)."""
        vectors = self.inputs.vectors(labels.vectors)
        if self.settings.graph == "identity":
            return apply(self.second, leaky_relu(apply(self.first, vectors), _SLOPE))
        assert labels.conditional is not None
        graph = label_graph(labels.conditional, self.settings.threshold, self.settings.share)
        hidden = leaky_relu(graph @ apply(self.first, vectors), _SLOPE)
        return graph @ apply(self.second, hidden)


def label_graph(conditional: Tensor, threshold: float, share: float) -> Tensor:
    """The matrix by which labels read each other.

    Args:
        conditional: (C, C), P(j|i) in row i, 0 on the diagonal.
        threshold, share: t and p of the module's docstring.

    Returns:
        (C, C), row i says what label i reads.
    """
    kept = ((conditional >= threshold) & (conditional > 0)).to(conditional.dtype)
    neighbors = kept / kept.sum(dim=0).clamp(min=1)
    weights = torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
    weights = weights + share / (1 - share) * neighbors
    scale = weights.sum(dim=1).rsqrt()
    return scale[:, None] * weights.T * scale
