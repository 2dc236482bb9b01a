"""Batches of a split, prepared so that no training step waits for one.

Letters: N images of the split, V views of an image, B images of a batch, M instances, C labels,
D feature size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.ahead import ahead
from pipeline.heads.contract import RegionBatch
from pipeline.heads.inputs import InputStatistics
from pipeline.learning.splits import SplitData
from pipeline.machine import available_memory

Chosen = tuple[np.ndarray, np.ndarray | int]
"""Indices of B images in the split, and the view to take of each (or one view for all)."""

Batch = tuple[RegionBatch, Tensor]
"""Instances with float32 features, and (B, C) int8 truth, both on the computing device."""

_LARGEST_SHARE = 0.5  # of the free memory, for regions that are kept in it
_CHUNK_BYTES = 2**26  # of the features that are read at once to fill memory or for statistics


class Feed:
    """Batches of a split on a device; the caller decides which images, in which order.

    Regions that fit in half of the free memory are read once, as they are stored, into the memory
    of the device or else of the machine, and batches are picked from there. Otherwise they are
    gathered from the shards. Unless the regions are on the device already, a background thread
    prepares a few batches ahead of the current one. The same images give the same numbers in every
    case.

    Args:
        split: the images.
        device: that computes on the batches.
        sharers: number of processes that keep regions in this machine's memory.
        once: each image is read only once, so that keeping it in memory gains nothing.
    """

    def __init__(
        self, split: SplitData, device: torch.device, *, sharers: int = 1, once: bool = False
    ) -> None:
        self.split = split
        self.device = device
        self._truth = torch.from_numpy(split.truth)
        self._in_memory: RegionBatch | None = None
        if once:
            return
        size = split.rows.size * _row_bytes(split)
        if device.type == "cuda" and size <= _LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._in_memory = _read_all(split, device)
            self._truth = self._truth.to(device)
        elif size <= _LARGEST_SHARE * available_memory() / sharers:
            self._in_memory = _read_all(split, torch.device("cpu"))

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.split)

    def batches(self, chosen: Iterable[Chosen]) -> Generator[Batch]:
        """Yield one batch per choice, in order. Close the generator unless you exhaust it.

        Raises:
            DamagedError: as `RegionCache.gather`, in place of the batch with the damaged row.
        """
        if self._in_memory is not None and self._in_memory.mask.is_cuda:
            for images, views in chosen:
                yield self._ready(*self._pick(images, views))
            return
        prepared = ahead(lambda choice: self._prepare(*choice), chosen)
        try:
            for batch in prepared:
                yield batch if self.device.type == "cpu" else self._ready(*batch)
        finally:
            prepared.close()

    def in_order(self, size: int) -> Generator[Batch]:
        """Yield view 0 of all images in the split's order, ``size`` images per batch."""
        starts = range(0, len(self), size)
        return self.batches((np.arange(start, min(start + size, len(self))), 0) for start in starts)

    def _pick(self, images: np.ndarray, views: np.ndarray | int) -> Batch:
        assert self._in_memory is not None
        rows = self._indices(images * self.split.rows.shape[1] + views)
        truth = self._truth[self._indices(images)]
        # Not index_select, which takes several hundred times as long for float16 on the CPU.
        return self._in_memory.each(lambda x: x[rows]), truth

    def _indices(self, indices: np.ndarray) -> Tensor:
        """Copy indices to where the regions are kept, without waiting for it."""
        assert self._in_memory is not None
        kept = torch.from_numpy(indices)
        if not self._in_memory.mask.is_cuda:
            return kept
        return kept.pin_memory().to(self.device, non_blocking=True)

    def _prepare(self, images: np.ndarray, views: np.ndarray | int) -> Batch:
        if self._in_memory is not None:
            instances, truth = self._pick(images, views)
        else:
            instances = self.split.instances(images, views)
            truth = self._truth[torch.from_numpy(images)]
        if self.device.type == "cpu":
            return self._ready(instances, truth)
        return instances.each(Tensor.pin_memory), truth.pin_memory()

    def _ready(self, instances: RegionBatch, truth: Tensor) -> Batch:
        # Converted to float32 after the move, so that half as many bytes are moved.
        moved = instances.each(lambda x: x.to(self.device, non_blocking=True))
        return (
            moved.to(self.device, torch.float32),
            truth.to(self.device, non_blocking=True),
        )


def _row_bytes(split: SplitData) -> int:
    """Bytes that `_read_all` uses per row."""
    row = split.instances(np.zeros(1, dtype=np.int64))
    return sum(tensor.nbytes for tensor in row.tensors().values())


def _chunk(split: SplitData) -> int:
    """Number of images whose vectors, in float64, take `_CHUNK_BYTES`; at least one."""
    vectors = split.regions + split.cache.has_whole
    return max(1, _CHUNK_BYTES // (8 * vectors * split.cache.feature_size))


def _read_all(split: SplitData, device: torch.device) -> RegionBatch:
    """Read all views of all images: row n * V + v is view v of image n."""
    images, views = (indices.ravel() for indices in np.indices(split.rows.shape))
    in_memory: RegionBatch | None = None
    size = _chunk(split)
    for start in range(0, len(images), size):
        chunk = slice(start, start + size)
        part = split.instances(images[chunk], views[chunk])
        if in_memory is None:
            in_memory = part.each(lambda x: x.new_empty(len(images), *x.shape[1:], device=device))
        for name, tensor in part.tensors().items():
            getattr(in_memory, name)[chunk] = tensor.to(device)
    assert in_memory is not None  # a split has at least one image
    return in_memory


def input_statistics(feed: Feed) -> InputStatistics:
    """Compute statistics in one pass over a split, in float64; the results are on the CPU.

    The images that are read at once are bounded by their size in memory.
    """
    moments = {name: _Moments() for name in ("features", "boxes", "whole")}
    classes = 0
    for batch, _ in feed.in_order(_chunk(feed.split)):
        moments["features"].add(batch.features[batch.mask])
        moments["boxes"].add(batch.boxes[batch.mask])
        if batch.whole is not None:
            moments["whole"].add(batch.whole)
        classes = max(classes, int(batch.classes.max()) + 1)
    feature_mean, feature_std = moments["features"].mean_and_deviation()
    box_mean, box_std = moments["boxes"].mean_and_deviation()
    whole_mean = whole_std = None
    if moments["whole"].count:
        whole_mean, whole_std = moments["whole"].mean_and_deviation()
    return InputStatistics(
        feature_mean, feature_std, box_mean, box_std, whole_mean, whole_std, classes
    )


class _Moments:
    """The first two moments of vectors that come in parts, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Any] = []

    def add(self, vectors: Tensor) -> None:
        """Add (n, size) vectors."""
        values = vectors.double()
        parts = [values.sum(0), values.square().sum(0)]
        self._sums = [a + b for a, b in zip(self._sums or [0, 0], parts, strict=True)]
        self.count += len(values)

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (size,), float32 on the CPU."""
        mean, square = (value.cpu() / self.count for value in self._sums)
        return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()
