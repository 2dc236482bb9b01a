"""Curves, calibration, co-occurrence and maps, against scikit-learn and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve

from pipeline.datasets.groups import LABEL_GROUPS, label_groups
from pipeline.evaluation.diagnostics import (
    BINS,
    calibration,
    co_occurrence,
    label_map,
    thinned_curve,
)
from pipeline.evaluation.metrics import precision_recall

rng = np.random.default_rng(0)


def logit(probabilities: np.ndarray) -> np.ndarray:
    """The inverse of the sigmoid."""
    return np.log(probabilities) - np.log1p(-probabilities)


# Precision and recall ----------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.sampled_from([1, 0, -1])),
        min_size=1,
        max_size=30,
    )
)
def test_the_curve_is_that_of_scikit_learn(entries: list[tuple[float, int]]) -> None:
    scores, truth = (np.array(column) for column in zip(*entries, strict=True))
    recall, precision = precision_recall(scores, truth)
    kept = truth != -1
    if not (truth == 1).any():
        assert recall.size == precision.size == 0
        return
    # scikit-learn goes from the lowest threshold up, and adds a last point (0, 1).
    expected_precision, expected_recall, _ = precision_recall_curve(truth[kept], scores[kept])
    np.testing.assert_allclose(precision, expected_precision[-2::-1])
    np.testing.assert_allclose(recall, expected_recall[-2::-1])


def test_a_thinned_curve_is_points_of_the_curve_spread_over_the_recall() -> None:
    truth = (rng.random(5000) < 0.3).astype(np.int8)
    scores = np.clip(0.4 * truth + rng.random(5000), 0, 1)
    whole = set(zip(*precision_recall(scores, truth), strict=True))
    recall, precision = thinned_curve(scores, truth, points=50)
    assert 40 <= len(recall) <= 51
    assert (recall[0], precision[0]) == (0, precision[1])  # where a curve begins
    assert set(zip(recall[1:], precision[1:], strict=True)) <= whole
    assert (np.diff(recall) > 0).all()
    assert recall[-1] == 1
    # It still has nearly the area of the whole curve.
    area = np.sum(np.diff(recall, prepend=0) * precision)
    assert area == pytest.approx(average_precision_score(truth, scores), abs=0.02)


def test_a_short_curve_is_left_as_it_is() -> None:
    scores, truth = np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])
    recall, precision = thinned_curve(scores, truth)
    np.testing.assert_allclose(recall, [0, 0.5, 1, 1])
    np.testing.assert_allclose(precision, [1, 1, 2 / 3, 1 / 2])


# Calibration -------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    scores = np.array([[0.05, 0.06], [0.95, 0.97], [0.5, 1 - 1e-9], [1e-9, 0.3]])
    truth = np.array([[0, 1], [1, 1], [0, 0], [0, -1]])
    result = calibration(logit(scores), truth)
    # Bins of 1/15: 0.00, 0.05 and 0.06 are in the first, 0.5 in the eighth, three in the last.
    assert result.count.tolist() == [3, *[0] * 6, 1, *[0] * 6, 3]
    assert result.confidence[0] == pytest.approx(0.11 / 3)
    assert result.frequency[0] == pytest.approx(1 / 3)
    assert result.confidence[14] == pytest.approx((0.95 + 0.97 + 1.0) / 3)
    assert result.frequency[14] == pytest.approx(2 / 3)
    assert np.isnan(result.confidence[1])
    assert np.isnan(result.frequency[1])
    gaps = [1 / 3 - 0.11 / 3, 0.5, 2.92 / 3 - 2 / 3]
    assert result.error == pytest.approx(100 * (3 * gaps[0] + gaps[1] + 3 * gaps[2]) / 7)


def test_probabilities_that_come_true_are_calibrated() -> None:
    scores = rng.random((20000, 3))
    truth = (rng.random(scores.shape) < scores).astype(np.int8)
    assert calibration(logit(scores), truth).error < 1
    assert calibration(logit(scores**4), truth).error > 15
    assert len(calibration(logit(scores), truth).count) == BINS


# Labels that occur together ----------------------------------------------------------------------


def test_co_occurrence_by_hand() -> None:
    truth = np.array([[1, 1, 0], [1, 0, 0], [1, 1, -1]])
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.6, 0.1], [0.2, 0.9, 0.9]])
    result = co_occurrence(logit(scores), truth)
    nan = np.nan
    np.testing.assert_allclose(result.truth, [[nan, 2 / 3, 0], [1, nan, 0], [nan, nan, nan]])
    # Neither a probability of 0.5 nor an ignored label is a prediction.
    np.testing.assert_allclose(result.predicted, [[nan, 0.5, 0], [0.5, nan, 0], [nan, nan, nan]])


# Topology ----------------------------------------------------------------------------------------


def test_near_labels_lie_near_in_the_map() -> None:
    centers = np.eye(3)[:, None] * 5
    vectors = (centers + 0.2 * rng.normal(size=(3, 8, 3))).reshape(24, 3).astype(np.float32)
    points = label_map(vectors)
    assert points is not None
    np.testing.assert_array_equal(points, label_map(vectors))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 8 == np.arange(24) // 8).all()


def test_few_labels_have_no_map() -> None:
    assert label_map(rng.normal(size=(4, 3))) is None
    assert label_map(rng.normal(size=(5, 3))) is not None


def test_known_label_sets_have_groups_of_their_own() -> None:
    for source, groups in LABEL_GROUPS.items():
        labels = [label for members in groups.values() for label in members]
        assert len(set(labels)) == len(labels)
        assert label_groups(source, labels[::-1]) is groups
        assert label_groups(source, [*labels, "something else"]) is None
        assert label_groups("table", labels) is None  # a user's labels, whatever their names


def test_the_groups_of_coco_are_its_supercategories(shared: Path) -> None:
    file = shared / "data/coco-sample/annotations/instances_val2014.json"
    groups: dict[str, list[str]] = {}
    for category in json.loads(file.read_text())["categories"]:
        groups.setdefault(category["supercategory"], []).append(category["name"])
    assert {name: list(members) for name, members in LABEL_GROUPS["coco"].items()} == groups
