"""The network under autocast to bfloat16, near the edge-by-edge reference in float64.

bfloat16 has 8 significant bits, so each rounding changes a number by up to 0.4 %.

Letters: B images, C labels.
"""

from __future__ import annotations

import copy

import pytest
import torch
from networks import VARIANTS, net, score, vectors
from reference import reference_logits
from tiny import C, make_batch
from torch import Tensor

CPU = torch.device("cpu")

SCORES = 0.03
"""Largest difference of a score, as a share of the largest score."""

GRADIENTS = 0.15
"""Largest norm of the difference of all gradients, as a share of their norm: a ReLU or a max that
rounding turns changes a whole summand."""


def joined(network: torch.nn.Module) -> Tensor:
    """The gradients of all parameters in one vector."""
    return torch.cat(
        [p.grad.double().flatten() for p in network.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_near_the_reference(variant: str) -> None:
    exact = net(variant)
    half = copy.deepcopy(exact).float()
    batch, words = make_batch(4), vectors()
    weights = torch.randn(4, C, generator=torch.Generator().manual_seed(7))
    expected = reference_logits(exact, batch, words).amax(dim=1)
    (expected * weights).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(half, batch.to(CPU, torch.float32), words.float()).image
    (scores.float() * weights).sum().backward()
    difference = (scores.double() - expected).abs().max() / expected.abs().max()
    assert 0 < difference <= SCORES
    of_half, of_exact = joined(half), joined(exact)
    assert (of_half - of_exact).norm() <= GRADIENTS * of_exact.norm()
