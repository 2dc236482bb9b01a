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
from refusals import GONE, change_state, mostly_slow, refused
from toys import Killed, Toy, killed_after
from trainings import rewritten, same, settings, train

from pipeline.errors import DamagedError, MismatchError
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
    steps: list[int] = []
    resumed = train(
        toy,
        tmp_path / "b.pt",
        chosen=chosen,
        on_step=steps.append,
        on_epoch=lambda row: seen.append(row["epoch"]),
        save_every=0,
    )
    assert seen == [2, 3, 4]
    assert steps == [*range(5, 13)]  # 3 in an epoch; the last state was saved after the fifth
    assert same(resumed, whole)
    # Killed after the last epoch and before the checkpoint: nothing is left to do.
    again = train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill)
    assert same(again, whole)
    assert math.isnan(again.waited)


LOOKS = mock.patch.dict("pipeline.learning.loop._LOOK_EVERY", cpu=4)
"""As on an accelerator: losses are looked at every few steps."""


def test_how_often_losses_are_looked_at_changes_nothing(toy: Toy, tmp_path: Path) -> None:
    chosen = settings(batch_size=5, averaging=0.5)  # 9 steps an epoch
    always = train(toy, tmp_path / "a.pt", chosen=chosen)
    with LOOKS:
        assert same(train(toy, tmp_path / "b.pt", chosen=chosen), always)
        loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(17))
        with loss, pytest.raises(Killed):
            train(toy, tmp_path / "c.pt", chosen=chosen, save_every=0)
        position = torch.load(tmp_path / "c.pt", weights_only=True)["position"]
        assert (len(position["history"]), position["steps"]) == (1, 8)
        torch.manual_seed(99)
        assert same(train(toy, tmp_path / "c.pt", chosen=chosen), always)


def test_a_state_that_cuda_left_resumes_on_a_cpu(toy: Toy, tmp_path: Path) -> None:
    """There, the optimizer has one kernel for all parameters."""
    chosen = settings(optimizer="adamw")
    whole = train(toy, tmp_path / "a.pt", chosen=chosen)
    loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(5))
    with loss, pytest.raises(Killed):
        train(toy, tmp_path / "b.pt", chosen=chosen, save_every=0)
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = True
    torch.save(state, tmp_path / "b.pt")
    assert same(train(toy, tmp_path / "b.pt", chosen=chosen), whole)


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
        loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(step))
        with loss, pytest.raises(Killed):
            train(toy, tmp_path / "state.pt", **options)
        torch.manual_seed(99)
    position = torch.load(tmp_path / "state.pt", weights_only=True)["position"]
    assert 2 * len(position["history"]) + position["steps"] == sum(kills)
    assert same(train(toy, tmp_path / "state.pt", **options), undisturbed)


CHOSEN = settings(validation=0.25, selection="best", averaging=0.5, epochs=3)


@pytest.fixture(scope="module")
def saved_state(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    state_file = tmp_path_factory.mktemp("saved") / "state.pt"
    loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(3))
    with loss, pytest.raises(Killed):
        train_best(toy, state_file, save_every=0)
    return state_file.read_bytes()


def train_best(toy: Toy, state_file: Path, **options: Any) -> Training:
    kept, held_out = split_validation(toy.train, 0.25, seed=0)
    return train(toy, state_file, chosen=CHOSEN, split=kept, validation=held_out, **options)


def test_the_state_is_of_the_second_epoch(toy: Toy, saved_state: bytes, tmp_path: Path) -> None:
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(saved_state)
    position = torch.load(state_file, weights_only=True)["position"]
    assert (len(position["history"]), position["steps"]) == (1, 1)
    assert same(train_best(toy, state_file), train_best(toy, tmp_path / "other.pt"))


