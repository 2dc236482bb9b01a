"""The folds of `gmpipe doubts`, and the scores of images that a network was not trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toys import VECTORS, Toy
from trainings import predict, settings, train

from pipeline.doubts.folds import divide, score_fold, without_choice
from pipeline.learning.splits import open_split


def test_folds_are_nearly_equal_and_keep_groups_together() -> None:
    groups = ["a", "b", "c", "b", "d", "e", "f", "a", "g", "h", "b"]  # 8 of them
    fold = divide(groups, 3, seed=0)
    members = [{groups[image] for image in np.flatnonzero(fold == number)} for number in range(3)]
    assert sorted(map(len, members)) == [2, 3, 3]
    assert sum(map(len, members)) == len(set.union(*members)) == 8
    assert np.array_equal(fold, divide(groups, 3, seed=0))
    assert any(not np.array_equal(fold, divide(groups, 3, seed)) for seed in (1, 2, 3))


def test_a_fold_is_scored_by_a_network_that_never_saw_it(toy: Toy, tmp_path: Path) -> None:
    """Wrong labels and other features of the fold's images change nothing for the others."""
    split, chosen = toy.train, settings(epochs=1)
    others = [open_split(toy.cache, toy.manifest, "test")]
    held_out = np.arange(len(split)) % 3 == 0

    def scored(truth: np.ndarray) -> list[np.ndarray]:
        return score_fold(
            replace(split, truth=truth),
            held_out,
            others,
            VECTORS,
            0,
            chosen,
            state_file=tmp_path / "state",
            name="x",
        )

    wrong = np.where(held_out[:, None], 1 - split.truth.clip(0), split.truth).astype(np.int8)
    own, of_test = scored(split.truth)
    assert all(map(np.array_equal, scored(wrong), (own, of_test)))

    rest = split.take(np.flatnonzero(~held_out))
    network = train(toy, tmp_path / "other", chosen=chosen, split=rest).network
    for logits, images in ((own, split.take(np.flatnonzero(held_out))), (of_test, others[0])):
        expected = predict(network, images, chosen.batch_size, trained_on=rest).logits
        assert np.array_equal(logits, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("validation", 0.2), ("training_share", 0.5), ("selection", "best"), ("patience", 3)],
)
def test_no_image_of_a_fold_is_kept_to_choose_an_epoch(name: str, value: object) -> None:
    assert without_choice(settings(**{name: value})) == settings()
