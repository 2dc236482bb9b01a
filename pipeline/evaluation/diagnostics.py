"""Diagnostics beyond the metrics: curves, calibration, co-occurrence, and maps of the labels.

Letters: N images, C labels, B bins, T points of a curve. `logits` (N, C) and `truth` (N, C) are as
in `pipeline.evaluation.metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from pipeline.decisions.decisions import Decisions
from pipeline.evaluation.metrics import (
    CalibrationErrors,
    Floats,
    Integers,
    Metrics,
    precision_recall,
    six_numbers,
)
from pipeline.evaluation.predictions import probabilities

BINS = 15
"""B, of equal width, as in Guo et al., "On calibration of modern neural networks" (ICML 2017)."""

_FEWEST_LABELS = 5  # a map of fewer points says nothing


def thinned_curve(
    logits: Floats, truth: Integers, points: int = 100
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the precision-recall curve of one label, with no more points than a figure can show.

    Args:
        logits, truth: (N,); entries with truth -1 are left out.
        points: how many points are kept at most: those nearest to an even spacing in recall.

    Returns:
        recall and precision, (T,) each, by rising recall. The first point has recall 0 and the
        precision of the second. Both are empty if no entry is positive.
    """
    recall, precision = precision_recall(logits, truth)
    if len(recall) > points:
        wanted = np.linspace(recall[0], 1, points)
        kept = np.unique(np.searchsorted(recall, wanted).clip(max=len(recall) - 1))
        recall, precision = recall[kept], precision[kept]
    return np.append(0 * recall[:1], recall), np.append(precision[:1], precision)


@dataclass(frozen=True)
class Calibration:
    """How predicted probabilities compare with the truth, over all images and labels.

    Attributes:
        confidence: (B,) mean probability in each bin; nan for an empty bin.
        frequency: (B,) share of the bin's entries that are positive; nan for an empty bin.
        count: (B,) number of entries in the bin.
        error: expected calibration error in percent: the mean of |confidence - frequency|,
            weighted by count.
    """

    confidence: NDArray[np.float64]
    frequency: NDArray[np.float64]
    count: NDArray[np.int64]
    error: float


def calibration(logits: Floats, truth: Integers) -> Calibration:
    """Compute a reliability diagram. Each label of each image is an entry, unless it is ignored."""
    kept = truth != -1
    probability, positive = probabilities(logits[kept]), truth[kept] == 1
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an empty bin
        confidence = np.bincount(bins, probability, BINS) / count
        frequency = np.bincount(bins, positive, BINS) / count
    gaps = np.abs(confidence - frequency)[count > 0]
    error = 100 * float(np.average(gaps, weights=count[count > 0]))
    return Calibration(confidence, frequency, count, error)


def with_decisions(
    metrics: Metrics, logits: Floats, truth: Integers, decisions: Decisions
) -> Metrics:
    """Add `decided` and `calibration_error` to the metrics of a split.

    Args:
        metrics: of the same scores.
        logits: (N, C), not calibrated.
        truth: (N, C) in {1, 0, -1}; an ignored label is neither predicted nor true.
        decisions: of the run.
    """
    before, before_by_label = calibration_errors(logits, truth)
    after, after_by_label = calibration_errors(decisions.calibrated(logits), truth)
    return replace(
        metrics,
        decided=six_numbers(decisions.predicted(logits) & (truth != -1), truth),
        calibration_error=CalibrationErrors(before, after, before_by_label, after_by_label),
    )


def calibration_errors(logits: Floats, truth: Integers) -> tuple[float, float]:
    """Compute the expected calibration error of all labels, and its mean over labels, in percent.

    With the entries of a bin b (all of them, or those of one label), their mean probability p_b
    and their share of positives f_b:

        ECE = sum over b of |entries in b| / |entries| * |p_b - f_b|

    The 15 bins have equal widths. The mean is over the labels with a positive.
    """
    by_label = [
        calibration(x, known).error
        for x, known in zip(logits.T, truth.T, strict=True)
        if (known == 1).any()
    ]
    return calibration(logits, truth).error, fmean(by_label)


@dataclass(frozen=True)
class CoOccurrence:
    """How often labels come together, in truth and in prediction.

    Attributes:
        truth, predicted: (C, C), the share of the images with label i that also have label j; nan
            on the diagonal and in the row of a label that no image has.
    """

    truth: NDArray[np.float64]
    predicted: NDArray[np.float64]


def co_occurrence(logits: Floats, truth: Integers) -> CoOccurrence:
    """Compute the co-occurrence of true labels, and of predicted ones (probability over 0.5).

    An ignored label is neither true nor predicted.
    """
    return CoOccurrence(_together(truth == 1), _together((logits > 0) & (truth != -1)))


def _together(present: NDArray[np.bool_]) -> NDArray[np.float64]:
    counts = present.T.astype(np.float64) @ present
    with np.errstate(invalid="ignore"):  # 0 / 0 of a label that no image has
        shares = counts / np.diag(counts)[:, None]
    np.fill_diagonal(shares, np.nan)
    return shares


def label_map(vectors: Floats) -> NDArray[np.float64] | None:
    """Place labels in two dimensions, similar ones near each other (t-SNE on cosine distances).

    Args:
        vectors: (C, W), one per label.

    Returns:
        (C, 2), the same for the same vectors; None for fewer than five labels.
    """
    if len(vectors) < _FEWEST_LABELS:
        return None
    # The import takes a second, and only the report needs it.
    from sklearn.manifold import TSNE

    points: NDArray[np.float64] = TSNE(
        metric="cosine",
        init="random",
        perplexity=min(30.0, (len(vectors) - 1) / 3),
        # For few points, computing all pairs is faster than finding neighbours first.
        method="exact" if len(vectors) < 1000 else "barnes_hut",
        random_state=0,
    ).fit_transform(vectors.astype(np.float64))
    return points
