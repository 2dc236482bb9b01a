"""The rows of a split in the cache, and its labels.

Letters: N images of the split, V views of an image, B images of a batch, M instances, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.datasets.manifest import Manifest, Split
from pipeline.errors import GmpipeError
from pipeline.matching.graphs import InstanceBatch
from pipeline.shards.failures import FAILURES_NAME, read_failures
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import OF_REGIONS, Recipe, RegionRows


@dataclass(frozen=True)
class SplitData:
    """One split: where its rows are, and its labels.

    Attributes:
        cache: the regions.
        image_ids: N, in the manifest's order.
        rows: (N, V) int64, row numbers in the cache of each image's V views.
        truth: (N, C) int8: 1 positive, 0 negative, -1 ignored.
        regions: M, the best regions of an image that are used.
        left_out: further images of the split that have no regions, as failures.parquet says.
    """

    cache: RegionCache
    image_ids: Sequence[str]
    rows: np.ndarray
    truth: np.ndarray
    regions: int
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, images: np.ndarray) -> SplitData:
        """Some of the images, by their places."""
        return replace(
            self,
            image_ids=[self.image_ids[i] for i in images],
            rows=self.rows[images],
            truth=self.truth[images],
            left_out=0,
        )

    def instances(self, images: np.ndarray, views: np.ndarray | int = 0) -> InstanceBatch:
        """The instances of some images in one view each, features as stored."""
        return instance_batch(self.cache.gather(self.rows[images, views]), self.regions)


def open_split(
    cache: RegionCache,
    manifest: Manifest,
    split: Split,
    views: int = 1,
    regions: int | None = None,
) -> SplitData:
    """A split of a data set, with the first ``views`` views of every image.

    Images that are listed as failures are left out and counted.

    Args:
        regions: M, the best regions of an image that are used; None: all that the cache holds.

    Raises:
        GmpipeError: any other image of the split is not in the cache, none is left, or the cache
            holds fewer regions of an image.
    """
    check_regions(cache, manifest.dataset, regions)
    failures = read_failures(cache.folder)
    listed = manifest.image_ids(split)
    kept = [place for place, image_id in enumerate(listed) if image_id not in failures]
    if not kept:
        again = fill_cache(cache.recipe, manifest.dataset)
        raise GmpipeError(
            f"{cache.folder}: none of the {len(listed)} images of the {split} split has regions; "
            f"{FAILURES_NAME} says why. Mend them and run `{again}`."
        )
    image_ids = [listed[place] for place in kept]
    rows = np.stack([cache.lookup(image_ids, view) for view in range(views)], axis=1)
    truth = manifest.truth(split)[kept]
    return SplitData(
        cache, image_ids, rows, truth, regions or cache.regions, left_out=len(listed) - len(kept)
    )


def check_regions(cache: RegionCache, dataset: str, regions: int | None) -> None:
    """See that a cache holds as many ``regions`` of an image as are to be used.

    Raises:
        GmpipeError: it holds fewer.
    """
    if regions is not None and regions > cache.regions:
        raise GmpipeError(
            f"{cache.folder} holds the best {cache.regions} regions of an image, and "
            f"train.{dataset}.regions is {regions}. Lower it to {cache.regions}, or raise "
            f"extract.{dataset}.regions and run `{fill_cache(cache.recipe, dataset)} --replace`."
        )


def fill_cache(recipe: Recipe, dataset: str) -> str:
    """The command that writes regions of a recipe into the cache."""
    if "imported_from" in recipe:
        return f"gmpipe import-regions FILE --dataset {dataset}"
    return f"gmpipe extract --dataset {dataset}"


def instance_batch(rows: RegionRows, regions: int | None = None) -> InstanceBatch:
    """Rows of the cache -> tensors, in the types that are stored.

    Args:
        rows: R rows of m regions.
        regions: M, how many of the m are used, which come best first; None: all.
    """
    best = {name: torch.from_numpy(getattr(rows, name)[:, :regions]) for name in OF_REGIONS}
    places = np.arange(best["boxes"].shape[1])
    return InstanceBatch(**best, mask=torch.from_numpy(places < rows.count[:, None]))
