"""Images with rare labels are drawn more often, in epochs that keep their length."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import Killed, Toy, killed_after
from trainings import same, settings, train

from pipeline.learning.batches import Feed
from pipeline.learning.splits import open_split, repeat_factors, repeated

BALANCED = settings(repeat_threshold=1.0, epochs=2)


def test_factors_are_those_of_lvis() -> None:
    """Of eight images, six have label 0, two have label 1, one has label 2, and none label 3."""
    truth = np.zeros((8, 4), dtype=np.int8)
    truth[:6, 0] = truth[5:7, 1] = truth[6, 2] = 1
    truth[7] = -1  # ignored labels are not positive
    shares = (6 / 8, 2 / 8, 1 / 8, 0.0)
    expected = [
        max([1.0, *(math.sqrt(0.5 / f) for f, y in zip(shares, row, strict=True) if y == 1)])
        for row in truth.tolist()
    ]
    assert repeat_factors(truth, 0.5) == pytest.approx(expected)
    assert expected[6] == 2.0
    assert repeat_factors(truth, 0.1).tolist() == [1.0] * 8


@given(st.lists(st.floats(1, 30), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True))
def test_an_image_is_drawn_in_proportion_to_its_factor(factors: list[float], offset: float) -> None:
    drawn = repeated(np.array(factors), offset)
    assert len(drawn) == len(factors)
    assert np.all(np.diff(drawn) >= 0)
    expected = len(factors) * np.array(factors) / sum(factors)
    assert np.all(np.abs(np.bincount(drawn, minlength=len(factors)) - expected) < 1 + 1e-6)


def drawn_in(toy: Toy, state_file: Path, **changes: object) -> list[np.ndarray]:
    """The images of each epoch of a training, as its feed was asked for them."""
    epochs: list[np.ndarray] = []
    batches = Feed.batches

    def noted(feed: Feed, chosen):  # type: ignore[no-untyped-def]
        choices = list(chosen)
        if not isinstance(choices[0][1], int):  # not a pass in order, for statistics
            epochs.append(np.concatenate([images for images, _ in choices]))
        return batches(feed, choices)

    with mock.patch.object(Feed, "batches", noted):
        train(toy, state_file, chosen=settings(epochs=2, **changes))
    return epochs


def test_a_training_draws_images_with_rare_labels_more_often(toy: Toy, tmp_path: Path) -> None:
    split = open_split(toy.cache, toy.manifest, "train")
    for order in drawn_in(toy, tmp_path / "a.pt"):
        assert sorted(order) == list(range(len(split)))
    balanced = drawn_in(toy, tmp_path / "b.pt", repeat_threshold=1.0)
    factors = repeat_factors(split.truth, 1.0)
    expected = len(split) * factors / factors.sum()
    for order in balanced:
        assert len(order) == len(split)
        assert np.all(np.abs(np.bincount(order, minlength=len(split)) - expected) < 1)
        assert np.any(np.diff(order) < 0)
    assert sorted(balanced[0]) != sorted(balanced[1])


def test_a_killed_training_draws_the_same_images_again(toy: Toy, tmp_path: Path) -> None:
    whole = train(toy, tmp_path / "a.pt", chosen=BALANCED)
    assert not same(whole, train(toy, tmp_path / "b.pt", chosen=settings(epochs=2)))
    loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(4))
    with pytest.raises(Killed), loss:
        train(toy, tmp_path / "c.pt", chosen=BALANCED, save_every=0)
    assert same(train(toy, tmp_path / "c.pt", chosen=BALANCED), whole)
