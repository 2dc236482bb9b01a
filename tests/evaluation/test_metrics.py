"""pipeline.evaluation.metrics: scikit-learn, a table by hand, a slow loop, and properties."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import average_precision, average_precision_11, evaluate

Array = NDArray[Any]
Split = tuple[Array, Array]
SIX = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def names(count: int) -> list[str]:
    return [f"label {c}" for c in range(count)]


@st.composite
def splits(draw: st.DrawFn, ignored: bool = True, max_labels: int = 6) -> Split:
    """Scores (N, C) with many ties, 0.5 and both ends among them, and truth with a positive."""
    images, labels = draw(st.integers(1, 12)), draw(st.integers(1, max_labels))
    levels = draw(st.sampled_from([2, 4, 10, 1000]))
    size = images * labels
    steps = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    kinds = st.sampled_from([1, 0, -1] if ignored else [1, 0])
    truth = np.array(draw(st.lists(kinds, min_size=size, max_size=size)), dtype=np.int8)
    truth[draw(st.integers(0, size - 1))] = 1
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    scores = (np.array(steps) / levels).astype(dtype)
    return scores.reshape(images, labels), truth.reshape(images, labels)


# One label ---------------------------------------------------------------------------------------


@given(splits())
def test_average_precision_is_scikit_learns(split: Split) -> None:
    for scores, truth in zip(split[0].T, split[1].T, strict=True):
        kept = truth >= 0
        if (truth == 1).any():
            expected = average_precision_score(truth[kept], scores[kept])
            assert average_precision(scores, truth) == pytest.approx(expected, abs=1e-12)
        else:
            assert math.isnan(average_precision(scores, truth))
            assert math.isnan(average_precision_11(scores, truth))


def devkit(scores: Array, truth: Array) -> float:
    """VOC2007's 11-point AP as a loop over thresholds and recall levels, in exact fractions."""
    total = Fraction(0)
    for tenths in range(11):
        best = Fraction(0)
        for threshold in scores:
            at_least = scores >= threshold
            hits = int(np.sum(at_least & (truth == 1)))
            alarms = int(np.sum(at_least & (truth == 0)))
            if hits + alarms == 0:
                continue
            if Fraction(hits, int(np.sum(truth == 1))) >= Fraction(tenths, 10):
                best = max(best, Fraction(hits, hits + alarms))
        total += best / 11
    return float(total)


@given(splits())
def test_11_points_are_the_devkits(split: Split) -> None:
    for scores, truth in zip(split[0].T, split[1].T, strict=True):
        if (truth == 1).any():
            assert average_precision_11(scores, truth) == pytest.approx(devkit(scores, truth))


def test_11_points_by_hand() -> None:
    # ranked     1  0  1  0  : precision 1, 1/2, 2/3, 2/4 at recall 1/2, 1/2, 1, 1
    # recall levels 0 .. 0.5 (six) see a precision of 1, levels 0.6 .. 1 (five) one of 2/3
    scores, truth = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert average_precision_11(scores, truth) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_11_points_count_a_recall_of_exactly_three_tenths() -> None:
    # Three of ten positives come first, then thirty negatives. Levels 0, 0.1, 0.2 and 0.3 see a
    # precision of 1 (in floating point, 3 * 0.1 > 3 / 10 would lose the last); all others 10/40.
    truth = np.array([1] * 3 + [0] * 30 + [1] * 7)
    scores = np.linspace(1, 0, truth.size)
    assert average_precision_11(scores, truth) == pytest.approx((4 * 1 + 7 * 10 / 40) / 11)


@given(splits())
def test_a_monotone_transform_leaves_ap_unchanged(split: Split) -> None:
    for scores, truth in zip(split[0].T, split[1].T, strict=True):
        # In float64 this map keeps apart whatever float32 holds apart, and equal what is equal.
        mapped = np.expm1(scores.astype(np.float64)) / 2
        for measure in (average_precision, average_precision_11):
            assert measure(mapped, truth) == pytest.approx(measure(scores, truth), nan_ok=True)


# A split -----------------------------------------------------------------------------------------

# Scores in hundredths, each with its truth: + positive, - negative, ? ignored.
#
#            sun   moon  tree  bird  night   over 0.5              top3            top3_forced
TABLE = """
    image-0  90+   80-   70+   60+   10-   # sun moon tree bird    sun moon tree   sun moon tree
    image-1  95?   85+   55-   52-   51-   # moon tree bird night  moon tree bird  moon tree bird
    image-2  40+   50+   20-   20-   10-   # (0.5 is not over)     (none)          moon sun tree
    image-3  99?   20?   30?   70+   60-   # bird night            bird night      bird night
"""
# What follows, right / predicted / positive:
#              sun     moon    tree    bird    night      sum
# over 0.5     1/1/2   1/2/2   1/2/1   2/3/2   0/2/0      5/10/7
# top3         1/1/2   1/2/2   1/2/1   1/2/2   0/1/0      4/8/7
# top3_forced  2/2/2   2/3/2   1/3/1   1/2/2   0/1/0      6/11/7
# `night` is never positive: it counts in the sums, and in no mean over labels.


