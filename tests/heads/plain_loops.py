"""Heads against oracles that compute one image after another with plain loops.

`check_against` compares. The rest is what such an oracle is made of: an image's inputs,
and layers on one vector at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import assert_same
from torch import Tensor, nn

from pipeline.heads.attention.layers import Attention, BoxPositions, FeedForward
from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.inputs import Inputs

ImageScores = Callable[[Head, RegionBatch, int, LabelSet], tuple[Tensor, Tensor | None]]
"""(head, batch, image, labels) -> the image's logits (C,), and what its n real regions say (n, C)
or None."""


def check_against(head: Head, batch: RegionBatch, labels: LabelSet, oracle: ImageScores) -> None:
    """Compare logits, attributions, and the gradients of all parameters."""
    images = range(len(batch.mask))
    expected = [oracle(head, batch, image, labels) for image in images]
    output = head(batch, labels)
    assert_same(output.image, torch.stack([logits for logits, _ in expected]))
    for image, (_, of_regions) in zip(images, expected, strict=True):
        assert (of_regions is None) == (output.regions is None)
        if of_regions is not None and output.regions is not None:
            assert_same(output.regions[image][batch.mask[image]], of_regions)
    weights = torch.linspace(-1, 2, output.image.numel(), dtype=torch.float64)
    actual = _gradients(head, (output.image.flatten() * weights).sum())
    plain = torch.cat([logits for logits, _ in expected])
    for name, gradient in _gradients(head, (plain * weights).sum()).items():
        assert_same(actual[name], gradient)


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


def lstm(cell: nn.LSTMCell, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step for a vector x and the state (h, c)."""
    h, c = state
    size = len(h)
    gates = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
    enter, forget, new, leave = (gates[n * size : (n + 1) * size] for n in range(4))
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(c), c


def log_probabilities(scores: Tensor) -> list[Tensor]:
    total = torch.log(sum((torch.exp(s) for s in scores), torch.zeros(())))
    return [s - total for s in scores]
