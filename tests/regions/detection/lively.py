"""A narrow detector with random weights that detects something, and views in which it does.

Batch norm statistics are taken from real activations and then disturbed, and predictors are scaled
so that scores spread over classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from benchmarks.extraction import enliven
from pipeline.regions.detector import build_model
from pipeline.settings import ArchitectureSettings

S = 128
CLASSES = 12
NARROW = ArchitectureSettings(
    width_per_group=4,
    fpn_channels=16,
    feature_size=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    proposals=300,
)


def soft_noise(images: int, size: int = S, seed: int = 0) -> Tensor:
    """Return (images, 3, size, size) in [0, 1]: random colours that change over 16 pixels."""
    coarse = torch.rand(images, 3, size // 16, size // 16, generator=generator(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturbed() -> Callable[..., None]:
    """For `enliven`: norms with disturbed statistics, and with weights and biases of their own."""
    random = generator(1)

    def disturb(norm: Any, inputs: tuple[Tensor]) -> None:
        channels = inputs[0].shape[1]
        spread = 0.8 + 0.4 * torch.rand(channels, generator=random)
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)) * spread)
        norm.running_var.copy_(inputs[0].var((0, 2, 3)) * spread.flip(0))
        norm.weight.copy_(0.8 + 0.4 * torch.rand(channels, generator=random))
        norm.bias.copy_(0.1 * torch.randn(channels, generator=random))

    return disturb


def narrow_model(norm: str = "frozen", *, threshold: float = 0.0, regions: int = 10) -> FasterRCNN:
    torch.manual_seed(0)
    model = build_model(
        NARROW.model_copy(update={"norm": norm}),
        CLASSES,
        size=S,
        regions=regions,
        score_threshold=threshold,
        nms_threshold=0.5,
    ).eval()
    views = torch.cat([soft_noise(2), torch.rand(2, 3, S, S, generator=generator(0))])
    enliven(model, views, disturbed())
    return model
