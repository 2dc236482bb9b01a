"""The loss against equation (15).

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.learning.losses import matching_loss

few = settings(max_examples=25)


@st.composite
def losses(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], list[float], float]:
    """Draw logits (B, C), truth (B, C) with -1 for ignored, ratios (C,) and beta."""
    images, labels = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def table(value: st.SearchStrategy[Any]) -> Any:
        row = st.lists(value, min_size=labels, max_size=labels)
        return draw(st.lists(row, min_size=images, max_size=images))

    ratio = draw(st.lists(st.floats(0, 1), min_size=labels, max_size=labels))
    return (
        table(st.floats(-20, 20)),
        table(st.sampled_from([-1, 0, 1])),
        ratio,
        draw(st.sampled_from([0.0, 0.4, 2.0])),
    )


@few
@given(losses())
def test_loss_is_equation_15(
    drawn: tuple[list[list[float]], list[list[int]], list[float], float],
) -> None:
    logits, truth, ratio, beta = drawn
    total = 0.0
    for row, labels in zip(logits, truth, strict=True):
        for logit, y, r in zip(row, labels, ratio, strict=True):
            if y == -1:
                continue
            weight = y * math.exp(beta * (1 - r)) + (1 - y) * math.exp(beta * r)
            # log p and log(1 - p) of p = 1 / (1 + exp(-logit))
            log_p, log_q = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
            total -= weight * (y * log_p + (1 - y) * log_q)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    marks = torch.tensor(truth)
    loss = matching_loss(x, marks, torch.tensor(ratio, dtype=torch.float64), beta)
    assert loss.item() == pytest.approx(total / len(logits), rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, [x])
    assert torch.equal(gradient != 0, marks >= 0)


def test_loss_without_balance_is_the_mean_over_images_of_bce() -> None:
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.0], [-0.7, 4.0]])
    truth = torch.tensor([[1, 0], [0, 1], [1, 1]])
    expected = nn.functional.binary_cross_entropy_with_logits(
        logits, truth.float(), reduction="sum"
    )
    loss = matching_loss(logits, truth, torch.tensor([0.1, 0.9]), 0.0)
    assert loss.item() == pytest.approx(expected.item() / 3)


def test_positives_weigh_as_many_times_as_a_label_has_negatives_up_to_a_limit() -> None:
    """The labels have 1 negative for each positive, 3, 99, no negative, and no positive."""
    logits = torch.tensor([[0.3, -2.0, 1.5, 0.2, 0.1], [1.5, 0.0, -0.7, 4.0, -1.0]])
    truth = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, -1, 0]])
    ratio = torch.tensor([0.5, 0.25, 0.01, 1.0, 0.0])
    bce = nn.BCEWithLogitsLoss(
        reduction="none", pos_weight=torch.tensor([1.0, 3.0, 10.0, 1.0, 1.0])
    )
    expected = bce(logits, truth.float())[truth >= 0].sum().item() / 2
    loss = matching_loss(logits, truth, ratio, 0.0, largest_positive_weight=10.0)
    assert loss.item() == pytest.approx(expected)
    with_beta = matching_loss(logits[:, :1], truth[:, :1], ratio[:1], 2.0, 10.0)
    without = matching_loss(logits[:, :1], truth[:, :1], ratio[:1], 2.0)
    assert with_beta.item() == pytest.approx(without.item())


def test_extreme_logits_have_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 1e30]], requires_grad=True)
    loss = matching_loss(logits, torch.tensor([[0, 1, 1, 0, -1]]), torch.full((5,), 0.5), 0.4)
    assert loss.item() == pytest.approx(2e4 * math.exp(0.2))
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert gradient.isfinite().all()
    assert gradient[0, 4] == 0
