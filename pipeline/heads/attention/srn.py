r"""SRN: attention maps of the labels, and a network that sees where the labels lie.

Zhu et al., "Learning Spatial Regularization with Image-level Supervisions for Multi-label Image
Classification", CVPR 2017 (arXiv 1702.05891). The authors published weights and test code only
(zhufengx/SRN_multilabel); layers and equations were read in a port to PyTorch that quotes the paper
(terminalh2t3/SRN_torch). The optimiser of `srn-published` is from memory.

.. math::

    A_{mc} = \mathrm{softmax}_m\, a_c(x_m) ,\qquad
    U_{mc} = \sigma(S_c\,x_m)\,A_{mc} ,\qquad
    s = \tfrac12 \big( s^{cls} + f_{sr}(U) \big)

with a an MLP of three layers, and :math:`s^{cls}` a linear layer on the vector g of the whole view.
:math:`f_{sr}` reads U as a raster of R x R cells with C channels: a 1x1 convolution to E channels,
another one, an RxR convolution with 4 kernels for each channel (E groups), each normalised and
followed by a ReLU, and a linear layer.

On regions: positions of a feature map are regions, which are painted into the raster: a cell holds
the sum over the regions of :math:`U_{mc}` times the share of the cell that the region's box covers.
(A sum, since the softmax over regions divides the attention among boxes that lie upon each other.)
The layer of 3x3 in the attention becomes one of 1x1, since regions have no grid. Batch norms become
group norms, since a batch may hold a single image; the first convolution therefore has a bias, so
that the scale of U is not lost. Lost: the fine-tuning, and the stages, in which the original trains
the classifier, then the attention by a loss on :math:`\sum_m A_{mc} S_c\,x_m`, then
:math:`f_{sr}`, and then everything; here everything is trained at once. Published sizes: E = 512,
R = 14.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, masked_softmax, scaled_linear
from pipeline.settings.heads import RECIPE, RegionSettings

_KERNELS = 4
_NORM_GROUPS = 4


class SrnSettings(RegionSettings):
    """SRN (CVPR 2017): attention to regions, painted into a raster, which convolutions read."""

    head: Literal["srn"] = "srn"
    hidden_size: int = Field(
        128,
        ge=2 * _NORM_GROUPS,  # a norm over a single number is always 0
        multiple_of=_NORM_GROUPS,
        description="E: size of the hidden layers of the attention, and number of channels of the "
        "convolutions. The paper: 512.",
    )
    raster: int = Field(
        7, ge=1, description="R: the view is divided into R x R cells. The paper: 14."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout before the layer that reads the convolutions."
    )

    @property
    def needs_whole(self) -> bool:
        return True


VARIANTS: dict[str, dict[str, Any]] = {
    "srn": {
        **RECIPE,
        "network": {
            "head": "srn",
            "whole_region": True,
            "least_deviation": 1.0,
            "input_dropout": 0.3,
            "dropout": 0.5,
        },
    },
    "srn-published": {
        **RECIPE,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "averaging": 0.0,
        "network": {"head": "srn", "hidden_size": 512, "raster": 14},
    },
}


class Srn(Head):
    """Score an image by its whole view, and by where its labels lie.

    The attribution is U: the attention to a region, times the sigmoid of its logit.
    """

    attribution = "weights"

    def __init__(self, sizes: HeadSizes, settings: SrnSettings) -> None:
        super().__init__(sizes, settings)
        size, raster, labels = settings.hidden_size, settings.raster, sizes.labels
        self.raster = raster
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.classifier = scaled_linear(sizes.features, labels)
        self.attention = nn.Sequential(
            scaled_linear(sizes.features, size),
            nn.ReLU(),
            scaled_linear(size, size, gain=2.0),
            nn.ReLU(),
            # Without a bias, which would add the same to all regions.
            scaled_linear(size, labels, gain=2.0, bias=False),
        )
        self.confidence = scaled_linear(sizes.features, labels)
        self.relations = nn.Sequential(
            nn.Conv2d(labels, size, 1),
            nn.GroupNorm(_NORM_GROUPS, size),
            nn.ReLU(),
            nn.Conv2d(size, size, 1, bias=False),
            nn.GroupNorm(_NORM_GROUPS, size),
            nn.ReLU(),
            nn.Conv2d(size, _KERNELS * size, raster, groups=size, bias=False),
            nn.GroupNorm(_NORM_GROUPS, _KERNELS * size),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(settings.dropout),
            scaled_linear(_KERNELS * size, labels, gain=2.0),
        )

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read."""
        regions = apply(self.input_dropout, self.inputs.features(batch.features))
        whole = apply(self.input_dropout, self.inputs.whole(batch.of_whole()))
        attention = masked_softmax(apply(self.attention, regions), batch.mask)
        weighted = attention * apply(self.confidence, regions).sigmoid()
        covered = coverage(batch.boxes, self.raster).to(weighted.dtype)
        painted = weighted.transpose(1, 2) @ covered.flatten(2)
        spatial = apply(self.relations, painted.unflatten(2, (self.raster, self.raster)))
        return HeadOutput((apply(self.classifier, whole) + spatial) / 2, weighted)


def coverage(boxes: Tensor, raster: int) -> Tensor:
    """The share of each cell that a box covers.

    Args:
        boxes: (B, M, 4), xyxy in [0,1] of the view.
        raster: R; the view is divided into R x R cells.

    Returns:
        (B, M, R, R) in [0, 1], rows first.
    """
    edges = torch.arange(raster + 1, dtype=boxes.dtype, device=boxes.device) / raster
    low, high = boxes[..., :2, None], boxes[..., 2:, None]
    shared = torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])
    shares = shared.clamp(min=0) * raster  # (B, M, 2, R): columns, then rows
    return shares[:, :, 1, :, None] * shares[:, :, 0, None, :]
