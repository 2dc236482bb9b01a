"""Scores and truth of a split -> the numbers of the paper's section 4.1.

Letters: N images, C labels, T distinct scores of one label, P positives of one label.

Two arrays go through the whole file:
    scores (N, C) float32 or float64: probabilities in [0, 1].
    truth (N, C) integers: 1 positive, 0 negative, -1 ignored (neither; VOC's classes of which an
        image shows difficult objects only).

Names: `average_precision*` are fractions of one label; what `evaluate` returns is in percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GmpipeError

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]

THRESHOLD = 0.5
"""A label is predicted where its probability is greater than this (the paper's section 4.1)."""

PLACES = 3
"""Labels of an image that the `top3` numbers look at."""


def average_precision(scores: Floats, truth: Integers) -> float:
    """Average precision of one label, as scikit-learn's `average_precision_score`.

    AP = sum over t of (R_t - R_(t-1)) * P_t, where P_t and R_t are precision and recall among the
    images that score at least the t-th highest distinct score, and R_0 = 0. Images with equal
    scores enter together, so their order never matters.

    Args:
        scores: (N,).
        truth: (N,) in {1, 0, -1}; entries of -1 are left out.

    Returns:
        A fraction in [0, 1]; nan where no entry is positive.
    """
    hits, precision = _curve(scores, truth)
    if hits.size == 0 or hits[-1] == 0:
        return float("nan")
    return float(np.sum(np.diff(hits, prepend=0) * precision) / hits[-1])


def average_precision_11(scores: Floats, truth: Integers) -> float:
    """11-point interpolated average precision of one label (VOC2007 devkit, `VOCevalcls.m`).

    AP = 1/11 * sum over r in {0, 0.1, ..., 1} of max {P_t : R_t >= r}, with P_t and R_t as in
    `average_precision`. Two details are ours. Images with equal scores are one point of the
    curve, where the devkit takes them in the order of its list. And R_t >= r is decided in
    integers: in floating point 3 * 0.1 exceeds 3/10, and the devkit's loop steps over a recall
    of exactly 0.3.

    Args:
        scores: (N,).
        truth: (N,) in {1, 0, -1}; entries of -1 are left out.

    Returns:
        A fraction in [0, 1]; nan where no entry is positive.
    """
    hits, precision = _curve(scores, truth)
    if hits.size == 0 or hits[-1] == 0:
        return float("nan")
    best = [precision[10 * hits >= tenths * hits[-1]].max() for tenths in range(11)]
    return float(np.mean(best))


def evaluate(
    scores: Floats, truth: Integers, labels: Sequence[str], *, voc11: bool = False
) -> dict[str, Any]:
    """All metrics of a split, in percent.

    With, per label c, T_c labels rightly predicted, N_c predicted and P_c positive (the "correct",
    "predicted" and "ground-truth" images of Chen et al., 2019):

        CP = mean of T_c / N_c      CR = mean of T_c / P_c      CF1 = 2 CP CR / (CP + CR)
        OP = sum T_c / sum N_c      OR = sum T_c / sum P_c      OF1 = 2 OP OR / (OP + OR)

    CP, CR and mAP average over the labels with a positive in the split (P_c > 0); OP and OR sum
    over all labels, so a false alarm counts whatever its label. A quotient of 0 by 0 is 0: the
    precision of a label that is never predicted, OP where nothing is, F1 of 0 and 0.

    Which labels of an image are predicted:
        (top level)   every label with a probability over 0.5.
        top3          of its three best labels, those over 0.5.
        top3_forced   its three best labels, whatever their probability.
    An ignored label is taken out of the image before anything is counted or ranked: it is neither
    predicted nor true and takes none of the three places. Where fewer than three labels are left,
    all of them are best. Of labels that tie for a place, the first in `labels` takes it.

    Args:
        scores: (N, C) probabilities.
        truth: (N, C) in {1, 0, -1}.
        labels: C names.
        voc11: also report `mAP11`, the mean of `average_precision_11`.

    Returns:
        `mAP`, `mAP11` if asked for, `CP CR CF1 OP OR OF1`, the same six under `top3` and
        `top3_forced`, and under `AP` each label's value, None where it has no positive. Finite
        floats, ready for JSON.

    Raises:
        GmpipeError: shapes that don't fit, a name twice, an empty split, a score that is not a
            probability, a truth that is none of 1, 0, -1, or no positive anywhere.
    """
    _check(scores, truth, labels)
    by_label = list(zip(scores.T, truth.T, strict=True))
    ap = 100 * np.array([average_precision(s, t) for s, t in by_label])
    result: dict[str, Any] = {"mAP": float(np.nanmean(ap))}
    if voc11:
        ap_11 = 100 * np.array([average_precision_11(s, t) for s, t in by_label])
        result["mAP11"] = float(np.nanmean(ap_11))
    over = (scores > THRESHOLD) & (truth != -1)
    best = _best(scores, truth)
    result |= _precision_recall(over, truth)
    result["top3"] = _precision_recall(over & best, truth)
    result["top3_forced"] = _precision_recall(best, truth)
    result["AP"] = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(labels, ap, strict=True)
    }
    return result


