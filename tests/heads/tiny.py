"""Tiny heads and batches for tests of all heads.

Letters: B images, M regions, C labels, D feature size, W vector size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
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
        if name == "projection_size" and network.get(name):
            network[name] = HIDDEN
        if name == "steps" and kind.own_loss:
            network[name] = C + 1  # all labels, and END
    return kind.model_validate({**network, **changes})


def make_batch(
    images: int = 3,
    regions: int = M,
    *,
    counts: Sequence[int] | None = None,
    features: int = D,
    whole: bool = True,
    full: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> RegionBatch:
    """A batch of B = ``images`` images with M = ``regions`` regions; padding is zero and last.

    Without ``counts`` the images have M, 1, M - 1, then M, 1, M - 1, ... real regions, or all of
    them if ``full``. Without ``whole`` they have no whole view; everything else stays the same.

    Centres and scores come from a few values, so that there are ties. Boxes and scores are small
    multiples of powers of two, so that ties are exact in any precision. In an image of two or more
    regions, the last real one has the centre and the score of the first, in another box.
    Regions that agree in box, score and class are the same region, and have the same feature.
    """
    rng = np.random.default_rng([seed, images, regions])
    if full:
        counts = [regions] * images
    elif counts is None:
        counts = [max(1, (regions, 1, regions - 1)[image % 3]) for image in range(images)]
    centers = rng.integers(3, 6, (images, regions, 2)) / 8
    halves = rng.integers(1, 4, (images, regions, 2)) / 16
    scores = rng.integers(1, 4, (images, regions)) / 4
    classes = rng.choice([1, 2, CLASSES - 1], (images, regions))
    values = rng.normal(size=(images, regions, features))
    for image, count in enumerate(counts):
        last = count - 1
        if last > 0:
            centers[image, last], scores[image, last] = centers[image, 0], scores[image, 0]
            halves[image, last] = halves[image, 0] + 1 / 32
        known: dict[tuple[float, ...], int] = {}
        for index in range(count):
            key = (*centers[image, index], *halves[image, index], scores[image, index])
            first = known.setdefault((*key, classes[image, index]), index)
            values[image, index] = values[image, first]
    real = np.arange(regions) < np.array(counts)[:, None]  # (B, M)
    boxes = np.concatenate([centers - halves, centers + halves], axis=-1)
    views = rng.normal(size=(images, features))
    return RegionBatch(
        features=torch.tensor(values * real[..., None], dtype=dtype),
        boxes=torch.tensor(boxes * real[..., None], dtype=dtype),
        scores=torch.tensor(scores * real, dtype=dtype),
        classes=torch.tensor(classes * real),
        mask=torch.tensor(real),
        whole=torch.tensor(views, dtype=dtype) if whole else None,
    )


def make_label_set(
    labels: int = C,
    *,
    size: int = W,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LabelSet:
    """What is known of C = ``labels`` labels, counted on 20 images.

    Every label has at least one of these images, and none has all.
    """
    rng = np.random.default_rng([seed, labels, 7])
    vectors = rng.normal(size=(labels, size))
    truth = rng.random((20, labels)) < rng.uniform(0.2, 0.7, labels)
    truth[0], truth[1] = True, False
    ratio = truth.mean(axis=0)
    together = (truth[:, :, None] & truth[:, None]).sum(axis=0) / truth.sum(axis=0)[:, None]
    together[np.arange(labels), np.arange(labels)] = 0
    return LabelSet(
        torch.tensor(vectors, dtype=dtype),
        torch.tensor(ratio, dtype=dtype),
        torch.tensor(together, dtype=dtype),
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


def perturb(head: Head, seed: int = 0) -> None:
    """Give no parameter and no statistic of the inputs a value that hides its misuse."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter.copy_(noise(parameter) / math.sqrt(parameter.shape[1] / 1.5))
            else:
                parameter.add_(0.4 * noise(parameter))
        for name, buffer in head.inputs.named_buffers():
            if name.endswith("mean"):
                buffer.copy_(0.3 * noise(buffer))
            elif name.endswith("scale"):
                buffer.copy_(0.7 + noise(buffer).abs())


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


def select(batch: RegionBatch, images: Any, regions: Any) -> RegionBatch:
    """Index a batch by images and, in each, by regions."""
    of_regions = replace(batch, whole=None).each(lambda x: x[images][:, regions])
    whole = None if batch.whole is None else batch.whole[images]
    return replace(of_regions, whole=whole)


def with_garbage(batch: RegionBatch) -> RegionBatch:
    """The same images with two more regions of padding at the end; all padding is garbage."""
    images, regions = batch.mask.shape
    wide = select(batch, slice(images), [*range(regions), 0, 0])
    wide.mask[:, regions:] = False
    padding = ~wide.mask
    wide.features[padding] = 1e6
    wide.boxes[padding] = torch.tensor([0.4, -7.0, 0.6, 9.0], dtype=wide.boxes.dtype)
    wide.scores[padding] = 99.0
    wide.classes[padding] = -5
    return wide


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Assert equal shapes, types and infinities.

    Finite values must be equal within the tolerance, times the largest of them.
    """
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[~finite], expected[~finite])
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    difference = (actual[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0
    assert difference <= tolerance * scale + 1e-15, f"{difference} of {scale}"


def outputs_alike(one: HeadOutput, other: HeadOutput, tolerance: float = 1e-9) -> None:
    """Compare what two calls say about the same images, as far as both have it."""
    assert_same(one.image, other.image, tolerance)
    assert (one.regions is None) == (other.regions is None)
    if one.regions is not None and other.regions is not None:
        assert_same(one.regions, other.regions, tolerance)
