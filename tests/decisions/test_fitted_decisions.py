"""Fitted calibration and thresholds, against searches over everything that they could be.

Letters: N images, C labels.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from pipeline.decisions.decisions import Decisions
from pipeline.decisions.fitting import (
    ENOUGH,
    best_f1,
    fit_decisions,
    lowest_reaching,
    platt,
    temperature,
)
from pipeline.settings import DecisionSettings

N = 200
RNG = np.random.default_rng(7)
TRUTH = np.stack([RNG.random(N) < share for share in (0.3, 0.1, 0.02)], axis=1).astype(np.int8)
LOGITS = (3 * TRUTH + RNG.normal(size=(N, 3)) * 2 - 1).astype(np.float32)
TRUTH[5:25, 0] = -1
"""The last label has fewer positives than are enough, and the first has ignored ones."""


def fitted(**settings: object) -> Decisions:
    return fit_decisions(LOGITS, TRUTH, DecisionSettings.model_validate(settings))


def counted(scores: list[float], positive: list[bool], threshold: float) -> tuple[int, int, int]:
    """How many entries over a threshold are right, how many are over it, how many are positive."""
    over = [known for score, known in zip(scores, positive, strict=True) if score > threshold]
    return sum(over), len(over), sum(positive)


def f1(scores: list[float], positive: list[bool], threshold: float) -> Fraction:
    right, predicted, known = counted(scores, positive, threshold)
    return Fraction(2 * right, predicted + known)


def entries(label: int) -> tuple[np.ndarray, np.ndarray]:
    kept = TRUTH[:, label] != -1
    return LOGITS[kept, label].astype(np.float64), TRUTH[kept, label] == 1


@pytest.mark.parametrize("label", [0, 1, 2])
def test_no_threshold_has_a_better_f1(label: int) -> None:
    scores, positive = entries(label)
    threshold = best_f1(scores, positive)
    lists = scores.tolist(), positive.tolist()
    best = f1(*lists, threshold)
    between = [-math.inf, *scores.tolist()]
    assert best == max(f1(*lists, one) for one in between)
    higher = [one for one in between if one > threshold and f1(*lists, one) == best]
    assert all(counted(*lists, one)[1] == counted(*lists, threshold)[1] for one in higher)


@pytest.mark.parametrize("precision", [0.3, 0.8, 1.0])
def test_no_lower_threshold_reaches_the_precision(precision: float) -> None:
    scores, positive = entries(0)
    lists = scores.tolist(), positive.tolist()
    threshold = lowest_reaching(scores, positive, precision)
    assert threshold is not None
    right, predicted, _ = counted(*lists, threshold)
    assert right / predicted >= precision
    for lower in (score for score in scores.tolist() if score < threshold):
        right, predicted, _ = counted(*lists, np.nextafter(lower, -math.inf))
        assert right / predicted < precision


def test_a_threshold_is_halfway_between_two_scores() -> None:
    scores, positive = np.array([4.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False])
    assert best_f1(scores, positive) == 1.5
    assert lowest_reaching(scores, positive, 1.0) == 3.0
    assert lowest_reaching(scores, positive, 0.5) == 0.0  # all are over it
    assert lowest_reaching(-scores, positive, 0.9) is None


def test_no_temperature_fits_better() -> None:
    scores, positive = entries(0)
    sign = np.where(positive, 1, -1)

    def loss(t: float) -> float:
        return -float(np.mean(np.log(1 / (1 + np.exp(-sign * scores / t)))))

    best = temperature(scores, positive)
    assert loss(best) <= min(loss(t) for t in np.geomspace(0.01, 100, 4000)) + 1e-12


def test_platt_is_where_both_derivatives_are_zero() -> None:
    scores, positive = entries(1)
    slope, intercept = platt(scores, positive)
    p, n = positive.sum(), (~positive).sum()
    target = np.where(positive, (p + 1) / (p + 2), 1 / (n + 2))
    off = 1 / (1 + np.exp(-(slope * scores + intercept))) - target
    assert off.sum() == pytest.approx(0, abs=1e-4)
    assert (off * scores).sum() == pytest.approx(0, abs=1e-4)
    assert max(map(abs, platt(np.where(positive, 5.0, -5.0), positive))) < 10  # they are separated


def test_what_is_not_asked_for_changes_nothing() -> None:
    decisions = fitted(thresholds="common")
    assert np.array_equal(decisions.calibrated(LOGITS), LOGITS)
    decisions = fitted(calibration="temperature")
    assert np.array_equal(decisions.predicted(LOGITS), LOGITS > 0)
    assert len(set(decisions.scale.tolist())) == 1
    assert not decisions.own_calibration.any()


def test_a_label_with_few_positives_shares_what_all_labels_have() -> None:
    decisions = fitted(thresholds="f1", calibration="platt")
    assert decisions.positives[2] < ENOUGH <= decisions.positives[1]
    assert decisions.own_threshold.tolist() == [True, True, False]
    assert decisions.own_calibration.tolist() == [True, True, False]
    assert decisions.scale[2] == fitted(calibration="temperature").scale[2]
    assert decisions.shift[2] == 0
    common = fitted(thresholds="common", calibration="platt").thresholds
    assert decisions.thresholds[2] == common[2]
    assert len(set(common.tolist())) == 1
    calibrated, kept = decisions.calibrated(LOGITS), TRUTH != -1
    assert common[0] == best_f1(calibrated[kept], TRUTH[kept] == 1)
    assert decisions.thresholds[1] == best_f1(calibrated[:, 1], TRUTH[:, 1] == 1)


def test_a_precision_that_nothing_reaches() -> None:
    """Of a label: it has the threshold of all labels. Of all labels: it is 0.5."""
    truth = np.tile([1, 0], 20)[:, None].astype(np.int8)
    good, bad = np.where(truth == 1, 2.0, -2.0), np.where(truth == 1, -3.0, 3.0)
    settings = DecisionSettings(thresholds="precision", precision=0.8)
    together = fit_decisions(np.hstack([good, bad]), np.hstack([truth, truth]), settings)
    assert together.own_threshold.tolist() == [True, False]
    assert together.thresholds.tolist() == [0.0, 0.0]  # halfway between -2 and 2, and 0.5
    many = [np.where(truth == 1, 5.0, -5.0), np.where(truth == 1, 1.0, 2.0)]
    both = fit_decisions(np.hstack(many), np.hstack([truth, truth]), settings)
    assert both.own_threshold.tolist() == [True, False]
    assert both.thresholds.tolist() == [0.0, 3.5]


def test_scores_against_the_truth_get_no_slope_of_their_own() -> None:
    decisions = fit_decisions(-LOGITS, TRUTH, DecisionSettings(calibration="platt"))
    assert not decisions.own_calibration.any()
    assert (decisions.scale > 0).all()


def test_ignored_entries_never_count() -> None:
    changed = np.where(TRUTH == -1, 99, LOGITS)
    settings = DecisionSettings(thresholds="f1", calibration="platt")
    one, other = (fit_decisions(logits, TRUTH, settings) for logits in (LOGITS, changed))
    for name in ("scale", "shift", "thresholds", "positives", "negatives"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert one.positives[0] + one.negatives[0] == N - 20
