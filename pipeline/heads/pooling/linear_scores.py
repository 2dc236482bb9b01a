r"""A linear layer on the detector's own opinion: how much of the result needs no features at all.

.. math:: s_c = \sum_k U_{ck} \max_{m:\,k_m = k} d_m + u_c

where :math:`d_m` is the detector's score of region m, :math:`k_m` its class, and the max over no
region is 0. This project's own.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, zero_linear
from pipeline.settings.heads import RECIPE, HeadSettings


class LinearScoresSettings(HeadSettings):
    """A linear layer on the detector's best score of each of its classes."""

    head: Literal["linear-scores"] = "linear-scores"


VARIANTS: dict[str, dict[str, Any]] = {
    "linear-scores": {**RECIPE, "learning_rate": 0.01, "network": {"head": "linear-scores"}}
}


class LinearScores(Head):
    """Score an image by the best detection of each of the detector's classes.

    A class that no training region had, numbered `HeadSizes.classes` or above, is not read.
    """

    def __init__(self, sizes: HeadSizes, settings: LinearScoresSettings) -> None:
        super().__init__(sizes, settings)
        self.classes = sizes.classes
        self.classifier = zero_linear(sizes.classes, sizes.labels)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Neither features nor anything of the labels are read."""
        classes = batch.classes.long()
        known = batch.mask & (classes < self.classes)
        best = batch.scores.new_zeros(classes.shape[0], self.classes)
        best = best.scatter_reduce(
            1, classes.masked_fill(~known, 0), batch.scores.masked_fill(~known, 0), "amax"
        )
        return HeadOutput(apply(self.classifier, best))
