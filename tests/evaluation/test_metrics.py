"""The metrics, against scikit-learn, a table by hand, a slow loop, and properties; and as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from results import make_metrics
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from pipeline.errors import DamagedError, GmpipeError, InputError, MismatchError, MissingError
from pipeline.evaluation.metrics import (
    SIX,
    Metrics,
    average_precision,
    average_precision_11,
    evaluate,
    read_evaluation,
    write_evaluation,
)
from pipeline.formats.sealed import write_sealed_json

Array = NDArray[Any]
Split = tuple[Array, Array]


def names(count: int) -> list[str]:
    return [f"label {c}" for c in range(count)]


@st.composite
def splits(draw: st.DrawFn, ignored: bool = True, max_labels: int = 6) -> Split:
    """Logits (N, C) with many ties, among them 0, and truth with a positive."""
    images, labels = draw(st.integers(1, 12)), draw(st.integers(1, max_labels))
    levels = draw(st.sampled_from([2, 4, 10, 1000]))
    size = images * labels
    steps = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    kinds = st.sampled_from([1, 0, -1] if ignored else [1, 0])
    truth = np.array(draw(st.lists(kinds, min_size=size, max_size=size)), dtype=np.int8)
    truth[draw(st.integers(0, size - 1))] = 1
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    logits = (np.array(steps) / levels - 0.5).astype(dtype)
    return logits.reshape(images, labels), truth.reshape(images, labels)


# One label ---------------------------------------------------------------------------------------


@given(splits())
def test_average_precision_is_scikit_learns(split: Split) -> None:
    for logits, truth in zip(split[0].T, split[1].T, strict=True):
        kept = truth >= 0
        if (truth == 1).any():
            expected = average_precision_score(truth[kept], logits[kept])
            assert average_precision(logits, truth) == pytest.approx(expected, abs=1e-12)
        else:
            assert math.isnan(average_precision(logits, truth))
            assert math.isnan(average_precision_11(logits, truth))


def devkit(logits: Array, truth: Array) -> float:
    """VOC2007's 11-point AP as a loop over thresholds and recall levels, in exact fractions."""
    total = Fraction(0)
    for tenths in range(11):
        best = Fraction(0)
        for threshold in logits:
            at_least = logits >= threshold
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
    for logits, truth in zip(split[0].T, split[1].T, strict=True):
        if (truth == 1).any():
            assert average_precision_11(logits, truth) == pytest.approx(devkit(logits, truth))


def test_11_points_by_hand() -> None:
    # ranked     1  0  1  0  : precision 1, 1/2, 2/3, 2/4 at recall 1/2, 1/2, 1, 1
    # recall levels 0 .. 0.5 (six) see a precision of 1, levels 0.6 .. 1 (five) one of 2/3
    logits, truth = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert average_precision_11(logits, truth) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_11_points_count_a_recall_of_exactly_three_tenths() -> None:
    # Three of ten positives come first, then thirty negatives. Levels 0, 0.1, 0.2 and 0.3 see a
    # precision of 1 (in floating point, 3 * 0.1 > 3 / 10 would lose the last); all others 10/40.
    truth = np.array([1] * 3 + [0] * 30 + [1] * 7)
    logits = np.linspace(1, 0, truth.size)
    assert average_precision_11(logits, truth) == pytest.approx((4 * 1 + 7 * 10 / 40) / 11)


@given(splits())
def test_a_monotone_transform_leaves_ap_unchanged(split: Split) -> None:
    for logits, truth in zip(split[0].T, split[1].T, strict=True):
        # In float64 this map keeps different float32 numbers different, and equal ones equal.
        mapped = np.expm1(logits.astype(np.float64)) / 2
        for measure in (average_precision, average_precision_11):
            assert measure(mapped, truth) == pytest.approx(measure(logits, truth), nan_ok=True)


# A split -----------------------------------------------------------------------------------------

