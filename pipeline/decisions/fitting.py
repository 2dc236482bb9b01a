"""Fit calibration and thresholds on the images that validated a training.

Letters: N images, C labels, E entries: pairs of an image and a label that is not ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.decisions.decisions import Decisions, Floats
from pipeline.settings import DecisionSettings

ENOUGH = 10
"""A label with fewer positives than these, or fewer negatives, gets nothing of its own."""

_MOST_TEMPERATURE = 100.0

Entries = NDArray[np.float64]
"""(E,) logits."""

Positive = NDArray[np.bool_]
"""(E,), whether an entry is positive."""


def fit_decisions(
    logits: Floats, truth: NDArray[np.integer[Any]], settings: DecisionSettings
) -> Decisions:
    """Fit what ``settings`` ask for.

    Thresholds are fitted on calibrated logits. What a label can't have of its own, it gets from all
    labels together: with fewer than `ENOUGH` positives or negatives, if its scores don't rise with
    the truth (`platt`), or if no threshold reaches the precision. If none does for all labels
    together either, the threshold is the probability 0.5.

    Args:
        logits: (N, C), finite.
        truth: (N, C) in {1, 0, -1}; entries of -1 are left out.
        settings: of a training; at least one entry must be positive.
    """
    labels = [
        (column[known != -1].astype(np.float64), known[known != -1] == 1)
        for column, known in zip(logits.T, truth.T, strict=True)
    ]
    positives, negatives = ((truth == value).sum(axis=0).astype(np.int64) for value in (1, 0))
    enough = (positives >= ENOUGH) & (negatives >= ENOUGH)
    scale, shift, own_calibration = _calibration(labels, enough, settings)
    calibrated = [
        (scale[label] * x + shift[label], positive) for label, (x, positive) in enumerate(labels)
    ]
    thresholds, own_threshold = _thresholds(calibrated, enough, settings)
    return Decisions(scale, shift, thresholds, own_calibration, own_threshold, positives, negatives)


def _calibration(
    labels: list[tuple[Entries, Positive]], enough: NDArray[np.bool_], settings: DecisionSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Scale (C,), shift (C,), and whether they are a label's own (C,)."""
    scale, shift = np.ones(len(labels)), np.zeros(len(labels))
    own = np.zeros(len(labels), dtype=np.bool_)
    if settings.calibration == "none":
        return scale, shift, own
    scale[:] = 1 / temperature(*_together(labels))
    if settings.calibration == "platt":
        for label in np.flatnonzero(enough):
            slope, intercept = platt(*labels[label])
            if slope > 0:
                scale[label], shift[label], own[label] = slope, intercept, True
    return scale, shift, own


def _thresholds(
    labels: list[tuple[Entries, Positive]], enough: NDArray[np.bool_], settings: DecisionSettings
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Thresholds (C,), and whether they are a label's own (C,)."""
    thresholds = np.zeros(len(labels))  # the logit of the probability 0.5
    own = np.zeros(len(labels), dtype=np.bool_)
    if settings.thresholds == "fixed":
        return thresholds, own
    choose: Callable[[Entries, Positive], float | None] = best_f1
    if settings.thresholds == "precision":
        choose = partial(lowest_reaching, precision=settings.precision)
    common = choose(*_together(labels))
    if common is not None:
        thresholds[:] = common
    if settings.thresholds != "common":
        for label in np.flatnonzero(enough):
            threshold = choose(*labels[label])
            if threshold is not None:
                thresholds[label], own[label] = threshold, True
    return thresholds, own


def _together(labels: list[tuple[Entries, Positive]]) -> tuple[Entries, Positive]:
    """The entries of all labels."""
    return np.concatenate([x for x, _ in labels]), np.concatenate([known for _, known in labels])


def temperature(logits: Entries, positive: Positive) -> float:
    """The T in [0.01, 100] for which sigmoid(logit / T) has the smallest mean cross-entropy.

    Guo et al., "On calibration of modern neural networks" (ICML 2017), section 4.2.

    Args:
        logits, positive: (E,).
    """
    from scipy.optimize import minimize_scalar

    signed = np.where(positive, -logits, logits)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, signed * np.exp(-log_temperature)).mean())

    most = np.log(_MOST_TEMPERATURE)
    return float(np.exp(minimize_scalar(loss, bounds=(-most, most), method="bounded").x))


def platt(logits: Entries, positive: Positive) -> tuple[float, float]:
    """The slope a and intercept b of sigmoid(a logit + b) with the smallest cross-entropy.

    The targets are (P + 1) / (P + 2) for the P positives and 1 / (N + 2) for the N negatives, so
    that scores that separate them don't give an endless slope. Platt, "Probabilistic outputs for
    support vector machines" (1999), section 2.2.

    Args:
        logits, positive: (E,).
    """
    from sklearn.linear_model import LogisticRegression

    p, n = int(positive.sum()), int((~positive).sum())
    target = np.where(positive, (p + 1) / (p + 2), 1 / (n + 2))
    # Each entry twice, as positive with the weight of its target and as negative with the rest.
    fit = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.tile(logits, 2)[:, None],
        np.repeat([1, 0], len(logits)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    return float(fit.coef_[0, 0]), float(fit.intercept_[0])


def best_f1(logits: Entries, positive: Positive) -> float:
    """The threshold with the best F1 = 2 P R / (P + R); of equal ones the highest.

    Over the entries of all labels, F1 is OF1.

    Args:
        logits, positive: (E,); at least one is positive.
    """
    precision, recall, scores = _curve(logits, positive)
    # P + R is 0 only where nothing is right, and F1 with it.
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return _below(scores, len(f1) - 1 - int(np.argmax(f1[::-1])))


def lowest_reaching(logits: Entries, positive: Positive, precision: float) -> float | None:
    """The lowest threshold over which at least this share is positive; None if there is none.

    Args:
        logits, positive: (E,); at least one is positive.
    """
    reached, _, scores = _curve(logits, positive)
    [numbers] = np.nonzero(reached >= precision)
    return _below(scores, int(numbers[0])) if len(numbers) else None


def _curve(logits: Entries, positive: Positive) -> tuple[Entries, Entries, Entries]:
    """Precision and recall of the entries that score at least each distinct score, ascending."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, scores = precision_recall_curve(positive, logits)
    return precision[:-1], recall[:-1], scores


def _below(scores: Entries, number: int) -> float:
    """The threshold under a score: halfway to the next lower one; 1 under the lowest."""
    lower = scores[number - 1] if number else scores[0] - 2
    return float((scores[number] + lower) / 2)
