"""A killed training ends as an undisturbed one, and a state that can't be resumed is named.

Here the end of a process is an exception; `tests/stages/test_train.py` kills processes. `toys`
describes the toy problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from toys import Killed, Toy, killed_after
from trainings import rewritten, same, settings, train

from pipeline.errors import GmpipeError, MismatchError
from pipeline.learning.loop import Training
from pipeline.learning.splits import split_validation

BEST = settings(
    validation=0.25, selection="best", schedule="cosine", learning_rate=0.2, averaging=0.5
)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_killed_between_epochs_ends_as_an_undisturbed_one(
    toy: Toy, tmp_path: Path, optimizer: str
) -> None:
    chosen = settings(optimizer=optimizer)
    whole = train(toy, tmp_path / "a.pt", chosen=chosen)
    assert [row["epoch"] for row in whole.history] == [1, 2, 3, 4]
    assert whole.epoch == 4
    assert not whole.network.training
    # How often the state is saved does not change the result.
    assert same(train(toy, tmp_path / "c.pt", chosen=chosen, save_every=math.inf), whole)
    assert not (tmp_path / "c.pt").exists()

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill, save_every=0)
    torch.manual_seed(99)
    seen: list[float] = []
    resumed = train(
        toy,
        tmp_path / "b.pt",
        chosen=chosen,
        on_epoch=lambda row: seen.append(row["epoch"]),
        save_every=0,
    )
    assert seen == [2, 3, 4]
    assert same(resumed, whole)
    # Killed after the last epoch and before the checkpoint: nothing is left to do.
    again = train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill)
    assert same(again, whole)
    assert math.isnan(again.waited)


@pytest.fixture(scope="module")
def undisturbed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Training:
    kept, held_out = split_validation(toy.train, 0.25, seed=0)
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(toy, folder / "a.pt", chosen=BEST, split=kept, validation=held_out)


@pytest.mark.parametrize("kills", [(0, 3), (1, 1, 1), (2, 5), (3, 0, 4), (7,)])
def test_a_training_killed_at_any_step_ends_as_an_undisturbed_one(
    toy: Toy, undisturbed: Training, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    """With dropout, views, a schedule, averaged weights and the best epoch chosen.

    Its 4 epochs have 8 steps.
    """
    kept, held_out = split_validation(toy.train, 0.25, seed=0)
    options: dict[str, Any] = {
        "chosen": BEST,
        "split": kept,
        "validation": held_out,
        "save_every": 0,
    }
    for step in kills:
        loss = mock.patch("pipeline.learning.loop.matching_loss", killed_after(step))
        with loss, pytest.raises(Killed):
            train(toy, tmp_path / "state.pt", **options)
        torch.manual_seed(99)
    position = torch.load(tmp_path / "state.pt", weights_only=True)["position"]
    assert 2 * len(position["history"]) + position["steps"] == sum(kills)
    assert same(train(toy, tmp_path / "state.pt", **options), undisturbed)


@pytest.fixture(scope="module")
def saved_state(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    state_file = tmp_path_factory.mktemp("saved") / "state.pt"
    train(toy, state_file, chosen=settings(epochs=1), save_every=0)
    return state_file.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"text"), "can't be loaded"),
        (lambda path: torch.save([1], path), "list"),
        (lambda path: rewritten(path, model={}), "another version"),
        (lambda path: rewritten(path, position={"odd": 1}), "another version"),
    ],
    ids=["text", "list", "model", "position"],
)
def test_a_state_that_cannot_be_resumed_is_named(
    toy: Toy, saved_state: bytes, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(saved_state)
    damage(state_file)
    with pytest.raises(GmpipeError, match=rf"state\.pt .*{message}.*(D|d)elete") as caught:
        train(toy, state_file, chosen=settings(epochs=1))
    assert str(state_file) in str(caught.value)


def test_a_state_of_more_processes_is_refused(toy: Toy, saved_state: bytes, tmp_path: Path) -> None:
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(saved_state)
    [randoms] = torch.load(state_file, weights_only=True)["random"]
    rewritten(state_file, random=[randoms, randoms])
    with pytest.raises(MismatchError, match=r"state\.pt .*\b2 processes.*\b1\b.* delete"):
        train(toy, state_file, chosen=settings(epochs=1))
