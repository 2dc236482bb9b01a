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
from tiny import make_batch
from torch import Tensor

CPU = torch.device("cpu")

SCORES = 0.03
"""Largest difference of a score, as a share of the largest score."""

GRADIENTS = 0.95
"""Smallest cosine between the gradients: in a small network, a ReLU that rounding turns counts."""


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
    expected = reference_logits(exact, batch, words)[batch.mask]
    with torch.autocast("cpu", torch.bfloat16):
        regions = score(half, batch.to(CPU, torch.float32), words.float()).regions
    assert regions is not None
    scores = regions[batch.mask].double()
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7))
    for logits in (scores, expected):
        (logits * weights).sum().backward()
    assert 0 < (scores - expected).abs().max() <= SCORES * expected.abs().max()
    assert torch.cosine_similarity(joined(half), joined(exact), dim=0) >= GRADIENTS
