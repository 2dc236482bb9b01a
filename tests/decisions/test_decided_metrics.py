"""The metrics of fitted decisions, against scikit-learn and a loop over bins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import precision_score, recall_score

from pipeline.decisions.fitting import fit_decisions
from pipeline.evaluation.diagnostics import calibration_errors, with_decisions
from pipeline.evaluation.metrics import Metrics, evaluate
from pipeline.settings import DecisionSettings

LABELS = ("a", "b", "c")
RNG = np.random.default_rng(3)
TRUTH = (RNG.random((90, 3)) < (0.5, 0.3, 0.2)).astype(np.int8)
LOGITS = (2 * TRUTH + RNG.normal(size=(90, 3)) - 2.5).astype(np.float32)
DECISIONS = fit_decisions(LOGITS, TRUTH, DecisionSettings(thresholds="f1", calibration="platt"))


def error_by_loop(probability: list[float], known: list[int]) -> float:
    """The expected calibration error in percent, entry by entry."""
    bins: dict[int, list[tuple[float, int]]] = {}
    for p, one in zip(probability, known, strict=True):
        if one != -1:
            bins.setdefault(min(int(15 * p), 14), []).append((p, one))
    entries = sum(map(len, bins.values()))
    return 100 * sum(
        abs(sum(p for p, _ in pairs) - sum(one for _, one in pairs)) / entries
        for pairs in bins.values()
    )


def test_decided_metrics_are_those_of_scikit_learn() -> None:
    metrics = with_decisions(evaluate(LOGITS, TRUTH, LABELS), LOGITS, TRUTH, DECISIONS)
    probability = 1 / (1 + np.exp(-(DECISIONS.scale * LOGITS + DECISIONS.shift)))
    predicted = probability > DECISIONS.probabilities
    assert metrics.decided is not None
    for name, score in (("P", precision_score), ("R", recall_score)):
        for group, average in (("C", "macro"), ("O", "micro")):
            expected = 100 * score(TRUTH, predicted, average=average)
            assert getattr(metrics.decided, group + name) == pytest.approx(expected)
    assert metrics.number("decided CF1") == metrics.decided.CF1
    assert metrics.all == evaluate(LOGITS, TRUTH, LABELS).all


def test_calibration_errors_are_those_of_a_loop() -> None:
    truth = TRUTH.copy()
    truth[:, 2] = 0  # no positive, so not in the mean over labels
    truth[:30, 0] = -1
    probability = 1 / (1 + np.exp(-LOGITS.astype(float)))
    every, by_label = calibration_errors(LOGITS, truth)
    assert every == pytest.approx(
        error_by_loop(probability.ravel().tolist(), truth.ravel().tolist())
    )
    of_labels = [
        error_by_loop(probability[:, label].tolist(), truth[:, label].tolist()) for label in (0, 1)
    ]
    assert by_label == pytest.approx(np.mean(of_labels))


def test_they_come_back_from_json_and_are_absent_without_decisions() -> None:
    plain = evaluate(LOGITS, TRUTH, LABELS)
    assert not {"decided", "calibration_error"} & plain.to_json().keys()
    metrics = with_decisions(plain, LOGITS, TRUTH, DECISIONS)
    stored = json.loads(json.dumps(metrics.to_json()))
    assert Metrics.from_json(stored) == metrics
    assert metrics.calibration_error is not None
    assert metrics.calibration_error.after < metrics.calibration_error.before
    del stored["calibration_error"]["after"]
    with pytest.raises(KeyError):
        Metrics.from_json(stored)
