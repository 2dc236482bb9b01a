"""Trainings that end before their last epoch, since the validation mAP has not risen for long.

`toys` describes the toy problem: 31 of its images are trained on here, in 2 steps an epoch.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import Flow
from refusals import change_state, refused
from toys import Killed, Toy, make_checkout
from trainings import same, settings, train

from pipeline.errors import DamagedError
from pipeline.learning.distributed import Processes
from pipeline.learning.loop import Training, is_finished
from pipeline.learning.splits import split_validation
from pipeline.settings import MaxPoolSettings, TrainSettings

EPOCHS = 12
STOPPING = settings(
    network=MaxPoolSettings(hidden_size=8, dropout=0.2),
    epochs=EPOCHS,
    schedule="constant",
    validation=0.25,
    patience=2,
)
STILL = STOPPING.model_copy(update={"learning_rate": 1e-20})
"""The mAP of every epoch is that of the first one."""


def validated(toy: Toy, state_file: Path, chosen: TrainSettings, **options: Any) -> Training:
    kept, held_out = split_validation(toy.train, 0.25, seed=0)
    return train(toy, state_file, chosen=chosen, split=kept, validation=held_out, **options)


@pytest.mark.parametrize(
    ("maps", "last"),
    [
        ([10, 20, 30, 40, 50, 60], 6),
        ([10, 10, 10, 10], 3),  # an equal one is no better one
        ([10, 30, 20, 29, 40], 4),
        ([10, 30, 20, 31, 30, 31, 40], 6),
        ([50, 40], None),
        ([], None),
    ],
)
def test_a_training_ends_after_as_many_epochs_without_a_better_one(
    maps: list[float], last: int | None
) -> None:
    chosen = STOPPING.model_copy(update={"epochs": 6})
    rows = [{"validation_mAP": value} for value in maps]
    ends = [number for number in range(len(rows) + 1) if is_finished(rows[:number], chosen)]
    assert ends[:1] == ([] if last is None else [last])
    without = chosen.model_copy(update={"patience": None})
    assert [n for n in range(len(rows) + 1) if is_finished(rows[:n], without)] == [6, 7][
        : max(len(rows) - 5, 0)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_stopping_changes_nothing_of_the_epochs_before(toy: Toy, tmp_path: Path, seed: int) -> None:
    endless = STOPPING.model_copy(update={"patience": None})
    whole = validated(toy, tmp_path / "a.pt", endless, seed=seed)
    maps = [row["validation_mAP"] for row in whole.history]
    best, since, made = -1.0, 0, 0
    while made < EPOCHS and since < 2:
        since = 0 if maps[made] > best else since + 1
        best = max(best, maps[made])
        made += 1
    assert made < EPOCHS
    stopped = validated(toy, tmp_path / "b.pt", STOPPING, seed=seed)
    assert stopped.history == whole.history[:made]
    assert stopped.epoch == made


@pytest.mark.parametrize(("selection", "epoch"), [("last", 3), ("best", 1)])
def test_the_result_follows_the_selection(
    toy: Toy, tmp_path: Path, selection: str, epoch: int
) -> None:
    chosen = STILL.model_copy(update={"selection": selection})
    steps: list[int] = []
    trained = validated(toy, tmp_path / "state.pt", chosen, on_step=steps.append)
    assert [row["epoch"] for row in trained.history] == [1, 2, 3]
    assert trained.epoch == epoch
    assert steps == list(range(7))


def test_all_processes_stop_by_the_map_of_the_first(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each took its own, a difference in the last digit would leave the others waiting."""
    firsts = iter([50.0, 60.0, 60.0, 59.0])

    def of_first(self: Processes, value: Any) -> Any:
        return next(firsts) if isinstance(value, float) else value

    monkeypatch.setattr(Processes, "of_first", of_first)
    trained = validated(toy, tmp_path / "state.pt", STOPPING)
    assert [row["validation_mAP"] for row in trained.history] == [50, 60, 60, 59]


# Resumed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["last", "best"])
@pytest.mark.parametrize("kills", [(1, 3, 4), (2, 6), (5,)])
def test_a_training_killed_at_any_step_stops_where_an_undisturbed_one_does(
    toy: Toy, tmp_path: Path, selection: str, kills: tuple[int, ...]
) -> None:
    chosen = STILL.model_copy(update={"selection": selection})
    whole = validated(toy, tmp_path / "whole.pt", chosen)
    state_file = tmp_path / "state.pt"
    for step in kills:

        def kill(done: int, at: int = step) -> None:
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            validated(toy, state_file, chosen, save_every=0, on_step=kill)
        torch.manual_seed(99)
    assert same(validated(toy, state_file, chosen, save_every=0), whole)
    # Killed before the checkpoint was written: nothing is left to do.
    steps: list[int] = []
    assert same(validated(toy, state_file, chosen, on_step=steps.append), whole)
    assert steps == [6]


def test_a_state_beyond_the_end_is_named(toy: Toy, tmp_path: Path) -> None:
    state_file = tmp_path / "state.pt"
    validated(toy, state_file, STILL, save_every=0)
    sooner = STILL.model_copy(update={"patience": 1})  # ends after the second of its three epochs
    with refused(DamagedError, str(state_file), "Delete it"):
        validated(toy, state_file, sooner)
    change_state(state_file, "position/steps", 1)
    with refused(DamagedError, str(state_file), "Delete it"):
        validated(toy, state_file, STILL)


# On the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder = tmp_path_factory.mktemp("flow")
    changes = {"epochs": 6, "learning_rate": 1e-20, "patience": 2, "schedule": "constant"}
    return make_checkout(folder, network={"head": "max-pool", "hidden_size": 8}, **changes)


def test_train_says_that_it_stopped(flow: Flow) -> None:
    done = flow.gmpipe("train", "--set", "train.toy.validation=0.25")
    assert done.code == 0, done.err
    assert "after epoch 3 of 6" in done.out
    [folder] = (flow / "runs/toy").glob("full-s0*")
    with (folder / "history.csv").open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1", "2", "3"]
    bar = [line for line in done.err.splitlines() if "100%" in line]
    assert len(bar) == 1
    assert " 6/6 " in bar[0]


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        ("last", r"train\.toy\.patience is `2`.*`train\.toy\.validation: 0\.2`.*patience: null`"),
        ("best", r"selection is `best`.*patience is `2`.*selection: last`.*patience: null`"),
    ],
)
def test_patience_needs_images_to_validate_on(flow: Flow, selection: str, named: str) -> None:
    assert flow.gmpipe("train", "--set", f"train.toy.selection={selection}").refused(named)
