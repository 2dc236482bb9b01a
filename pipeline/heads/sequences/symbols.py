"""What heads share that predict labels one after another, until they predict the symbol END.

Letters: B images, T steps, C labels. The symbols are the C labels, and END, whose number is C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from pipeline.heads.layers import at_least_float32


def mask_ignored(scores: Tensor, truth: Tensor) -> Tensor:
    """Make it impossible to predict an ignored label.

    Args:
        scores: (B, ..., C + 1), of the symbols.
        truth: (B, C) in {1, 0, -1}; -1 means ignored.

    Returns:
        (B, ..., C + 1), with -inf for ignored labels.
    """
    ignored = pad(truth < 0, (0, 1))
    return scores.masked_fill(ignored.view(len(truth), *(1,) * (scores.dim() - 2), -1), -torch.inf)


def sequence_loss(scores: Tensor, targets: Tensor, truth: Tensor) -> Tensor:
    """The cross-entropy of the symbols, summed over the steps and averaged over the images.

    Args:
        scores: (B, T, C + 1).
        targets: (B, T) int64, the symbol of each step; -1 for steps that carry no loss.
        truth: (B, C) in {1, 0, -1}. Ignored labels take no part in the softmax.

    Returns:
        a scalar.
    """
    possible = at_least_float32(mask_ignored(scores, truth)).transpose(1, 2)
    return cross_entropy(possible, targets, ignore_index=-1, reduction="sum") / len(scores)


def log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p), given log p; at least log(1e-12)."""
    return (-torch.expm1(log_p)).clamp(min=1e-12).log()
