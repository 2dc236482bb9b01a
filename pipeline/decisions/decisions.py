"""How the scores of a trained network become probabilities and decisions.

Letters: C labels. The last axis of an array of logits is C; any others may come before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Decisions:
    """What was fitted on the validation part of a training (`pipeline.decisions.fitting`).

    The logit x of a label is calibrated to scale * x + shift, whose sigmoid is the probability. The
    label is predicted where the calibrated logit is greater than the label's threshold.

    Attributes:
        scale: (C,) float64, above 0, so that the images of a label keep their order.
        shift: (C,) float64.
        thresholds: (C,) float64, as calibrated logits.
        own_calibration: (C,) bool, whether scale and shift were fitted on the label alone.
        own_threshold: (C,) bool, whether the threshold was.
        positives, negatives: (C,) int64, the images that they were fitted on; ignored ones are
            neither.
    """

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    own_calibration: NDArray[np.bool_]
    own_threshold: NDArray[np.bool_]
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]

    def calibrated(self, logits: Floats) -> NDArray[np.float64]:
        """The calibrated logits, in the shape of the logits."""
        return self.scale * logits.astype(np.float64) + self.shift

    def predicted(self, logits: Floats) -> NDArray[np.bool_]:
        """Whether each label is predicted, in the shape of the logits."""
        chosen: NDArray[np.bool_] = self.calibrated(logits) > self.thresholds
        return chosen

    def with_more(self, labels: int) -> Decisions:
        """Append labels on which nothing was fitted: not calibrated, with a threshold of 0.5."""
        blank = {"scale": 1.0}
        return Decisions(
            **{
                name: np.concatenate([own, np.full(labels, blank.get(name, 0), own.dtype)])
                for name, own in vars(self).items()
            }
        )

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(C,), the thresholds as probabilities."""
        shares: NDArray[np.float64] = expit(self.thresholds)
        return shares
