"""The optimiser, the schedule of its learning rate, and the averaged weights, from settings."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel

from pipeline.settings import TrainSettings


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimiser of all parameters of a network, on whose device it works.

    On CUDA it updates all parameters with one kernel.
    """
    parameters = list(network.parameters())
    fused = True if parameters[0].is_cuda else None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=fused,
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


class Average(AveragedModel):
    """The exponential moving average of a network's weights; the first ones are taken as they are.

    Torch's own update copies the number of updates to the device of the weights, and so waits for
    all work there.

    Args:
        network: whose weights are averaged.
        decay: share of the average that an update keeps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, use_buffers=False)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the network's present weights into the average, and its buffers as they are."""
        own: list[Tensor] = list(self.module.parameters())
        new: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(own, new, 1 - self._decay if self.n_averaged else 1.0)
        for buffer, newest in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(newest)
        self.n_averaged += 1


def make_average(network: nn.Module, settings: TrainSettings) -> Average | None:
    """Make the moving average of the weights, or None where the settings ask for none.

    It starts with the weights after the first step.
    """
    return Average(network, settings.averaging) if settings.averaging else None