# Logits in hundredths, plus 50, each with its truth: + positive, - negative, ? ignored.
#
#            sun   moon  tree  bird  night   over 50               top3            top3_forced
TABLE = """
    image-0  90+   80-   70+   60+   10-   # sun moon tree bird    sun moon tree   sun moon tree
    image-1  95?   85+   55-   52-   51-   # moon tree bird night  moon tree bird  moon tree bird
    image-2  40+   50+   20-   20-   10-   # (50 is not over)      (none)          moon sun tree
    image-3  99?   20?   30?   70+   60-   # bird night            bird night      bird night
"""
# What follows, right / predicted / positive:
#              sun     moon    tree    bird    night      sum
# over 50      1/1/2   1/2/2   1/2/1   2/3/2   0/2/0      5/10/7
# top3         1/1/2   1/2/2   1/2/1   1/2/2   0/1/0      4/8/7
# top3_forced  2/2/2   2/3/2   1/3/1   1/2/2   0/1/0      6/11/7
# `night` is never positive: it counts in the sums, and in no mean over labels.


def read_table(table: str) -> Split:
    cells = [line.split("#")[0].split()[1:] for line in table.strip().splitlines()]
    logits = np.array([[int(cell[:-1]) / 100 - 0.5 for cell in row] for row in cells])
    truth = np.array([[{"+": 1, "-": 0, "?": -1}[cell[-1]] for cell in row] for row in cells])
    return logits, truth.astype(np.int8)


def test_evaluate_by_hand() -> None:
    logits, truth = read_table(TABLE)
    result = evaluate(logits, truth, ["sun", "moon", "tree", "bird", "night"], voc11=True)

    def f1(p: float, r: float) -> float:
        return 2 * p * r / (p + r)

    def six(cp: float, cr: float, op: float, or_: float) -> Any:
        return pytest.approx(
            {
                "CP": 100 * cp, "CR": 100 * cr, "CF1": 100 * f1(cp, cr),
                "OP": 100 * op, "OR": 100 * or_, "OF1": 100 * f1(op, or_),
            }
        )  # fmt: skip

    assert asdict(result.all) == six(
        cp=(1 / 1 + 1 / 2 + 1 / 2 + 2 / 3) / 4,
        cr=(1 / 2 + 1 / 2 + 1 / 1 + 2 / 2) / 4,
        op=5 / 10,
        or_=5 / 7,
    )
    assert asdict(result.top3) == six(
        cp=(1 / 1 + 1 / 2 + 1 / 2 + 1 / 2) / 4,
        cr=(1 / 2 + 1 / 2 + 1 / 1 + 1 / 2) / 4,
        op=4 / 8,
        or_=4 / 7,
    )
    assert asdict(result.top3_forced) == six(
        cp=(2 / 2 + 2 / 3 + 1 / 3 + 1 / 2) / 4,
        cr=(2 / 2 + 2 / 2 + 1 / 1 + 1 / 2) / 4,
        op=6 / 11,
        or_=6 / 7,
    )
    # Ranked, without the ignored: sun 90+ 40+, moon 85+ 80- 50+ 20-, tree 70+ 55- 20-,
    # bird 70+ 60+ 52- 20-.
    ap = {"sun": 100.0, "moon": 100 * (1 / 1 + 2 / 3) / 2, "tree": 100.0, "bird": 100.0}
    assert pytest.approx(ap | {"night": None}) == result.AP
    assert result.mAP == pytest.approx(sum(ap.values()) / 4)
    assert result.mAP11 == pytest.approx((300 + 100 * (6 * 1 + 5 * 2 / 3) / 11) / 4)


