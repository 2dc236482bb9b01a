"""Comparison of a head with an oracle that computes one image after another with plain loops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import assert_close
from torch import Tensor

from pipeline.heads.contract import Head, LabelSet, RegionBatch

ImageScores = Callable[[Head, RegionBatch, int, LabelSet], tuple[Tensor, Tensor | None]]
"""(head, batch, image, labels) -> the image's logits (C,), and what its n real regions say (n, C)
or None."""


def check_against(head: Head, batch: RegionBatch, labels: LabelSet, oracle: ImageScores) -> None:
    """Compare logits, attributions, and the gradients of all parameters."""
    images = range(len(batch.mask))
    expected = [oracle(head, batch, image, labels) for image in images]
    output = head(batch, labels)
    assert_close(output.image, torch.stack([logits for logits, _ in expected]))
    for image, (_, of_regions) in zip(images, expected, strict=True):
        assert (of_regions is None) == (output.regions is None)
        if of_regions is not None and output.regions is not None:
            assert_close(output.regions[image][batch.mask[image]], of_regions)
    weights = torch.linspace(-1, 2, output.image.numel(), dtype=torch.float64)
    actual = _gradients(head, (output.image.flatten() * weights).sum())
    plain = torch.cat([logits for logits, _ in expected])
    for name, gradient in _gradients(head, (plain * weights).sum()).items():
        assert_close(actual[name], gradient)


def _gradients(head: Head, value: Tensor) -> dict[str, Tensor]:
    head.zero_grad()
    value.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in head.named_parameters()
        if parameter.grad is not None
    }


def real_regions(head: Head, batch: RegionBatch, image: int) -> list[Tensor]:
    """The standardised features of an image's real regions, (D,) each."""
    inputs = head.inputs
    return [
        (batch.features[image, m] - inputs.feature_mean) * inputs.feature_scale
        for m in range(batch.mask.shape[1])
        if batch.mask[image, m]
    ]


def whole_view(head: Head, batch: RegionBatch, image: int) -> Tensor:
    """The standardised vector (D,) of an image's whole view."""
    return (batch.of_whole()[image] - head.inputs.whole_mean) * head.inputs.whole_scale
