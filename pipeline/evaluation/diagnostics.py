"""Scores and truth of a split -> what a reader wants to see beyond the metrics.

Letters: N images, C labels, B bins, T points of a curve. `scores` (N, C) and `truth` (N, C) are
those of `pipeline.evaluation.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import THRESHOLD, Floats, Integers, precision_recall

BINS = 15
"""Of equal width, as in Guo et al., "On calibration of modern neural networks" (ICML 2017)."""

_FEWEST_LABELS = 5  # that a map in two dimensions says anything of


def thinned_curve(
    scores: Floats, truth: Integers, points: int = 100
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The precision-recall curve of one label, with no more points than a figure can show.

    Args:
        scores, truth: (N,); truth of -1 is left out.
        points: of the curve at the most; of more, those nearest to an even spacing in recall are
            kept.

    Returns:
        recall and precision, (T,) each, by rising recall, from recall 0 with the precision of the
        first point; empty where no entry is positive.
    """
    recall, precision = precision_recall(scores, truth)
    if len(recall) > points:
        wanted = np.linspace(recall[0], 1, points)
        kept = np.unique(np.searchsorted(recall, wanted).clip(max=len(recall) - 1))
        recall, precision = recall[kept], precision[kept]
    return np.append(0 * recall[:1], recall), np.append(precision[:1], precision)


@dataclass(frozen=True)
class Calibration:
    """How probabilities compare with what came true, over all images and labels.

    Attributes:
        confidence: (B,) mean probability of each bin; nan for an empty one.
        frequency: (B,) share of its entries that are positive; nan for an empty one.
        count: (B,) its entries.
        error: expected calibration error in percent: the mean of |confidence - frequency|,
            weighted by count.
    """

    confidence: NDArray[np.float64]
    frequency: NDArray[np.float64]
    count: NDArray[np.int64]
    error: float


def calibration(scores: Floats, truth: Integers) -> Calibration:
    """The reliability diagram's numbers; every image and label is one entry, ignored ones none."""
    kept = truth != -1
    probability, positive = scores[kept].astype(np.float64), truth[kept] == 1
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an empty bin
        confidence = np.bincount(bins, probability, BINS) / count
        frequency = np.bincount(bins, positive, BINS) / count
    gaps = np.abs(confidence - frequency)[count > 0]
    error = 100 * float(np.average(gaps, weights=count[count > 0]))
    return Calibration(confidence, frequency, count, error)


@dataclass(frozen=True)
class CoOccurrence:
    """How often labels come together, in truth and in prediction.

    Attributes:
        truth, predicted: (C, C), the share of the images with label i that have label j, too; nan
            in the row of a label that no image has, and on the diagonal.
    """

    truth: NDArray[np.float64]
    predicted: NDArray[np.float64]


def co_occurrence(scores: Floats, truth: Integers) -> CoOccurrence:
    """Of labels that are there, and of labels that are predicted (probability over 0.5).

    An ignored label is neither.
    """
    return CoOccurrence(_together(truth == 1), _together((scores > THRESHOLD) & (truth != -1)))


def _together(present: NDArray[np.bool_]) -> NDArray[np.float64]:
    counts = present.T.astype(np.float64) @ present
    with np.errstate(invalid="ignore"):  # 0 / 0 of a label that no image has
        shares = counts / np.diag(counts)[:, None]
    np.fill_diagonal(shares, np.nan)
    return shares


def label_map(vectors: Floats) -> NDArray[np.float64] | None:
    """Where labels lie in two dimensions, near ones near (t-SNE on cosine distances).

    Args:
        vectors: (C, W), one a label.

    Returns:
        (C, 2), the same for the same vectors; None for fewer than five labels.
    """
    if len(vectors) < _FEWEST_LABELS:
        return None
    # It takes a second to import, and only the report needs it.
    from sklearn.manifold import TSNE

    places: NDArray[np.float64] = TSNE(
        metric="cosine",
        init="random",
        perplexity=min(30.0, (len(vectors) - 1) / 3),
        # Of so few points all pairs are computed sooner than who is near whom.
        method="exact" if len(vectors) < 1000 else "barnes_hut",
        random_state=0,
    ).fit_transform(vectors.astype(np.float64))
    return places


def found_groups(labels: Sequence[str], vectors: Floats) -> Mapping[str, Sequence[str]]:
    """Groups of labels whose vectors are near each other, for data sets that come with none.

    Average linkage on cosine distances, cut at the root of C groups, at most 8. A group is named
    after its first label.

    Args:
        labels: C names.
        vectors: (C, W), none of length 0.
    """
    from sklearn.cluster import AgglomerativeClustering

    wanted = min(8, round(len(labels) ** 0.5), len(labels))
    if wanted < 2:
        return {labels[0]: labels}
    numbers = AgglomerativeClustering(wanted, metric="cosine", linkage="average").fit_predict(
        vectors.astype(np.float64)
    )
    groups: dict[int, list[str]] = {}
    for label, number in zip(labels, numbers, strict=True):
        groups.setdefault(number, []).append(label)
    return {f"{names[0]} ..." if len(names) > 1 else names[0]: names for names in groups.values()}