@given(splits(ignored=False))
def test_thresholded_numbers_are_scikit_learns(split: Split) -> None:
    logits, truth = split
    result = evaluate(logits, truth, names(truth.shape[1]))
    known = np.flatnonzero(truth.any(axis=0))
    # scikit-learn takes one column for two classes; a column that is never positive avoids that.
    truth, predicted = (np.pad(x, ((0, 0), (0, 1))) for x in (truth, logits > 0))
    macro = precision_recall_fscore_support(
        truth, predicted, labels=known, average="macro", zero_division=0
    )
    micro = precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
    # Its macro F1 is the mean of the labels' F1, not the harmonic mean of CP and CR.
    numbers = result.all
    assert pytest.approx([100 * x for x in macro[:2]]) == [numbers.CP, numbers.CR]
    assert pytest.approx([100 * x for x in micro[:3]]) == [numbers.OP, numbers.OR, numbers.OF1]


@given(splits(), st.randoms(use_true_random=False))
def test_the_order_of_images_changes_nothing(split: Split, random: Any) -> None:
    logits, truth = split
    order = random.sample(range(len(logits)), len(logits))
    labels = names(truth.shape[1])
    once = evaluate(logits, truth, labels, voc11=True)
    assert evaluate(logits[order], truth[order], labels, voc11=True) == once


@given(splits(), st.randoms(use_true_random=False))
def test_permuted_labels_permute_ap(split: Split, random: Any) -> None:
    logits, truth = split
    labels = names(truth.shape[1])
    order = random.sample(range(len(labels)), len(labels))
    once = evaluate(logits, truth, labels)
    again = evaluate(logits[:, order], truth[:, order], [labels[c] for c in order])
    assert list(again.AP) == [labels[c] for c in order]
    assert again.AP == once.AP
    assert again.mAP == pytest.approx(once.mAP)
    assert asdict(again.all) == pytest.approx(asdict(once.all))


@given(splits())
def test_what_an_ignored_label_scores_changes_nothing(split: Split) -> None:
    logits, truth = split
    labels = names(truth.shape[1])
    other = np.where(truth == -1, -logits, logits)
    assert evaluate(other, truth, labels, voc11=True) == evaluate(logits, truth, labels, voc11=True)


@given(splits(), st.booleans())
def test_everything_is_json_and_a_percentage(split: Split, voc11: bool) -> None:
    result = evaluate(*split, names(split[1].shape[1]), voc11=voc11)
    value = result.to_json()
    eleven_points = ["mAP11"] if voc11 else []
    assert list(value) == ["mAP", *eleven_points, *SIX, "top3", "top3_forced", "AP"]
    assert list(value["top3"]) == list(value["top3_forced"]) == list(SIX)
    assert Metrics.from_json(json.loads(json.dumps(value, allow_nan=False))) == result
    flat = [value[key] for key in ("mAP", *eleven_points, *SIX)]
    flat += [*value["top3"].values(), *value["top3_forced"].values(), *value["AP"].values()]
    assert all(type(x) is float and 0 <= x <= 100 + 1e-9 for x in flat if x is not None)


@given(splits(max_labels=3))
def test_up_to_three_labels_all_are_best(split: Split) -> None:
    logits, truth = split
    result = evaluate(logits, truth, names(truth.shape[1]))
    assert result.top3 == result.all
    assert result.top3_forced.CR == result.top3_forced.OR == 100


def test_ties_for_the_third_place_go_to_the_first_label() -> None:
    logits = np.array([[0.1, 0.4, 0.1, 0.1, 0.4]], dtype=np.float32)
    for third in (0, 2, 3):
        truth = np.zeros((1, 5), dtype=np.int8)
        truth[0, third] = 1
        result = evaluate(logits, truth, names(5))
        assert result.top3.OR == result.top3_forced.OR == (100 if third == 0 else 0)


def test_a_perfect_split_scores_100_and_a_silent_one_0() -> None:
    truth = np.array([[1, 0], [0, 1]], dtype=np.int8)
    perfect = evaluate(truth - np.float32(0.5), truth, names(2))
    assert [perfect.mAP, *asdict(perfect.all).values()] == [100] * 7
    silent = evaluate(np.zeros((2, 2)), truth, names(2))
    assert list(asdict(silent.all).values()) == [0] * 6
    assert silent.mAP == 50
    assert silent.mAP11 is None


