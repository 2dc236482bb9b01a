"""The losses that a head can be trained with, on the logits of images.

Letters: B images, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pipeline.heads.contract import HeadOutput
from pipeline.settings import Loss, WeightedLoss


def compute_loss(output: HeadOutput, truth: Tensor, ratio: Tensor, loss: Loss) -> Tensor:
    """Compute the loss of a batch in float32: summed over labels and averaged over images.

    Args:
        output: of the head.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.
        ratio: (C,), the share of the training images that have the label.
        loss: which, and with which settings.

    Returns:
        a scalar.
    """
    if output.loss is not None:
        return output.loss.float()
    logits = output.image.float()
    assert isinstance(loss, WeightedLoss)
    return matching_loss(logits, truth, ratio, loss.beta)


def matching_loss(logits: Tensor, truth: Tensor, ratio: Tensor, beta: float) -> Tensor:
    r"""Compute equation (15), summed over labels and averaged over images.

    It has the minus sign that the paper's print lacks:

    .. math:: -\frac1B \sum_i \sum_c w^c [y \log p + (1-y) \log(1-p)],\quad
              w^c = y e^{\beta(1-r^c)} + (1-y) e^{\beta r^c}

    Args:
        logits: (B, C), before the sigmoid.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.
        ratio: (C,), r^c, the share of the training images that have the label.
        beta: strength of the class balance; 0 gives the plain cross-entropy.

    Returns:
        a scalar.
    """
    positive = truth == 1
    weight = torch.where(positive, torch.exp(beta * (1 - ratio)), torch.exp(beta * ratio))
    weight = weight.masked_fill(truth < 0, 0.0)
    loss = binary_cross_entropy_with_logits(
        logits, positive.to(logits.dtype), weight=weight, reduction="sum"
    )
    return loss / len(logits)
