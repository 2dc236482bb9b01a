"""Tiny networks and batches for tests of the matching network.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from builders import make_instances
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching.network import GmMlic, Network, build_network, image_logits
from pipeline.learning.losses import matching_loss
from pipeline.settings import VARIANTS as CHANGES
from pipeline.settings import GmMlicSettings

D, W, H, M, C = 6, 5, 16, 4, 3  # with a smaller H whole layers die, and hide mistakes
VARIANTS: tuple[str, ...] = tuple(CHANGES)
GRAPHS: tuple[str, ...] = tuple(v for v in VARIANTS if v != "max-pool")
"""The variants that the reference computes."""

few = settings(max_examples=25)
seeds = st.integers(0, 10_000)


def network_settings(variant: str, **changes: Any) -> GmMlicSettings:
    """The settings of a variant, with changes."""
    own: Any = CHANGES[variant].get("network", {})
    return GmMlicSettings(**{**own, **changes})


def net(
    variant: str = "full",
    *,
    labels: int = C,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Network:
    """Make a tiny network in which no parameter or statistic has a value that hides its misuse."""
    config = network_settings(variant, **{"latent_size": H, "neighbors": 2, **changes})
    network = build_network(D, labels, W, config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[1] / 1.5))
            else:
                parameter.add_(0.4 * noise)
        for name, buffer in network.inputs.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
            buffer.copy_(0.3 * noise if name.endswith("mean") else 0.7 + noise.abs())
    return network


def matching_net(variant: str = "full", **changes: Any) -> GmMlic:
    """Make a tiny network of any variant but `max-pool`."""
    network = net(variant, **changes)
    assert isinstance(network, GmMlic)
    return network


def batch64(images: int = 3, **changes: Any) -> RegionBatch:
    """Make a batch in float64; changes are arguments of `make_instances`."""
    return make_instances(
        images, feature_size=D, dtype=torch.float64, **{"instances": M, **changes}
    )


def vectors(labels: int = C, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make random label vectors (C, W)."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(labels, W, generator=generator, dtype=torch.float64).to(dtype)


def select(batch: RegionBatch, images: Any, instances: Any) -> RegionBatch:
    """Index a batch by images and, in each, by instances."""
    return RegionBatch(
        batch.features[images][:, instances],
        batch.boxes[images][:, instances],
        batch.scores[images][:, instances],
        batch.classes[images][:, instances],
        batch.mask[images][:, instances],
    )


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert equal shapes and infinities, and finite values within the tolerance of the largest."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[~finite], expected[~finite])
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    difference = (actual[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0
    assert difference <= tolerance * scale + 1e-15, f"{difference} of {scale}"


def gradients(
    network: Network, logits: Tensor, truth: Tensor, ratio: Tensor
) -> dict[str, Tensor | None]:
    """Differentiate the loss that training uses, with class balance and ignored labels."""
    loss = matching_loss(image_logits(logits)[0], truth, ratio, beta=0.4)
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