def read_table(table: str) -> Split:
    cells = [line.split("#")[0].split()[1:] for line in table.strip().splitlines()]
    scores = np.array([[int(cell[:-1]) / 100 for cell in row] for row in cells])
    truth = np.array([[{"+": 1, "-": 0, "?": -1}[cell[-1]] for cell in row] for row in cells])
    return scores, truth.astype(np.int8)


def test_evaluate_by_hand() -> None:
    scores, truth = read_table(TABLE)
    result = evaluate(scores, truth, ["sun", "moon", "tree", "bird", "night"], voc11=True)

    def f1(p: float, r: float) -> float:
        return 2 * p * r / (p + r)

    def six(cp: float, cr: float, op: float, or_: float) -> Any:
        return pytest.approx(
            {
                "CP": 100 * cp, "CR": 100 * cr, "CF1": 100 * f1(cp, cr),
                "OP": 100 * op, "OR": 100 * or_, "OF1": 100 * f1(op, or_),
            }
        )  # fmt: skip

    assert {key: result[key] for key in SIX} == six(
        cp=(1 / 1 + 1 / 2 + 1 / 2 + 2 / 3) / 4,
        cr=(1 / 2 + 1 / 2 + 1 / 1 + 2 / 2) / 4,
        op=5 / 10,
        or_=5 / 7,
    )
    assert result["top3"] == six(
        cp=(1 / 1 + 1 / 2 + 1 / 2 + 1 / 2) / 4,
        cr=(1 / 2 + 1 / 2 + 1 / 1 + 1 / 2) / 4,
        op=4 / 8,
        or_=4 / 7,
    )
    assert result["top3_forced"] == six(
        cp=(2 / 2 + 2 / 3 + 1 / 3 + 1 / 2) / 4,
        cr=(2 / 2 + 2 / 2 + 1 / 1 + 1 / 2) / 4,
        op=6 / 11,
        or_=6 / 7,
    )
    # Ranked, without the ignored: sun 90+ 40+, moon 85+ 80- 50+ 20-, tree 70+ 55- 20-,
    # bird 70+ 60+ 52- 20-.
    ap = {"sun": 100.0, "moon": 100 * (1 / 1 + 2 / 3) / 2, "tree": 100.0, "bird": 100.0}
    assert result["AP"] == pytest.approx(ap | {"night": None})
    assert result["mAP"] == pytest.approx(sum(ap.values()) / 4)
    assert result["mAP11"] == pytest.approx((300 + 100 * (6 * 1 + 5 * 2 / 3) / 11) / 4)


@given(splits(ignored=False))
def test_thresholded_numbers_are_scikit_learns(split: Split) -> None:
    scores, truth = split
    result = evaluate(scores, truth, names(truth.shape[1]))
    known = np.flatnonzero(truth.any(axis=0))
    # scikit-learn takes one column for two classes; a column that is never anything helps it out.
    truth, predicted = (np.pad(x, ((0, 0), (0, 1))) for x in (truth, scores > 0.5))
    macro = precision_recall_fscore_support(
        truth, predicted, labels=known, average="macro", zero_division=0
    )
    micro = precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
    # Its macro F1 is the mean of the labels' F1, not the harmonic mean of CP and CR.
    assert [result["CP"], result["CR"]] == pytest.approx([100 * x for x in macro[:2]])
    assert [result[key] for key in ("OP", "OR", "OF1")] == pytest.approx(
        [100 * x for x in micro[:3]]
    )


@given(splits(), st.randoms(use_true_random=False))
def test_the_order_of_images_changes_nothing(split: Split, random: Any) -> None:
    scores, truth = split
    order = random.sample(range(len(scores)), len(scores))
    labels = names(truth.shape[1])
    once = evaluate(scores, truth, labels, voc11=True)
    assert evaluate(scores[order], truth[order], labels, voc11=True) == once


@given(splits(), st.randoms(use_true_random=False))
def test_permuted_labels_permute_ap(split: Split, random: Any) -> None:
    scores, truth = split
    labels = names(truth.shape[1])
    order = random.sample(range(len(labels)), len(labels))
    once = evaluate(scores, truth, labels)
    again = evaluate(scores[:, order], truth[:, order], [labels[c] for c in order])
    assert list(again["AP"]) == [labels[c] for c in order]
    assert again["AP"] == once["AP"]
    assert again["mAP"] == pytest.approx(once["mAP"])
    assert [again[key] for key in SIX] == pytest.approx([once[key] for key in SIX])


