"""The paired bootstrap, against rows that are repeated, and against scikit-learn.

Letters: N images, C labels, R resamples, S seeds.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from pipeline.errors import MismatchError
from pipeline.evaluation import bootstrap
from pipeline.evaluation.bootstrap import FEW, Maps, intervals, resample
from pipeline.evaluation.metrics import evaluate


def make_split(
    images: int, labels: int, *, seed: int = 0, ties: bool = False, runs: int = 1
) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores and truth; with ``ties`` there are only four different scores."""
    rng = np.random.default_rng([seed, images, labels])
    scores = rng.random((runs, images, labels))
    if ties:
        scores = np.round(scores * 3) / 3
    truth = rng.choice([1, 0, 0, -1], size=(images, labels))
    truth[0, 0] = 1
    return list(scores.astype(np.float32)), truth


def drawn_images(images: int, resamples: int, seed: int) -> list[np.ndarray]:
    """The indices of each resample's images."""
    rng = np.random.default_rng(seed)
    return [rng.integers(images, size=images) for _ in range(resamples)]


def names(count: int) -> list[str]:
    return [str(label) for label in range(count)]


@settings(max_examples=60)
@given(
    images=st.integers(1, 25),
    labels=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    ties=st.booleans(),
)
def test_a_resample_has_the_map_of_its_repeated_images(
    images: int, labels: int, seed: int, ties: bool
) -> None:
    [scores], truth = make_split(images, labels, seed=seed, ties=ties)
    found = resample([scores], truth, resamples=4, seed=seed)
    assert found.split == pytest.approx(evaluate(scores, truth, names(labels)).mAP, abs=1e-9)
    maps = found.resamples
    assert maps.shape == (1, 4)
    for value, drawn in zip(maps[0], drawn_images(images, 4, seed), strict=True):
        if (truth[drawn] == 1).any():
            expected = evaluate(scores[drawn], truth[drawn], names(labels)).mAP
            assert value == pytest.approx(expected, abs=1e-9)
        else:
            assert np.isnan(value)


def test_a_resample_has_scikit_learns_map() -> None:
    """With many images, runs of equal scores, and rare labels."""
    runs, truth = make_split(400, 6, ties=True, runs=2)
    truth[:, 1] = 0
    truth[0, 1] = 1  # in some resamples this label has no positive
    maps = resample(runs, truth, resamples=20, seed=3).resamples
    without = 0
    for number, drawn in enumerate(drawn_images(400, 20, 3)):
        for run, scores in enumerate(runs):
            ap = []
            for label in range(6):
                kept = drawn[truth[drawn, label] != -1]
                if (truth[kept, label] == 1).any():
                    ap.append(average_precision_score(truth[kept, label], scores[kept, label]))
            without += len(ap) < 6
            assert maps[run, number] == pytest.approx(100 * np.mean(ap), abs=1e-9)
    assert without


def test_the_resamples_depend_on_seed_and_images_alone() -> None:
    """One run or many, few resamples or more than are computed together: the numbers agree."""
    runs, truth = make_split(30, 3, runs=3)

    def maps(of: list[np.ndarray], resamples: int, seed: int) -> np.ndarray:
        return resample(of, truth, resamples=resamples, seed=seed).resamples

    together = maps(runs, 520, 1)
    for run, scores in enumerate(runs):
        assert (maps([scores], 520, 1)[0] == together[run]).all()
    fewer = maps(runs, 30, 1)
    assert np.allclose(fewer, together[:, :30], rtol=1e-12)
    assert not np.allclose(maps(runs, 30, 2), fewer)
    assert len(np.unique(together[0])) > 500  # no chunk repeats the one before


def test_the_interval_is_of_the_mean_over_seeds_on_the_same_resample() -> None:
    # 0, 1, ..., 40 in any order, as the mean of two seeds that differ: quantiles 2.5 % and 97.5 %.
    mean = np.random.default_rng(0).permutation(41).astype(float)
    maps = Maps(np.array([15.0, 25.0]), np.stack([mean - 7, mean + 7]))
    assert maps.interval() == pytest.approx((1.0, 39.0))  # the split is the middle: no bias
    base = Maps(np.zeros(2), np.zeros((2, 41)))
    assert maps.minus(base).interval() == pytest.approx((1.0, 39.0))
    assert base.minus(maps).interval() == pytest.approx((-39.0, -1.0))


def test_the_interval_is_moved_by_twice_the_bias() -> None:
    resamples = np.arange(41.0)[None]  # 20 on average
    assert Maps(np.array([17.0]), resamples).interval() == pytest.approx((1.0 - 6, 39.0 - 6))
    assert Maps(np.array([24.5]), resamples).interval() == pytest.approx((1.0 + 9, 39.0 + 9))


def test_a_run_does_not_differ_from_itself_and_pairs_are_narrower() -> None:
    [scores, noise], truth = make_split(300, 4, runs=2)
    scores = 0.8 * scores + 0.1 * (truth == 1)
    better = scores + 0.1 * (truth == 1) * noise
    a, b = resample([better], truth), resample([scores], truth)
    assert a.minus(a).interval() == (0, 0)
    low, high = a.minus(b).interval()
    assert 0 < low < high
    unpaired = a.minus(Maps(b.split, np.roll(b.resamples, 1, axis=1))).interval()
    assert high - low < (unpaired[1] - unpaired[0]) / 4


def test_resamples_without_a_positive_don_t_count() -> None:
    maps = Maps(np.array([2.0]), np.array([[1.0, np.nan, 3.0]]))
    assert maps.interval() == pytest.approx((1.05, 2.95))


def test_an_map_has_no_interval_beyond_0_and_100() -> None:
    truth = np.array([[1], [1], [0], [0]])
    worst = np.array([[0.0], [1.0], [2.0], [3.0]])
    found = intervals({"full": [worst], "own": [-worst]}, truth, "full").of
    assert found["full"].ends[0] >= 0
    assert found["own"].ends == (100, 100)
    assert found["full"].difference is None
    assert found["own"].difference is not None


@pytest.mark.parametrize(("images", "share"), [(12, 0.3), (20, 0.1), (60, 0.2), (200, 0.1)])
def test_an_map_lies_in_its_own_interval(images: int, share: float) -> None:
    """With few positives, resamples lie above the split; the interval is moved by their bias."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = (rng.random((images, 10)) < share).astype(np.int8)
        maps = resample([rng.normal(size=truth.shape) + truth], truth, resamples=200)
        low, high = maps.interval()
        assert low < maps.split[0] < high


def test_what_is_said_names_resamples_images_and_too_few_positives() -> None:
    truth = np.zeros((60, 3), dtype=int)
    truth[: FEW - 1, 0] = truth[:FEW, 1] = 1  # 9.5 positives a label; the third has none
    scores = np.random.default_rng(0).random(truth.shape)
    about = intervals({"full": [scores]}, truth, "full").about
    for part in (f"{bootstrap.RESAMPLES:,} ", "60 ", "9.5", str(FEW)):
        assert part in about
    truth[:FEW, 0] = 1
    enough = intervals({"full": [scores]}, truth, "full")
    assert "9.5" not in enough.about
    assert not enough.weak
    one = intervals({"full": [scores[:1]]}, truth[:1], "full")
    assert "the one test image" in one.about
    assert one.weak


def test_scores_of_other_images_are_refused() -> None:
    [scores], truth = make_split(5, 2)
    with pytest.raises(MismatchError, match=r"\(4, 2\).*\(5, 2\)"):
        resample([scores, scores[:4]], truth)
