"""Metrics of scores that do not rank, or do not decide: those that are not defined are left out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics import SIX, Metrics, evaluate, shown

DECIDES = {*SIX, "top3"}
RANKS = {"mAP", "mAP11", "top3_forced"}
LOGITS = np.array([[0.4, -0.4], [-0.3, 0.3]])
TRUTH = np.array([[1, 0], [0, 1]], dtype=np.int8)


@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_what_is_defined_does_not_depend_on_what_is_not(
    seed: int, ranks: bool, decides: bool
) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([1, 0, -1], (8, 5))
    truth[0, 0] = 1
    labels, split = list("abcde"), (rng.normal(size=truth.shape), truth)
    whole = evaluate(*split, labels, voc11=True).to_json()
    some = evaluate(*split, labels, voc11=True, ranks=ranks, decides=decides).to_json()
    absent = (set() if ranks else RANKS) | (set() if decides else DECIDES)
    assert some.keys() == whole.keys() - absent
    assert all(some[name] == whole[name] for name in some.keys() - {"AP"})
    assert some["AP"] == (whole["AP"] if ranks else dict.fromkeys(labels))


@pytest.mark.parametrize(("ranks", "decides"), [(True, False), (False, True)])
def test_metrics_that_are_not_defined_come_back_as_none(ranks: bool, decides: bool) -> None:
    metrics = evaluate(LOGITS, TRUTH, ["a", "b"], ranks=ranks, decides=decides)
    value = json.loads(json.dumps(metrics.to_json()))
    assert Metrics.from_json(value) == metrics
    assert (metrics.mAP is None) == (metrics.top3_forced is None) == (not ranks)
    assert (metrics.all is None) == (metrics.top3 is None) == (not decides)
    for column in ("mAP", "top-3 forced CF1"):
        assert (metrics.number(column) is None) == (not ranks)
    for column in ("OF1", "top-3 CF1"):
        assert (metrics.number(column) is None) == (not decides)
    assert metrics.summary().keys() == {"mAP"} if ranks else {"CF1", "OF1", "top3"}
    # A file that lacks one of several numbers that are defined together is damaged.
    for name in value.keys() - {"AP"}:
        other = {key: number for key, number in value.items() if key != name}
        with pytest.raises(KeyError, match=name):
            Metrics.from_json(other)


def test_a_number_that_is_not_defined_is_shown_as_a_dash() -> None:
    assert (shown(None), shown(62.345), shown(62.345, digits=1)) == ("-", "62.34", "62.3")