def test_all_positive_and_one_image() -> None:
    everything = evaluate(np.array([[-3.0], [4.0]]), np.ones((2, 1), dtype=np.int8), ["a"])
    assert everything.AP == {"a": 100}
    assert (everything.all.CP, everything.all.CR) == (100, 50)
    one = evaluate(np.array([[0.4, 0.3]]), np.array([[1, 0]], dtype=np.int8), ["a", "b"])
    assert one.AP == {"a": 100, "b": None}
    assert (one.mAP, one.all.CP, one.all.OP) == (100, 100, 50)


# Columns and files -------------------------------------------------------------------------------


def test_a_number_has_the_name_of_its_column() -> None:
    metrics = make_metrics(50.0)
    assert metrics.number("mAP") == 50
    assert metrics.number("mAP11") is None
    assert [metrics.number(name) for name in SIX] == list(asdict(metrics.all).values())
    assert metrics.number("top-3 OF1") == metrics.top3.OF1
    assert metrics.number("top-3 forced CR") == metrics.top3_forced.CR


METRICS_JSON = """\
{
  "mAP": 62.5,
  "mAP11": 60.25,
  "CP": 1.0,
  "CR": 2.0,
  "CF1": 3.0,
  "OP": 4.0,
  "OR": 5.0,
  "OF1": 6.0,
  "top3": {
    "CP": 11.0,
    "CR": 12.0,
    "CF1": 13.0,
    "OP": 14.0,
    "OR": 15.0,
    "OF1": 16.0
  },
  "top3_forced": {
    "CP": 21.0,
    "CR": 22.0,
    "CF1": 23.0,
    "OP": 24.0,
    "OR": 25.0,
    "OF1": 26.0
  },
  "AP": {
    "sun": 62.5,
    "moon": null
  },
  "dataset": "tiny",
  "split": "drawn/test",
  "variant": "full",
  "seed": 1,
  "epoch": 2,
  "trained_images": 23,
  "images": 12,
  "left_out": 3,
  "counts": {
    "train": {
      "images": 24
    }
  },
  "commit": null,
  "uncommitted": null,
  "fingerprint": "f",
  "train_sha256": "t",
  "test_sha256": "u",
  "checkpoint_sha256": "c",
  "sha256": "SHA256"
}
"""
CONTENT = {name: value for name, value in json.loads(METRICS_JSON).items() if name != "sha256"}
# As anybody can compute it: of the JSON with sorted keys and without blanks.
METRICS_JSON = METRICS_JSON.replace(
    "SHA256",
    hashlib.sha256(json.dumps(CONTENT, sort_keys=True, separators=(",", ":")).encode()).hexdigest(),
)


def test_a_file_is_read_and_written_back_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(METRICS_JSON)
    evaluation = read_evaluation(path)
    metrics = evaluation.metrics
    assert (metrics.mAP, metrics.mAP11, metrics.all.OF1) == (62.5, 60.25, 6)
    assert (metrics.top3.CP, metrics.top3_forced.OR) == (11, 25)
    assert metrics.AP == {"sun": 62.5, "moon": None}
    assert (evaluation.seed, evaluation.left_out, evaluation.commit) == (1, 3, None)
    write_evaluation(tmp_path / "again.json", evaluation)
    assert (tmp_path / "again.json").read_text() == METRICS_JSON
    assert metrics.summary() == {
        "mAP": 62.5,
        "CF1": 3.0,
        "OF1": 6.0,
        "top3": {"CF1": 13.0, "OF1": 16.0},
    }


