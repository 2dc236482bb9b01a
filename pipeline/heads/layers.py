"""Layers, and parts of losses, that several heads are made of.

Letters: B images, M regions, C labels.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn


def scaled_linear(inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = True) -> nn.Linear:
    """A linear layer that preserves the second moment of its input at initialisation.

    Weights have the variance gain / inputs, and biases are 0. PyTorch's default shrinks a signal at
    every layer.

    Args:
        inputs, outputs: sizes.
        gain: 1 for an input with mean 0; 2 (He) for one that comes from a ReLU.
        bias: whether the layer has one.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=math.sqrt(gain / inputs))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts with 0, for heads that are nothing but one.

    Random weights would add noise to the logits, which weight decay takes long to remove from the
    directions in which the features hardly vary.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, typed."""
    return cast(Tensor, layer(x))


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Max over the real regions: (B, M, ...), (B, M) -> (B, ...)."""
    shape = mask.shape + (1,) * (values.dim() - 2)
    return values.masked_fill(~mask.view(shape), -torch.inf).amax(dim=1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real regions: (B, M, N), (B, M) -> (B, N)."""
    weights = mask.to(values.dtype) / mask.sum(dim=1, keepdim=True)
    return (values * weights[..., None]).sum(dim=1)


def masked_softmax(values: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the real regions: (B, M, C), (B, M) -> (B, M, C); 0 for padding."""
    return values.masked_fill(~mask[..., None], -torch.inf).softmax(dim=1)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert values to float32 if their precision is less: losses are not computed in bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def softmax_squared_loss(logits: Tensor, truth: Tensor) -> Tensor:
    r"""Compute the squared loss of HCP, summed over labels and averaged over images.

    .. math:: \frac1B \sum_i \sum_c \left(p_c - \frac{y_c}{\sum_k y_k}\right)^2,\quad
              p = \mathrm{softmax}(v)

    From Wei et al., "HCP: A Flexible CNN Framework for Multi-Label Image Classification", TPAMI
    2016; written from memory of the paper, whose text was not at hand. The softmax is over the
    labels that are not ignored. An image without a positive label has no target, and carries no
    loss.

    Args:
        logits: (B, C), v.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.

    Returns:
        a scalar, at least float32.
    """
    logits = at_least_float32(logits)
    positive = (truth == 1).to(logits.dtype)
    count = positive.sum(dim=1, keepdim=True)
    ignored = truth < 0
    # Not -inf: all labels of an image may be ignored.
    p = logits.masked_fill(ignored, torch.finfo(logits.dtype).min).softmax(dim=1)
    error = (p - positive / count.clamp(min=1)).square()
    return error.masked_fill(ignored | (count == 0), 0).sum() / len(logits)