def precision_recall(
    scores: Floats, truth: Integers
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall and precision of one label at each distinct score, from the highest down.

    Args:
        scores: (N,).
        truth: (N,) in {1, 0, -1}; entries of -1 are left out.

    Returns:
        R_t and P_t of `average_precision`, (T,) each; empty where no entry is positive.
    """
    hits, precision = _curve(scores, truth)
    if hits.size == 0 or hits[-1] == 0:
        return np.empty(0), np.empty(0)
    return hits / hits[-1], precision


def _curve(scores: Floats, truth: Integers) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Hits (T,) and precision (T,) among the images at or above each distinct score, descending."""
    kept = truth != -1
    scores, positive = scores[kept], truth[kept] == 1
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last_of_equals = np.flatnonzero(np.append(scores[1:] != scores[:-1], scores.size > 0))
    hits = np.cumsum(positive[order], dtype=np.int64)[last_of_equals]
    return hits, hits / (last_of_equals + 1)


def _best(scores: Floats, truth: Integers) -> Mask:
    """(N, C) true at each image's `PLACES` best labels, ignored ones left out."""
    ranked = np.where(truth == -1, -np.inf, scores)
    places = np.argsort(-ranked, axis=1, kind="stable")[:, :PLACES]
    best: Mask = np.zeros(truth.shape, dtype=np.bool_)
    np.put_along_axis(best, places, True, axis=1)
    best &= truth != -1
    return best


def _precision_recall(predicted: Mask, truth: Integers) -> dict[str, float]:
    """The six numbers of `evaluate`, in percent, from (N, C) predictions without ignored ones."""
    counts_right = (predicted & (truth == 1)).sum(axis=0)
    counts_predicted = predicted.sum(axis=0)
    counts_positive = (truth == 1).sum(axis=0)
    known = counts_positive > 0
    # A maximum of 1 under the fraction makes 0 / 0 a 0.
    cp = 100 * float(np.mean((counts_right / np.maximum(counts_predicted, 1))[known]))
    cr = 100 * float(np.mean(counts_right[known] / counts_positive[known]))
    overall_p = 100 * float(counts_right.sum() / max(counts_predicted.sum(), 1))
    overall_r = 100 * float(counts_right.sum() / counts_positive.sum())
    return {
        "CP": cp,
        "CR": cr,
        "CF1": _harmonic_mean(cp, cr),
        "OP": overall_p,
        "OR": overall_r,
        "OF1": _harmonic_mean(overall_p, overall_r),
    }


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def _check(scores: Floats, truth: Integers, labels: Sequence[str]) -> None:
    """Refuse what `evaluate` can't give a number for; see there."""
    if scores.ndim != 2 or scores.shape != truth.shape or scores.shape[1] != len(labels):
        raise GmpipeError(
            f"scores have the shape {scores.shape}, truth {truth.shape}, and there are "
            f"{len(labels)} labels; expected (images, labels) for both. Evaluate the predictions "
            "with the manifest that they were made from."
        )
    twice = [name for name, count in Counter(labels).items() if count > 1]
    if twice:
        raise GmpipeError(f"labels that appear twice: {', '.join(twice)}. Rename or merge them.")
    if scores.shape[0] == 0:
        raise GmpipeError(
            "the split to evaluate has no image. Prepare a data set with test images."
        )
    # Written so that nan, for which every comparison is false, is caught too.
    bad = np.argwhere(~((scores >= 0) & (scores <= 1)))
    if bad.size:
        row, column = bad[0]
        raise GmpipeError(
            f"the score of image {row}, label {labels[column]!r} is {scores[row, column]}; "
            f"expected a probability in [0, 1] ({len(bad)} such scores). If it is nan, training "
            "diverged: lower the learning rate. Otherwise apply the sigmoid to the logits first."
        )
    bad = np.argwhere(~np.isin(truth, (1, 0, -1)))
    if bad.size:
        row, column = bad[0]
        raise GmpipeError(
            f"the truth of image {row}, label {labels[column]!r} is {truth[row, column]}; expected "
            "1 (positive), 0 (negative) or -1 (ignored). Prepare the data set again."
        )
    if not (truth == 1).any():
        raise GmpipeError(
            f"none of the {scores.shape[0]} images has a positive label, so that no metric is "
            "defined. Evaluate a split with labels, or use `gmpipe predict` for images without."
        )
