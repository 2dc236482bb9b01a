"""Test images for the page to show: small pictures, regions, and what networks say of them.

Letters: N images, M regions of an image, C labels, T best labels of a region, H size of a label's
node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import GmpipeError
from pipeline.learning.batches import Feed
from pipeline.learning.splits import SplitData
from pipeline.learning.training import Network
from pipeline.matching.network import MatchingNetwork, image_logits
from pipeline.regions.transforms import load_image

BEST_LABELS = 5
"""T: labels that are kept of a region."""

LONGEST_SIDE = 400
"""Of a picture, in pixels; smaller photographs stay as they are."""

_QUALITY = 82  # of JPEG: smaller files, and at this size no difference to see
_BATCH = 64


def chosen_places(images: int, wanted: int) -> NDArray[np.int64]:
    """Places of the images to show: all of them, or a random sample, the same each time."""
    if images <= wanted:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).choice(images, wanted, replace=False))


def write_pictures(
    photographs: Sequence[Path],
    folder: Path,
    *,
    threads: int,
    on_images: Callable[[int], None] = lambda images: None,
) -> NDArray[np.int32]:
    """Write a small JPEG of each photograph: <folder>/<place>.jpg.

    Args:
        photographs: N files.
        threads: photographs decoded at once.
        on_images: called after each photograph with 1.

    Returns:
        (N, 2) width and height of each picture; 0 where the photograph is missing or broken, and
        then there is none.
    """
    folder.mkdir()

    def shrink(place: int) -> tuple[int, int]:
        try:
            image = load_image(photographs[place])
        except GmpipeError:
            return 0, 0
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        image.save(folder / f"{place}.jpg", quality=_QUALITY)
        return image.size

    sizes = np.zeros((len(photographs), 2), np.int32)
    with ThreadPoolExecutor(threads) as pool:
        for place, size in enumerate(pool.map(shrink, range(len(photographs)))):
            sizes[place] = size
            on_images(1)
    return sizes


@dataclass(frozen=True)
class ShownRegions:
    """The regions of N images, as the cache has them.

    Attributes:
        boxes: (N, M, 4) float32, xyxy in [0,1] of the image.
        scores: (N, M) float32, the detector's, descending.
        classes: (N, M) int16, the detector's class numbers.
        count: (N,) int16, how many are real.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int16]
    count: NDArray[np.int16]


def read_regions(split: SplitData) -> ShownRegions:
    """The regions of a split's images in view 0."""
    parts = [split.instances(images) for images in _batches(len(split))]
    boxes, scores, classes, mask = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("boxes", "scores", "classes", "mask")
    )
    count = mask.sum(dim=1).numpy().astype(np.int16)
    return ShownRegions(boxes.numpy(), scores.numpy(), classes.numpy(), count)


def _batches(images: int) -> list[NDArray[np.int64]]:
    return [np.arange(at, min(at + _BATCH, images)) for at in range(0, images, _BATCH)]


@dataclass(frozen=True)
class ShownScores:
    """What one network says of N images, and of each of their regions.

    Attributes:
        scores: (N, C) float32, probabilities of the image.
        winners: (N, C) int16, the region that won each label's max (14).
        region_labels: (N, M, T) int16, the best labels of a region, best first; M as the network
            uses them, padding has labels too.
        region_scores: (N, M, T) float32, their probabilities for the region alone; 0 for padding.
    """

    scores: NDArray[np.float32]
    winners: NDArray[np.int16]
    region_labels: NDArray[np.int16]
    region_scores: NDArray[np.float32]


@torch.inference_mode()
def region_scores(
    network: Network,
    split: SplitData,
    label_vectors: Tensor,
    on_images: Callable[[int], None] = lambda images: None,
) -> ShownScores:
    """Run a network, in eval mode, on a split in view 0.

    Args:
        label_vectors: (C, W).
        on_images: called after each batch with its number of images.
    """
    found: list[tuple[Tensor, ...]] = []
    best = min(BEST_LABELS, len(label_vectors))
    with closing(Feed(split, label_vectors.device, once=True).in_order(_BATCH)) as batches:
        for instances, _ in batches:
            logits = network(instances, label_vectors)
            of_image, winners = image_logits(logits)
            top: Any = logits.topk(best, dim=-1)
            found.append((of_image.sigmoid(), winners, top.indices, top.values.sigmoid()))
            on_images(len(logits))
    scores, winning, labels, values = (
        torch.cat(parts).numpy() for parts in zip(*found, strict=True)
    )
    return ShownScores(scores, winning.astype(np.int16), labels.astype(np.int16), values)


@torch.inference_mode()
def mean_label_nodes(
    network: MatchingNetwork, split: SplitData, label_vectors: Tensor
) -> NDArray[np.float32]:
    """(C, H): the nodes of the labels after the last convolution module, mean over the images.

    Args:
        network: in eval mode.
        split: N images, taken in view 0.
        label_vectors: (C, W).
    """
    total = torch.zeros((), dtype=torch.float64)
    with closing(Feed(split, label_vectors.device, once=True).in_order(_BATCH)) as batches:
        for instances, _ in batches:
            total = total + network.label_nodes(instances, label_vectors).double().sum(dim=0)
    mean: NDArray[np.float32] = (total / len(split)).float().numpy()
    return mean