def test_the_treatment_of_difficult_labels_is_kept_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(METRICS_JSON)  # of a data set without any, or of an earlier version
    evaluation = read_evaluation(path)
    assert evaluation.difficult == {}
    difficult = {"train": "positive", "test": "ignored"}
    write_evaluation(path, replace(evaluation, difficult=difficult))
    assert read_evaluation(path).difficult == difficult
    assert json.loads(path.read_text())["difficult"] == difficult


def test_an_11_point_map_that_was_not_asked_for_is_absent() -> None:
    value = dict(CONTENT)
    del value["mAP11"]
    metrics = Metrics.from_json(value)
    assert metrics.mAP11 is None
    assert "mAP11" not in metrics.to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mAP": None}, ""),
        ({"AP": 3}, ""),
        ({"AP": {"sun": "high"}}, "high"),
        ({"top3": {}}, "CP"),
        ({"mAP": -1.0}, "-1"),
        ({"AP": {"sun": 162.5}}, "162"),
        ({"seed": "one"}, "seed.*one"),
        ({"seed": True}, "seed.*True"),
        ({"counts": None}, "counts"),
        ({"fingerprint": None}, "fingerprint"),
        ({"difficult": {"train": "perhaps"}}, "difficult.*perhaps"),
        ({"difficult": 3}, ""),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(MissingError, match=r"metrics\.json"):
        read_evaluation(path)
    write_sealed_json(path, {**CONTENT, **changes})
    with pytest.raises(DamagedError, match=rf"metrics\.json.*{message}"):
        read_evaluation(path)


@pytest.mark.parametrize("key", list(CONTENT))
def test_a_file_without_one_of_its_keys_is_damaged(tmp_path: Path, key: str) -> None:
    value = dict(CONTENT)
    del value[key]
    path = tmp_path / "metrics.json"
    write_sealed_json(path, value)
    if key == "mAP11":
        read_evaluation(path)
        return
    with pytest.raises(DamagedError, match=rf"metrics\.json.*'{key}'"):
        read_evaluation(path)


def test_a_changed_digit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(METRICS_JSON.replace('"mAP": 62.5', '"mAP": 72.5'))
    with pytest.raises(DamagedError, match=r"metrics\.json.*sha256"):
        read_evaluation(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "\xff"])
def test_a_file_of_another_kind_is_damaged(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DamagedError, match=r"metrics\.json"):
        read_evaluation(path)


# Errors ------------------------------------------------------------------------------------------

GOOD = np.array([[0.4, -0.4], [-0.3, 0.3]])
TRUTH = np.array([[1, 0], [0, 1]], dtype=np.int8)


def changed(value: float) -> Array:
    logits = GOOD.copy()
    logits[1, 0] = value
    return logits


@pytest.mark.parametrize(
    ("logits", "truth", "labels", "kind", "message"),
    [
        (GOOD, TRUTH[:1], "ab", MismatchError, r"\(2, 2\).*\(1, 2\).* 2 labels"),
        (GOOD, TRUTH, "abc", MismatchError, "3 labels"),
        (GOOD[0], TRUTH[0], "ab", MismatchError, r"\(2,\)"),
        (GOOD, TRUTH, "aa", InputError, ": a"),
        (GOOD[:0], TRUTH[:0], "ab", InputError, "no images"),
        (changed(math.nan), TRUTH, "ab", InputError, "image 1, label 'a' is nan"),
        (changed(math.inf), TRUTH, "ab", InputError, "image 1, label 'a' is inf"),
        (changed(-math.inf), TRUTH, "ab", InputError, "image 1, label 'a' is -inf"),
        (GOOD, TRUTH * 2, "ab", InputError, "image 0, label 'a' is 2"),
        (GOOD, TRUTH * 0, "ab", InputError, "2 images"),
        (GOOD, TRUTH * 0 - 1, "ab", InputError, "2 images"),
    ],
)
def test_errors_name_the_value(
    logits: Array, truth: Array, labels: str, kind: type[GmpipeError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        evaluate(logits, truth, list(labels))
