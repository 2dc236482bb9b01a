"""The rows of a split, from the cache to batches.

Letters: N images of the split, B images of a batch, M instances, C labels, D feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.datasets.manifest import Manifest, Split
from pipeline.errors import GmpipeError
from pipeline.matching.graphs import InstanceBatch
from pipeline.shards.failures import FAILURES_NAME, read_failures
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import RegionRows

_CHUNK = 1024  # rows read at once to compute statistics


@dataclass(frozen=True)
class SplitData:
    """One split: where its rows are, and its labels.

    Attributes:
        cache: the regions.
        image_ids: N, in the manifest's order.
        rows: (N, V) int64, row numbers in the cache of each image's V views.
        truth: (N, C) int8: 1 positive, 0 negative, -1 ignored.
        left_out: further images of the split that have no regions, as failures.parquet says.
    """

    cache: RegionCache
    image_ids: Sequence[str]
    rows: np.ndarray
    truth: np.ndarray
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, images: np.ndarray) -> SplitData:
        """Some of the images, by their places."""
        return SplitData(
            self.cache, [self.image_ids[i] for i in images], self.rows[images], self.truth[images]
        )

    def batch(
        self, images: np.ndarray, views: np.ndarray | int = 0
    ) -> tuple[InstanceBatch, Tensor]:
        """The instances of some images in one view each, and their (B, C) labels."""
        rows = self.cache.gather(self.rows[images, views])
        return instance_batch(rows), torch.from_numpy(self.truth[images])


def open_split(cache: RegionCache, manifest: Manifest, split: Split, views: int = 1) -> SplitData:
    """A split of a data set, with the first ``views`` views of every image.

    Images that are listed as failures are left out and counted.

    Raises:
        GmpipeError: any other image of the split is not in the cache, or none is left.
    """
    failures = read_failures(cache.folder)
    listed = manifest.image_ids(split)
    kept = [place for place, image_id in enumerate(listed) if image_id not in failures]
    if not kept:
        raise GmpipeError(
            f"{cache.folder}: none of the {len(listed)} images of the {split} split has regions; "
            f"{FAILURES_NAME} says why. Mend them and run `gmpipe extract --dataset "
            f"{manifest.dataset}`."
        )
    image_ids = [listed[place] for place in kept]
    rows = np.stack([cache.lookup(image_ids, view) for view in range(views)], axis=1)
    truth = manifest.truth(split)[kept]
    return SplitData(cache, image_ids, rows, truth, left_out=len(listed) - len(kept))


def instance_batch(rows: RegionRows) -> InstanceBatch:
    """Rows of the cache -> tensors; features become float32."""
    places = np.arange(rows.boxes.shape[1])
    return InstanceBatch(
        features=torch.from_numpy(rows.features.astype(np.float32)),
        boxes=torch.from_numpy(rows.boxes),
        scores=torch.from_numpy(rows.scores),
        classes=torch.from_numpy(rows.classes),
        mask=torch.from_numpy(places[None, :] < rows.count[:, None]),
    )


@dataclass(frozen=True)
class RegionStatistics:
    """Mean and standard deviation of each component over the real regions of view 0.

    Attributes:
        feature_mean, feature_std: (D,) float32.
        box_mean, box_std: (4,) float32.
    """

    feature_mean: Tensor
    feature_std: Tensor
    box_mean: Tensor
    box_std: Tensor


def region_statistics(split: SplitData) -> RegionStatistics:
    """One pass over a split, in float64."""
    total = 0
    sums: list[Tensor] = []
    for start in range(0, len(split), _CHUNK):
        batch, _ = split.batch(np.arange(start, min(start + _CHUNK, len(split))))
        total += int(batch.mask.sum())
        real = (batch.features[batch.mask].double(), batch.boxes[batch.mask].double())
        moments = [moment for x in real for moment in (x.sum(0), x.square().sum(0))]
        sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
    features, features2, boxes, boxes2 = (value / total for value in sums)
    return RegionStatistics(
        features.float(),
        (features2 - features.square()).clamp(min=0).sqrt().float(),
        boxes.float(),
        (boxes2 - boxes.square()).clamp(min=0).sqrt().float(),
    )
