"""The learning rate of every step: the schedules, their warm-up, and where they resume.

`toys` describes the toy problem: 42 images, so 3 steps of 16 images an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import change_state, refused
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import Killed, Toy
from trainings import same, settings, train

from pipeline.errors import DamagedError
from pipeline.learning.loop import History
from pipeline.learning.optimization import make_schedule
from pipeline.settings import MaxPoolSettings, TrainSettings

PER_EPOCH, EPOCHS, PEAK = 3, 4, 0.02
SMALL = {
    "network": MaxPoolSettings(hidden_size=8, dropout=0.2),
    "epochs": EPOCHS,
    "learning_rate": PEAK,
    "step_epochs": 2,
}


def small(**changes: Any) -> TrainSettings:
    return settings(**{**SMALL, **changes})


def optimizer_of(rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def trained_rates(toy: Toy, folder: Path, chosen: TrainSettings) -> tuple[list[float], History]:
    """The rate of every step of a training, and its history."""
    rates: list[float] = []
    betas = set()

    def see(optimizer: torch.optim.Optimizer, *_: object) -> None:
        [group] = optimizer.param_groups
        rates.append(group["lr"])
        betas.add(group.get("betas", group.get("momentum")))

    hook = register_optimizer_step_post_hook(see)
    try:
        trained = train(toy, folder / "state.pt", chosen=chosen)
    finally:
        hook.remove()
    # The momentum is that of the settings, and is not cycled.
    assert betas == {(0.9, 0.999) if chosen.optimizer == "adamw" else chosen.momentum}
    return rates, trained.history


TORCHS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "step": lambda optimizer: StepLR(optimizer, 2),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, EPOCHS),
    "constant": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1.0),
}


def epoch_rates(schedule: str) -> list[float]:
    """The rate of each epoch, from torch's schedule."""
    optimizer, rates = optimizer_of(PEAK), []
    torchs = TORCHS[schedule](optimizer)
    for _ in range(EPOCHS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    return rates


@pytest.mark.parametrize("schedule", TORCHS)
def test_without_warm_up_the_rate_changes_at_the_ends_of_epochs(
    toy: Toy, tmp_path: Path, schedule: str
) -> None:
    """Bit for bit as torch's schedules, one step an epoch."""
    rates, history = trained_rates(toy, tmp_path, small(schedule=schedule))
    expected = epoch_rates(schedule)
    assert rates == [rate for rate in expected for _ in range(PER_EPOCH)]
    assert [row["learning_rate"] for row in history] == expected


@pytest.mark.parametrize("schedule", TORCHS)
def test_warm_up_is_a_line_from_zero(toy: Toy, tmp_path: Path, schedule: str) -> None:
    """5 of the 12 steps of each training: 1/5, 2/5, ... of the rate that the epoch has."""
    rates, history = trained_rates(toy, tmp_path, small(schedule=schedule, warm_up=5 / 12))
    shares = [min(1.0, (step + 1) / 5) for step in range(PER_EPOCH * EPOCHS)]
    of_epochs = epoch_rates(schedule)
    expected = [share * of_epochs[step // PER_EPOCH] for step, share in enumerate(shares)]
    assert rates == pytest.approx(expected, rel=1e-9)
    # The history has the rate of each epoch's last step.
    assert [row["learning_rate"] for row in history] == rates[PER_EPOCH - 1 :: PER_EPOCH]


def one_cycle(step: int, warm_up: float, steps: int) -> float:
    """The rate of a step under one-cycle, counted from 0."""
    first, last, top = PEAK / 25, PEAK / 25 / 1e4, warm_up * steps - 1
    if step <= top:
        return first + (PEAK - first) * (1 - math.cos(math.pi * step / top)) / 2
    part = (step - top) / (steps - 1 - top)
    return last + (PEAK - last) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("warm_up", [0.0, 0.25, 0.4])
def test_one_cycle_rises_and_falls_along_cosines(
    toy: Toy, tmp_path: Path, optimizer: str, warm_up: float
) -> None:
    chosen = small(schedule="one-cycle", warm_up=warm_up, optimizer=optimizer)
    rates, history = trained_rates(toy, tmp_path, chosen)
    steps = PER_EPOCH * EPOCHS
    top = warm_up if warm_up else 0.0
    assert rates == pytest.approx([one_cycle(step, top, steps) for step in range(steps)])
    assert [row["learning_rate"] for row in history] == rates[PER_EPOCH - 1 :: PER_EPOCH]
    if warm_up == 0.25:  # the third step has the peak
        assert rates.index(max(rates)) == 2
        assert rates[2] == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", [*TORCHS, "one-cycle"])
@pytest.mark.parametrize("warm_up", [0.0, 0.1, 0.25, 0.5, 0.99])
def test_short_trainings_have_a_schedule(schedule: str, warm_up: float) -> None:
    """Also those whose warm-up is a part of a step, or exactly one."""
    for epochs in (1, 2, 4, 5, 10):
        for per_epoch in (1, 2):
            optimizer = optimizer_of(PEAK)
            chosen = small(schedule=schedule, warm_up=warm_up, epochs=epochs)
            made = make_schedule(optimizer, chosen, per_epoch)
            for _ in range(epochs * per_epoch):
                assert 0 < made.rate <= PEAK * (1 + 1e-9)
                optimizer.step()
                made.step()


# Resumed -----------------------------------------------------------------------------------------


def killed_at(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("kills", [(2, 3, 8), (4, 6, 12), (5, 7)])
@pytest.mark.parametrize(
    ("schedule", "optimizer"), [("one-cycle", "adamw"), ("cosine", "sgd"), ("step", "adamw")]
)
def test_a_training_killed_at_any_step_ends_as_an_undisturbed_one(
    toy: Toy, tmp_path: Path, schedule: str, optimizer: str, kills: tuple[int, ...]
) -> None:
    chosen = small(schedule=schedule, optimizer=optimizer, warm_up=0.4, averaging=0.5)
    whole = train(toy, tmp_path / "whole.pt", chosen=chosen)
    state_file = tmp_path / "state.pt"
    for step in kills:
        with pytest.raises(Killed):
            train(toy, state_file, chosen=chosen, save_every=0, on_step=killed_at(step))
        torch.manual_seed(99)
    assert same(train(toy, state_file, chosen=chosen, save_every=0), whole)


@pytest.mark.parametrize(
    ("schedule", "keys", "value"),
    [
        ("one-cycle", "schedule/last_epoch", 1),
        ("one-cycle", "schedule/total_steps", 50),
        ("one-cycle", "optimizer/param_groups/0/lr", PEAK),
        ("cosine", "schedule/steps", lambda old: old + 1),
        ("cosine", "schedule/last_epoch", 0),
        ("cosine", "optimizer/param_groups/0/lr", PEAK),
    ],
)
def test_a_state_at_another_position_of_its_schedule_is_named(
    toy: Toy, tmp_path: Path, schedule: str, keys: str, value: Any
) -> None:
    chosen = small(schedule=schedule, optimizer="adamw", warm_up=0.5)
    state_file = tmp_path / "state.pt"
    with pytest.raises(Killed):
        train(toy, state_file, chosen=chosen, save_every=0, on_step=killed_at(5))
    change_state(state_file, keys, value)
    with refused(DamagedError, str(state_file), "Delete it"):
        train(toy, state_file, chosen=chosen)
