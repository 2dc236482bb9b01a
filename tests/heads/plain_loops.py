"""Layers on one vector at a time, for oracles that loop over images, regions and labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.heads.attention.layers import Attention, BoxPositions, FeedForward
from pipeline.heads.inputs import Inputs


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer on a vector, an output at a time."""
    outputs = [(row * x).sum() for row in layer.weight]
    return torch.stack(outputs) + (0 if layer.bias is None else layer.bias)


def softmax(numbers: list[Tensor]) -> list[Tensor]:
    powers = [number.exp() for number in numbers]
    return [power / sum(powers) for power in powers]


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    deviation = x - sum(x) / len(x)
    variance = sum(deviation**2) / len(x)
    return deviation / (variance + layer.eps) ** 0.5 * layer.weight + layer.bias


def feedforward(part: FeedForward, x: Tensor) -> Tensor:
    hidden = linear(part.first, x).clamp(min=0)
    return norm(part.norm, x + linear(part.second, hidden))


def attend(
    part: Attention, query: Tensor, keys: list[Tensor], values: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Attention of one query to real regions: what it finds, and its weights."""
    size = len(query) // part.heads
    query = linear(part.query, query)
    keys = [linear(part.key, key) for key in keys]
    values = [linear(part.value, value) for value in values]
    found, mean = [], [torch.zeros(()) for _ in keys]
    for head in range(part.heads):
        own = slice(head * size, (head + 1) * size)
        weights = softmax([query[own] @ key[own] / size**0.5 for key in keys])
        found.append(sum(w * value[own] for w, value in zip(weights, values, strict=True)))
        mean = [total + w / part.heads for total, w in zip(mean, weights, strict=True)]
    return linear(part.out, torch.cat(found)), mean


def position(part: BoxPositions, box: Tensor, inputs: Inputs) -> Tensor:
    if part.kind == "none":
        return torch.zeros(part.size, dtype=torch.float64)
    if part.kind == "mlp":
        standard = (box - inputs.box_mean) * inputs.box_scale
        return linear(part.second, linear(part.first, standard).clamp(min=0))
    left, top, right, bottom = box
    waves = []
    for t in ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top):
        for length in part.scales:
            waves += [(t * length).sin(), (t * length).cos()]
    return torch.stack(waves)