@given(splits())
def test_what_an_ignored_label_scores_changes_nothing(split: Split) -> None:
    scores, truth = split
    labels = names(truth.shape[1])
    other = np.where(truth == -1, 1 - scores, scores)
    assert evaluate(other, truth, labels, voc11=True) == evaluate(scores, truth, labels, voc11=True)


@given(splits())
def test_everything_is_json_and_a_percentage(split: Split) -> None:
    result = evaluate(*split, names(split[1].shape[1]), voc11=True)
    assert list(result) == ["mAP", "mAP11", *SIX, "top3", "top3_forced", "AP"]
    assert list(result["top3"]) == list(result["top3_forced"]) == list(SIX)
    json.dumps(result, allow_nan=False)
    flat = [result["mAP"], result["mAP11"], *(result[key] for key in SIX), *result["AP"].values()]
    flat += [*result["top3"].values(), *result["top3_forced"].values()]
    assert all(type(x) is float and 0 <= x <= 100 + 1e-9 for x in flat if x is not None)


@given(splits(max_labels=3))
def test_up_to_three_labels_all_are_best(split: Split) -> None:
    scores, truth = split
    result = evaluate(scores, truth, names(truth.shape[1]))
    assert result["top3"] == {key: result[key] for key in SIX}
    assert result["top3_forced"]["CR"] == result["top3_forced"]["OR"] == 100


def test_ties_for_the_third_place_go_to_the_first_label() -> None:
    scores = np.array([[0.6, 0.9, 0.6, 0.6, 0.9]], dtype=np.float32)
    for third in (0, 2, 3):
        truth = np.zeros((1, 5), dtype=np.int8)
        truth[0, third] = 1
        result = evaluate(scores, truth, names(5))
        assert result["top3"]["OR"] == result["top3_forced"]["OR"] == (100 if third == 0 else 0)


def test_a_perfect_split_scores_100_and_a_silent_one_0() -> None:
    truth = np.array([[1, 0], [0, 1]], dtype=np.int8)
    perfect = evaluate(truth.astype(np.float32), truth, names(2))
    assert [perfect[key] for key in ("mAP", *SIX)] == [100] * 7
    silent = evaluate(np.full((2, 2), 0.5), truth, names(2))
    assert [silent[key] for key in SIX] == [0] * 6
    assert silent["mAP"] == 50
    assert "mAP11" not in silent


def test_all_positive_and_one_image() -> None:
    everything = evaluate(np.array([[0.2], [0.9]]), np.ones((2, 1), dtype=np.int8), ["a"])
    assert everything["AP"] == {"a": 100}
    assert (everything["CP"], everything["CR"]) == (100, 50)
    one = evaluate(np.array([[0.9, 0.8]]), np.array([[1, 0]], dtype=np.int8), ["a", "b"])
    assert one["AP"] == {"a": 100, "b": None}
    assert (one["mAP"], one["CP"], one["OP"]) == (100, 100, 50)


# Errors ------------------------------------------------------------------------------------------

GOOD = np.array([[0.9, 0.1], [0.2, 0.8]])
TRUTH = np.array([[1, 0], [0, 1]], dtype=np.int8)


def changed(value: float) -> Array:
    scores = GOOD.copy()
    scores[1, 0] = value
    return scores


@pytest.mark.parametrize(
    ("scores", "truth", "labels", "message"),
    [
        (GOOD, TRUTH[:1], "ab", r"shape \(2, 2\), truth \(1, 2\), and there are 2 labels"),
        (GOOD, TRUTH, "abc", "3 labels"),
        (GOOD[0], TRUTH[0], "ab", r"shape \(2,\)"),
        (GOOD, TRUTH, "aa", "twice: a"),
        (GOOD[:0], TRUTH[:0], "ab", "no image"),
        (changed(math.nan), TRUTH, "ab", "image 1, label 'a' is nan"),
        (changed(math.inf), TRUTH, "ab", "image 1, label 'a' is inf"),
        (changed(1.5), TRUTH, "ab", "image 1, label 'a' is 1.5"),
        (changed(-0.5), TRUTH, "ab", "image 1, label 'a' is -0.5"),
        (GOOD, TRUTH * 2, "ab", "image 0, label 'a' is 2; expected 1"),
        (GOOD, TRUTH * 0, "ab", "none of the 2 images has a positive label"),
        (GOOD, TRUTH * 0 - 1, "ab", "none of the 2 images has a positive label"),
    ],
)
def test_errors_name_the_thing(scores: Array, truth: Array, labels: str, message: str) -> None:
    with pytest.raises(GmpipeError, match=message):
        evaluate(scores, truth, list(labels))
