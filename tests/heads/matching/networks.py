"""Tiny networks and batches for tests of the matching network.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tiny import C, D, W, make_label_set, perturb
from torch import Tensor

from pipeline.heads.contract import HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.matching.network import GmMlic
from pipeline.learning.losses import matching_loss
from pipeline.settings import GmMlicSettings, variant_changes
from pipeline.settings.heads import HEADS

H = 16
"""With a smaller size whole layers die, and hide mistakes."""
VARIANTS: tuple[str, ...] = (*HEADS["gm-mlic"].variants, *HEADS["gm-mlic"].further)
"""The paper's network and its ablations."""

few = settings(max_examples=25)
seeds = st.integers(0, 10_000)


def network_settings(variant: str, **changes: Any) -> GmMlicSettings:
    """The settings of a variant, with changes."""
    return GmMlicSettings(**{**variant_changes(variant)["network"], **changes})


def net(
    variant: str = "full",
    *,
    labels: int = C,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> GmMlic:
    """Make a tiny network in which no parameter or statistic has a value that hides its misuse."""
    config = network_settings(variant, **{"latent_size": H, "neighbors": 2, **changes})
    network = GmMlic(HeadSizes(D, labels, W, 1), config).to(dtype)
    perturb(network, seed)
    return network


def vectors(labels: int = C, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make random label vectors (C, W)."""
    return make_label_set(labels, seed=seed, dtype=dtype).vectors


def score(network: GmMlic, batch: RegionBatch, words: Tensor, **parts: bool) -> HeadOutput:
    """Score a batch for labels with these vectors (C, W), of which nothing else is known."""
    unknown = words.new_full((len(words),), torch.nan)
    return network(batch, LabelSet(words, unknown), **parts)


def gradients(
    network: GmMlic, image: Tensor, truth: Tensor, ratio: Tensor
) -> dict[str, Tensor | None]:
    """Differentiate the loss that training uses, with class balance and ignored labels.

    Args:
        image: (B, C) logits of the images.
    """
    loss = matching_loss(image, truth, ratio, beta=0.4)
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
