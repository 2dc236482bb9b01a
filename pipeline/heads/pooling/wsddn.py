r"""WSDDN: one branch says what a region shows, another which region shows a label best.

Bilen and Vedaldi, "Weakly Supervised Deep Detection Networks", CVPR 2016 (arXiv 1511.02853). It is
the teacher of MLIC-KD-WSD: Liu et al., "Multi-Label Image Classification via Knowledge Distillation
from Weakly-Supervised Detection", ACM Multimedia 2018. Everything was read in the authors' code
(hbilen/WSDDN: wsddn_init.m, wsddn_train.m; Yochengliu/MLIC-KD-WSD: wsddn_train.prototxt).

.. math::

    a_{mc} = \frac{e^{U_c h_m}}{\sum_k e^{U_k h_m}}\;
             \frac{e^{V_c h_m}}{\sum_n e^{V_c h_n}} ,\qquad
    \varphi_c = \sum_m a_{mc} ,\qquad
    s_c = \log \frac{\varphi_c}{1 - \varphi_c + \epsilon}

with :math:`h_m = \mathrm{ReLU}(W x_m)` in place of the two fully connected layers before the
branches, or :math:`h_m = x_m` if `hidden_size` is 0. The image's score :math:`\varphi_c` is its
probability, of which the sigmoid needs the logit. Clamping :math:`\varphi` would cut off the
gradients of labels that are wrong beyond doubt; :math:`\epsilon = 10^{-6}` in the denominator does
not, and changes no probability by more than that.

On regions: as published, but for the spatial regulariser, the weighting of regions by proposal
scores and the temperature of 2 of the first code, which MLIC-KD-WSD leaves out, too. Lost:
fine-tuning the layers before the branches. The student of MLIC-KD-WSD is no head, since it learns
from the pixels. Labels compete for each region, so that with a single label every image has
probability 1: choose another head for that.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, scaled_linear
from pipeline.settings.heads import RECIPE, RegionSettings

_EPSILON = 1e-6


class WsddnSettings(RegionSettings):
    """WSDDN (CVPR 2016): the sum over regions of a softmax over labels times one over regions."""

    head: Literal["wsddn"] = "wsddn"
    hidden_size: int = Field(
        256, ge=0, description="Size of the layer before the two branches. 0: no such layer."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the hidden layer.")


VARIANTS: dict[str, dict[str, Any]] = {
    "wsddn": {
        **RECIPE,
        "learning_rate": 0.003,
        "epochs": 10,
        "network": {"head": "wsddn", "least_deviation": 1.0, "input_dropout": 0.3},
    },
    "wsddn-published": {
        **RECIPE,
        "optimizer": "sgd",
        "learning_rate": 0.01,  # published: 1e-5, for fine-tuning with one image a step
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "step",
        "step_epochs": 10,
        "averaging": 0.0,
        "network": {"head": "wsddn", "hidden_size": 0},
    },
}


class Wsddn(Head):
    """Score an image by the sum of its regions' shares of each label.

    The attribution is each region's share, the product of both softmaxes.
    """

    attribution = "weights"

    def __init__(self, sizes: HeadSizes, settings: WsddnSettings) -> None:
        super().__init__(sizes, settings)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.hidden = (
            scaled_linear(sizes.features, settings.hidden_size) if settings.hidden_size else None
        )
        self.dropout = nn.Dropout(settings.dropout)
        size, gain = settings.hidden_size or sizes.features, 2.0 if settings.hidden_size else 1.0
        self.classification = scaled_linear(size, sizes.labels, gain=gain)
        # Without a bias, which would add the same to all regions.
        self.detection = scaled_linear(size, sizes.labels, gain=gain, bias=False)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read."""
        regions = apply(self.input_dropout, self.inputs.features(batch.features))
        if self.hidden is not None:
            regions = apply(self.dropout, apply(self.hidden, regions).relu())
        padding = ~batch.mask[..., None]
        of_labels = apply(self.classification, regions).log_softmax(dim=2)
        of_regions = apply(self.detection, regions).masked_fill(padding, -torch.inf)
        shares = of_labels + of_regions.log_softmax(dim=1)  # logarithms, (B, M, C)
        total = shares.logsumexp(dim=1)
        # Rounding may lift the sum of the shares above 1.
        rest = (1 - total.exp()).clamp(min=0) + _EPSILON
        return HeadOutput(total - rest.log(), shares.exp())
