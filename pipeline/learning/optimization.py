"""The optimiser, the schedule of its learning rate, and the averaged weights, from settings."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR
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


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> LRScheduler:
    """Make the schedule of the learning rate, which takes one step per epoch."""
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, settings.epochs)
    if settings.schedule == "constant":
        return LambdaLR(optimizer, lambda epoch: 1.0)
    return StepLR(optimizer, settings.step_epochs, gamma=0.1)


def make_average(network: nn.Module, settings: TrainSettings) -> AveragedModel | None:
    """Make the moving average of the weights, or None where the settings ask for none.

    It starts with the weights after the first step.
    """
    if not settings.averaging:
        return None
    average = get_ema_multi_avg_fn(settings.averaging)
    return AveragedModel(network, multi_avg_fn=average, use_buffers=False)
