"""Tiny heads and batches for tests of all heads.

Letters: B images, M regions, C labels, D feature size, W vector size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.heads.building import build_head, head_class
from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.inputs import InputStatistics
from pipeline.settings import HeadSettings, settings_class, variant_changes

D, W, M, C, CLASSES = 6, 5, 4, 3, 7
HIDDEN = 16
"""Size of what a head calls `hidden_size`, `latent_size` or `embedding_size`."""


def head_settings(variant: str, **changes: Any) -> HeadSettings:
    """The settings of a built-in variant's head, with small sizes and without dropout."""
    network: dict[str, Any] = dict(variant_changes(variant)["network"])
    kind = settings_class(network["head"])
    for name in kind.model_fields:
        if name.endswith("dropout"):
            network[name] = 0.0
        if name in ("hidden_size", "latent_size", "embedding_size"):
            network[name] = HIDDEN
        if name == "steps" and kind.own_loss:
            network[name] = C + 1  # all labels, and END
    return kind.model_validate({**network, **changes})


def make_batch(
    images: int = 3,
    regions: int = M,
    *,
    seed: int = 0,
    whole: bool = True,
    full: bool = False,
    dtype: torch.dtype = torch.float64,
) -> RegionBatch:
    """Random regions; image n has n % M + 1 real ones, or all of them if ``full``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    corners = random(images, regions, 2, 2).sort(dim=2).values.flatten(2)
    count = torch.full((images,), regions) if full else torch.arange(images) % regions + 1
    mask = torch.arange(regions) < count[:, None]
    batch = RegionBatch(
        features=2 * random(images, regions, D) - 1,
        boxes=corners,
        scores=random(images, regions).sort(dim=1, descending=True).values,
        classes=torch.randint(1, CLASSES, (images, regions), generator=generator),
        mask=mask,
        whole=2 * random(images, D) - 1 if whole else None,
    )
    floats = batch.to(torch.device("cpu"), dtype)
    return RegionBatch(
        features=floats.features * mask[..., None],
        boxes=floats.boxes * mask[..., None],
        scores=floats.scores * mask,
        classes=floats.classes * mask,
        mask=mask,
        whole=floats.whole,
    )


def make_label_set(
    labels: int = C, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LabelSet:
    """Random vectors, shares and co-occurrence."""
    generator = torch.Generator().manual_seed(seed + 1)
    conditional = torch.rand(labels, labels, generator=generator, dtype=torch.float64)
    return LabelSet(
        torch.randn(labels, W, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(labels, generator=generator, dtype=torch.float64).to(dtype),
        conditional.fill_diagonal_(0).to(dtype),
    )


def make_truth(images: int = 3, labels: int = C, *, seed: int = 0) -> Tensor:
    """(B, C) in {1, 0, -1}; every image has a positive label."""
    generator = torch.Generator().manual_seed(seed + 2)
    truth = torch.randint(-1, 2, (images, labels), generator=generator)
    truth[torch.arange(images), torch.arange(images) % labels] = 1
    return truth


def make_statistics(*, seed: int = 0) -> InputStatistics:
    """Statistics that are neither 0 nor 1, so that no head can do without them."""
    generator = torch.Generator().manual_seed(seed + 3)
    means = [0.3 * torch.randn(size, generator=generator) for size in (D, 4, D)]
    deviations = [0.7 + torch.rand(size, generator=generator) for size in (D, 4, D)]
    pairs = [value for pair in zip(means, deviations, strict=True) for value in pair]
    return InputStatistics(*pairs, classes=CLASSES)


def make_head(
    variant: str,
    *,
    labels: int = C,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    label_set: LabelSet | None = None,
    **changes: Any,
) -> Head:
    """A tiny head of a built-in variant, started, in eval mode.

    No parameter has a value that hides its misuse: biases, for example, are not 0.
    """
    torch.manual_seed(seed)
    sizes = HeadSizes(features=D, labels=labels, vectors=W, classes=CLASSES)
    head = build_head(sizes, head_settings(variant, **changes))
    known = label_set or make_label_set(labels, dtype=torch.float32)
    head.start(make_statistics(), known)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return head.to(dtype).eval()


def needs_whole(variant: str) -> bool:
    """Whether the head of a variant reads the vector of the whole view."""
    return head_settings(variant).needs_whole


def attribution_of(variant: str) -> str | None:
    """What the head of a variant says of regions."""
    return head_class(head_settings(variant).head).attribution


def permuted(batch: RegionBatch, order: Tensor) -> RegionBatch:
    """The same images with their regions in another order (B, M)."""
    picked = {
        name: getattr(batch, name)[torch.arange(len(order))[:, None], order]
        for name in ("features", "boxes", "scores", "classes", "mask")
    }
    return RegionBatch(**picked, whole=batch.whole)


def padded(batch: RegionBatch, regions: int) -> RegionBatch:
    """The same images with room for more regions, all of it padding."""

    def longer(values: Tensor) -> Tensor:
        room = values.new_zeros(len(values), regions, *values.shape[2:])
        return torch.cat([values, room], dim=1)

    named = {
        name: longer(getattr(batch, name))
        for name in ("features", "boxes", "scores", "classes", "mask")
    }
    return RegionBatch(**named, whole=batch.whole)


def images_of(batch: RegionBatch, chosen: slice) -> RegionBatch:
    """Some images of a batch."""
    return batch.each(lambda x: x[chosen])


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def outputs_alike(one: HeadOutput, other: HeadOutput, tolerance: float = 1e-9) -> None:
    """Compare what two calls say about the same images, as far as both have it."""
    assert_close(one.image, other.image, tolerance)
    assert (one.regions is None) == (other.regions is None)
    if one.regions is not None and other.regions is not None:
        assert_close(one.regions, other.regions, tolerance)