ROW = "position/history/0"


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"text"), lambda path: torch.save([1], path)]
)
def test_a_file_that_is_no_state_is_named(
    toy: Toy, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    state_file = tmp_path / "state.pt"
    damage(state_file)
    with refused(DamagedError, str(state_file), "Delete it"):
        train_best(toy, state_file)


ODD = [
    *((name, GONE) for name in ("model", "optimizer", "schedule", "average", "random")),
    ("position", GONE),
    *((name, None) for name in ("model", "optimizer", "schedule", "average", "random")),
    ("position", None),
    ("position", [1]),
    ("model", {}),
    ("model/FIRST", GONE),
    ("model/FIRST", "text"),
    ("model/FIRST", lambda old: old[:1]),
    ("model/FIRST", lambda old: old.double()),
    ("model/FIRST", lambda old: old * math.nan),
    ("optimizer/state", {}),
    ("optimizer/state", []),
    ("optimizer/state/0", GONE),
    ("optimizer/state/0", {}),
    ("optimizer/state/0/momentum_buffer", None),
    ("optimizer/state/0/momentum_buffer", lambda old: old[:1]),
    ("optimizer/state/0/momentum_buffer", lambda old: old * math.inf),
    ("optimizer/param_groups", []),
    ("optimizer/param_groups/0/lr", "fast"),
    ("optimizer/param_groups/0/lr", 1.0),
    ("optimizer/param_groups/0/momentum", 0.5),
    ("optimizer/param_groups/0/nesterov", True),
    ("optimizer/param_groups/0/params", [0]),
    ("schedule/last_epoch", 7),
    ("schedule/gamma", 0.9),
    ("schedule/step_size", GONE),
    ("schedule/base_lrs", [1.0]),
    ("average/n_averaged", lambda old: old + 1),
    ("average/n_averaged", "many"),
    ("average/module.FIRST", lambda old: old[:1]),
    ("random", []),
    ("random", "text"),
    ("random/0", None),
    ("random/0", []),
    ("random/0/0", lambda old: old[:5]),
    ("random/0/0", lambda old: old.float()),
    ("position/odd", 1),
    ("position/steps", GONE),
    ("position/steps", 2),
    ("position/steps", 99),
    ("position/steps", -1),
    ("position/steps", 0),
    ("position/steps", 1.0),
    ("position/steps", True),
    ("position/loss", "low"),
    ("position/loss", math.nan),
    ("position/gradient", -1.0),
    ("position/epoch", 0),
    ("position/epoch", 2),
    ("position/epoch", "1"),
    ("position/weights", None),
    ("position/weights", {}),
    ("position/weights/FIRST", lambda old: old[:1]),
    ("position/chosen", None),
    ("position/chosen/FIRST", GONE),
    ("position/history", []),
    ("position/history", {}),
    ("position/history", lambda old: old * 2),
    ("position/history", lambda old: old * 9),
    (ROW, 1),
    (f"{ROW}/validation_mAP", GONE),
    (f"{ROW}/accuracy", 1.0),
    (f"{ROW}/epoch", 5),
    (f"{ROW}/train_loss", math.inf),
    (f"{ROW}/train_loss", "low"),
]


@pytest.mark.parametrize(("keys", "value"), mostly_slow(ODD))
def test_a_state_with_an_odd_field_is_named(
    toy: Toy, saved_state: bytes, tmp_path: Path, keys: str, value: Any
) -> None:
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(saved_state)
    change_state(state_file, keys, value)
    with refused(DamagedError, str(state_file), "Delete it"):
        train_best(toy, state_file)


ODD_OF_ADAMW = [
    ("optimizer/state/0/step", lambda old: old + 1),
    ("optimizer/state/0/step", GONE),
    ("optimizer/state/1/exp_avg_sq", lambda old: old[:1]),
    ("optimizer/param_groups/0/betas", (0.5, 0.9)),
    ("schedule/T_max", 50),
]


@pytest.mark.parametrize(("keys", "value"), mostly_slow(ODD_OF_ADAMW))
def test_a_state_of_adamw_with_an_odd_field_is_named(
    toy: Toy, tmp_path: Path, keys: str, value: Any
) -> None:
    chosen = settings(optimizer="adamw", schedule="cosine", epochs=2)
    state_file = tmp_path / "state.pt"
    loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(2))
    with loss, pytest.raises(Killed):
        train(toy, state_file, chosen=chosen, save_every=0)
    change_state(state_file, keys, value)
    with refused(DamagedError, str(state_file), "Delete it"):
        train(toy, state_file, chosen=chosen)


def test_a_state_of_more_processes_is_refused(toy: Toy, saved_state: bytes, tmp_path: Path) -> None:
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(saved_state)
    [randoms] = torch.load(state_file, weights_only=True)["random"]
    rewritten(state_file, random=[randoms, randoms])
    with pytest.raises(MismatchError, match=r"state\.pt .*\b2 processes.*\b1\b.* delete"):
        train_best(toy, state_file)
