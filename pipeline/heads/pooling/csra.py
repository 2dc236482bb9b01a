r"""CSRA: class-specific residual attention.

Zhu and Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition",
ICCV 2021 (arXiv 2108.02456); its equations were read in the authors' code (Kevinz-code/CSRA).

.. math::

    s^h_{mc} = \frac{w^h_c}{\lVert w^h_c \rVert}\,x_m ,\qquad
    s_c = u_c + \sum_h \Big( \bar s^h_c + \lambda \sum_m
          \frac{e^{T_h s^h_{mc}}}{\sum_n e^{T_h s^h_{nc}}}\,s^h_{mc} \Big)

with H heads of their own classifiers w and temperatures T; a temperature of 99 stands for the max.

On regions: positions of a feature map are regions. The bias u is ours: the features are centred
here, while theirs come from a ReLU, whose mean can stand for a bias. The base :math:`\bar s_c`,
there the mean over all positions, is the score of the whole view, since a mean over regions would
count false regions as much as true ones; with `base: mean` it is that mean. Lost: the grid of
positions and the fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import masked_max, masked_mean, masked_softmax
from pipeline.settings.heads import RECIPE, RegionSettings

_TEMPERATURES: dict[int, tuple[float, ...]] = {
    1: (1,),
    2: (1, 99),
    4: (1, 2, 4, 99),
    6: (1, 2, 3, 4, 5, 99),
    8: (1, 2, 3, 4, 5, 6, 7, 99),
}
"""The temperatures of the authors' code by the number of heads."""
_MAX = 99


class CsraSettings(RegionSettings):
    """CSRA (ICCV 2021): attention over regions, apart for each label."""

    head: Literal["csra"] = "csra"
    heads: Literal[1, 2, 4, 6, 8] = Field(1, description="H: number of attention heads.")
    weight: float = Field(
        1.0, ge=0, description="λ: weight of the attention beside the base. The paper: 0.1 on VOC."
    )
    base: Literal["whole", "mean"] = Field(
        "whole",
        description="What the attention is added to: the score of the whole view, or the "
        "mean over the regions, as published.",
    )

    @property
    def needs_whole(self) -> bool:
        return self.base == "whole" or self.whole_region


VARIANTS: dict[str, dict[str, Any]] = {
    "csra": {**RECIPE, "learning_rate": 0.01, "network": {"head": "csra"}},
    "csra-published": {
        **RECIPE,
        "epochs": 30,
        "batch_size": 16,
        "optimizer": "sgd",
        # Published: a rate of 0.1, a decay of 1e-4 and no clipping, with a loss that is the mean
        # over VOC's 20 labels. Here it is their sum, with which these make the same steps.
        "learning_rate": 0.005,
        "momentum": 0.9,
        "weight_decay": 0.002,
        "clip_norm": 1e6,
        "schedule": "step",
        "step_epochs": 4,
        "warm_up": 0.0667,  # two epochs
        "averaging": 0.0,
        "network": {"head": "csra", "heads": 1, "weight": 0.1, "base": "mean"},
    },
}


class Csra(Head):
    """Score an image by its whole view and, for each label, by the regions that show it best."""

    attribution = "logits"

    def __init__(self, sizes: HeadSizes, settings: CsraSettings) -> None:
        super().__init__(sizes, settings)
        self.weight = settings.weight
        self.base = settings.base
        self.temperatures = _TEMPERATURES[settings.heads]
        self.dropout = nn.Dropout(settings.input_dropout)
        self.bias = nn.Parameter(torch.zeros(sizes.labels))
        self.classifiers = nn.Parameter(
            torch.randn(settings.heads, sizes.labels, sizes.features) / sizes.features**0.5
        )

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`.

        The attribution is the logit of an image that shows the region alone, in the base, too.
        """
        regions = self.dropout(self.inputs.features(batch.features))
        whole = None
        if self.base == "whole":
            whole = self.dropout(self.inputs.whole(batch.of_whole()))
        directions = nn.functional.normalize(self.classifiers, dim=2)
        total = torch.zeros_like(self.bias)
        of_regions = torch.zeros_like(self.bias)
        for temperature, weights in zip(self.temperatures, directions, strict=True):
            scores = regions @ weights.T
            base = masked_mean(scores, batch.mask) if whole is None else whole @ weights.T
            total = total + base + self.weight * _attended(scores, batch.mask, temperature)
            of_regions = of_regions + (1 + self.weight) * scores
        of_regions = (of_regions + self.bias).masked_fill(~batch.mask[..., None], -torch.inf)
        return HeadOutput(total + self.bias, of_regions)


def _attended(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The mean of the scores (B, M, C), weighted by their softmax over the regions: (B, C)."""
    if temperature == _MAX:
        return masked_max(scores, mask)
    return (masked_softmax(temperature * scores, mask) * scores).sum(dim=1)
