r"""Which labels of images are doubtful, given scores by networks that were not trained on them.

Confident learning: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in
Dataset Labels", JAIR 70 (2021), with each label as a question of its own, present or absent. What
is usual for an answer is the mean probability of that answer where it is given, equation (2) there:

.. math::

    t^1_c = \mathrm{mean}_{n: y_{nc} = 1} \; p_{nc} ,\qquad
    t^0_c = \mathrm{mean}_{n: y_{nc} = 0} \; (1 - p_{nc}) .

A label of an image is doubtful if the networks are at least as sure of the other answer as is usual
for it, and either less sure of the given one than is usual, or more sure of the other than of it.
Doubtful labels are ranked by self-confidence, the probability of the given answer, lowest first.

Each label has thresholds of its own, since networks are less sure of rare and of hard labels: with
0.5 for all, most positives of such a label would be listed. They don't take part in the ranking,
which they made worse (docs/guides/doubtful-labels.md).

Letters: N images, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Entries = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""The image and the label of each entry."""

FEWEST = 10
"""A label that fewer training images have, or that fewer lack, is not judged: with five folds, its
networks have learned it from some eight images or fewer."""


def judged(truth: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Which labels enough of N training images have and lack: (N, C) in {1, 0, -1} -> (C,)."""
    counts = [(truth == value).sum(axis=0) for value in (1, 0)]
    enough: npt.NDArray[np.bool_] = np.minimum(*counts) >= FEWEST
    return enough


@dataclass(frozen=True)
class Thresholds:
    """What is usual for an answer, over the images of the training split.

    Attributes:
        present: (C,) t^1; nan for a label that is not judged.
        absent: (C,) t^0; nan for a label that is not judged.
    """

    present: Floats
    absent: Floats

    @classmethod
    def of(cls, probabilities: Floats, truth: npt.NDArray[np.int8]) -> Thresholds:
        """Compute the thresholds.

        Args:
            probabilities: (N, C) of presence, by networks that were not trained on the image.
            truth: (N, C) in {1, 0, -1}; -1 is neither.
        """
        known = judged(truth)
        present, absent = (
            np.where(known, (answer * given).sum(axis=0) / np.maximum(given.sum(axis=0), 1), np.nan)
            for answer, given in ((probabilities, truth == 1), (1 - probabilities, truth == 0))
        )
        return cls(present, absent)


def self_confidence(probabilities: Floats, truth: npt.NDArray[np.int8]) -> Floats:
    """The probability of the answer that is given: (N, C); nan where it is ignored.

    Args:
        probabilities, truth: as `Thresholds.of` takes them.
    """
    given: Floats = np.where(truth == 1, probabilities, 1 - probabilities)
    return np.where(truth < 0, np.nan, given)


def find_doubtful(
    probabilities: Floats, truth: npt.NDArray[np.int8], thresholds: Thresholds
) -> Entries:
    """Find the doubtful entries, the most doubtful first; of equal ones, the first in the array.

    Args:
        probabilities, truth: as `Thresholds.of` takes them, of these images or of others.
        thresholds: of the training split.
    """
    given = self_confidence(probabilities, truth)
    other, is_present = 1 - given, truth == 1
    usual = np.where(is_present, thresholds.present, thresholds.absent)
    usual_other = np.where(is_present, thresholds.absent, thresholds.present)
    doubtful = (other >= usual_other) & ((given < usual) | (other > given))
    images, labels = np.nonzero(doubtful)
    order = np.argsort(given[images, labels], kind="stable")
    return images[order], labels[order]
