"""The losses that a head can be trained with, on the logits of images.

Letters: B images, C labels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pipeline.heads.contract import HeadOutput
from pipeline.heads.layers import softmax_squared_loss
from pipeline.settings import (
    AsymmetricLoss,
    FocalLoss,
    Loss,
    SoftmaxSquaredLoss,
    WeightedLoss,
)


def compute_loss(output: HeadOutput, truth: Tensor, ratio: Tensor, loss: Loss) -> Tensor:
    """Compute the loss of a batch in float32: summed over labels and averaged over images.

    Args:
        output: of the head. If it brings a loss of its own, that is returned.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.
        ratio: (C,), the share of the training images that have the label.
        loss: which, and with which settings.

    Returns:
        a scalar.
    """
    if output.loss is not None:
        return output.loss.float()
    logits = output.image.float()
    match loss:
        case WeightedLoss():
            return matching_loss(logits, truth, ratio, loss.beta, loss.largest_positive_weight)
        case AsymmetricLoss():
            return asymmetric_loss(logits, truth, loss)
        case FocalLoss():
            return focal_loss(logits, truth, loss)
        case SoftmaxSquaredLoss():
            return softmax_squared_loss(logits, truth)
    raise AssertionError(
        "The head's settings say `own_loss`, but it returned no loss when it was given the truth."
    )


def matching_loss(
    logits: Tensor,
    truth: Tensor,
    ratio: Tensor,
    beta: float,
    largest_positive_weight: float = 1.0,
) -> Tensor:
    r"""Compute equation (15), summed over labels and averaged over images.

    It has the minus sign that the paper's print lacks:

    .. math:: -\frac1B \sum_i \sum_c w^c [y \log p + (1-y) \log(1-p)],\quad
              w^c = y v^c e^{\beta(1-r^c)} + (1-y) e^{\beta r^c}

    The paper has no :math:`v^c`, which is 1 by default. Otherwise it is the ``pos_weight`` of
    `torch.nn.BCEWithLogitsLoss`, :math:`(1-r^c)/r^c`, between 1 and ``largest_positive_weight``.
    Beta multiplies the positives of all rare labels by about the same, :math:`e^\beta`, and this
    those of a rarer label by more.

    Args:
        logits: (B, C), before the sigmoid.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.
        ratio: (C,), r^c, the share of the training images that have the label.
        beta: strength of the class balance; 0 gives the plain cross-entropy.
        largest_positive_weight: largest v^c.

    Returns:
        a scalar.
    """
    positive = truth == 1
    of_positives = torch.exp(beta * (1 - ratio))
    if largest_positive_weight > 1:
        of_positives = of_positives * (1 / ratio - 1).clamp(1, largest_positive_weight)
    weight = torch.where(positive, of_positives, torch.exp(beta * ratio))
    weight = weight.masked_fill(truth < 0, 0.0)
    loss = binary_cross_entropy_with_logits(
        logits, positive.to(logits.dtype), weight=weight, reduction="sum"
    )
    return loss / len(logits)


def asymmetric_loss(logits: Tensor, truth: Tensor, settings: AsymmetricLoss) -> Tensor:
    r"""Compute the asymmetric loss, summed over labels and averaged over images.

    .. math:: -\frac1B \sum_i \sum_c\, [y (1-p)^{\gamma_+} \log p
              + (1-y)\, p_m^{\gamma_-} \log(1-p_m)],\quad p_m = \max(p - m, 0)

    Equations (4) to (7) of Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV
    2021, where m is ``clip``. As in the authors' training code, the factors
    :math:`(1-p)^{\gamma_+}` and :math:`p_m^{\gamma_-}` are weights that carry no gradient.

    Args:
        logits: (B, C), before the sigmoid.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.
        settings: the two gammas, and ``clip``.

    Returns:
        a scalar.
    """
    positive = truth == 1
    log_clip = math.log(settings.clip) if settings.clip else -math.inf
    # log(1 - p_m) = min(log(1 - p + m), 0), which is finite for every logit.
    log_rest = torch.logaddexp(logsigmoid(-logits), logits.new_full((), log_clip)).clamp(max=0)
    entropy = -torch.where(positive, logsigmoid(logits), log_rest)
    p = logits.detach().sigmoid()
    weight = torch.where(
        positive,
        (1 - p) ** settings.positive_gamma,
        (p - settings.clip).clamp(min=0) ** settings.negative_gamma,
    )
    return (weight * entropy).masked_fill(truth < 0, 0.0).sum() / len(logits)


def focal_loss(logits: Tensor, truth: Tensor, settings: FocalLoss) -> Tensor:
    r"""Compute the focal loss, summed over labels and averaged over images.

    .. math:: -\frac1B \sum_i \sum_c\, \alpha_t (1-p_t)^\gamma \log p_t

    Equation (5) of Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017: :math:`p_t` is p
    for positives and 1 - p for negatives, and :math:`\alpha_t` likewise, or 1 without alpha.

    Args:
        logits: (B, C), before the sigmoid.
        truth: (B, C), 1 for positive, 0 for negative, -1 for ignored labels, which carry no loss.
        settings: gamma and alpha.

    Returns:
        a scalar.
    """
    positive = truth == 1
    right = torch.where(positive, logits, -logits)  # p_t = sigmoid(right)
    # A power of 1 - p_t would have an infinite gradient where p_t is 1 and gamma is below 1.
    loss = -torch.exp(settings.gamma * logsigmoid(-right)) * logsigmoid(right)
    if settings.alpha is not None:
        loss = torch.where(positive, settings.alpha * loss, (1 - settings.alpha) * loss)
    return loss.masked_fill(truth < 0, 0.0).sum() / len(logits)
