"""A narrow detector with random weights that detects something, and views in which it does.

Batch norm statistics are taken from real activations and then disturbed, and predictors are scaled
so that scores spread over classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

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


@torch.no_grad()
def enliven(model: FasterRCNN, views: Tensor) -> None:
    """Give ``model`` weights with which it detects several classes, with scores from 0 to 1."""
    random = generator(1)
    seen: set[nn.Module] = set()

    def set_norm(norm: Any, inputs: tuple[Tensor]) -> None:
        channels = inputs[0].shape[1]
        spread = 0.8 + 0.4 * torch.rand(channels, generator=random)
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)) * spread)
        norm.running_var.copy_(inputs[0].var((0, 2, 3)) * spread.flip(0))
        norm.weight.copy_(0.8 + 0.4 * torch.rand(channels, generator=random))
        norm.bias.copy_(0.1 * torch.randn(channels, generator=random))

    def spread_to(deviation: float) -> Any:
        """Return a hook that gives a layer's outputs a mean of 0 and this standard deviation: each
        unit of a linear layer on its own, all of a convolution together."""

        def spread(module: Any, _: Any, output: Tensor) -> Tensor:
            if module in seen:
                return output
            seen.add(module)
            axis = 0 if output.ndim == 2 else None
            mean, factor = output.mean(axis), deviation / output.std(axis)
            module.weight.mul_(factor[:, None] if output.ndim == 2 else factor)
            module.bias.sub_(mean).mul_(factor)
            return (output - mean) * factor

        return spread

    heads = model.roi_heads
    hooks = [
        module.register_forward_pre_hook(set_norm)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)
    ]
    for module, deviation in (
        (model.rpn.head.cls_logits, 2.0),
        (model.rpn.head.bbox_pred, 0.3),
        (heads.box_head.fc6, 1.0),
        (heads.box_head.fc7, 1.0),
        (heads.box_predictor.cls_score, 1.2),
        (heads.box_predictor.bbox_pred, 0.5),
    ):
        hooks.append(module.register_forward_hook(spread_to(deviation)))
    model(list(views))
    for hook in hooks:
        hook.remove()


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
    enliven(model, torch.cat([soft_noise(2), torch.rand(2, 3, S, S, generator=generator(0))]))
    return model
