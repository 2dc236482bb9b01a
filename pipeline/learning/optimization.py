"""The optimiser, the schedule of its learning rate, and the averaged weights, from settings."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.settings import TrainSettings


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimiser of all parameters of a network."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


class Schedule:
    """The learning rate of each step: that of a torch schedule, times the share of a warm-up.

    Args:
        optimizer: whose rate is set, now and by each call of `step`.
        within: the torch schedule of the optimiser.
        every: steps of the optimiser between two of ``within``.
        warm_up: number of steps, not always whole, in which the rate rises in a line from zero.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, within: LRScheduler, every: int, warm_up: float
    ) -> None:
        self._optimizer = optimizer
        self._within = within
        self._every = every
        self._warm_up = warm_up
        self._steps = 0
        self._set_rate()

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return cast(float, self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Go on to the next step of the optimiser."""
        self._steps += 1
        if self._steps % self._every == 0:
            self._set_lr(1.0)  # torch's schedules compute a rate from the last one
            self._within.step()
        self._set_rate()

    def state_dict(self) -> dict[str, Any]:
        """The state of the torch schedule, and the number of steps done."""
        return {**self._within.state_dict(), "steps": self._steps}

    def _set_rate(self) -> None:
        number = self._steps + 1
        self._set_lr(number / self._warm_up if number < self._warm_up else 1.0)

    def _set_lr(self, share: float) -> None:
        groups, rates = self._optimizer.param_groups, self._within.get_last_lr()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = share * rate


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, per_epoch: int
) -> Schedule:
    """Make the schedule of the learning rate, for epochs of ``per_epoch`` steps."""
    steps = settings.epochs * per_epoch
    warm_up = settings.warm_up * steps
    within: LRScheduler
    if settings.schedule == "one-cycle":
        # Torch divides by zero where the first phase is a single step. The momentum stays as set.
        rising = settings.warm_up if warm_up > 1 else 0.0
        peak = settings.learning_rate
        within = OneCycleLR(optimizer, peak, steps, pct_start=rising, cycle_momentum=False)
        return Schedule(optimizer, within, 1, 0.0)
    if settings.schedule == "cosine":
        within = CosineAnnealingLR(optimizer, settings.epochs)
    elif settings.schedule == "constant":
        within = LambdaLR(optimizer, lambda epoch: 1.0)
    else:
        within = StepLR(optimizer, settings.step_epochs, gamma=0.1)
    return Schedule(optimizer, within, per_epoch, warm_up)


def make_average(network: nn.Module, settings: TrainSettings) -> AveragedModel | None:
    """Make the moving average of the weights, or None where the settings ask for none.

    It starts with the weights after the first step.
    """
    if not settings.averaging:
        return None
    average = get_ema_multi_avg_fn(settings.averaging)
    return AveragedModel(network, multi_avg_fn=average, use_buffers=False)
