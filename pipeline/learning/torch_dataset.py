"""A region cache as a `torch.utils.data.Dataset`, for your own training loops.

gmpipe's own training reads a cache with `pipeline.learning.batches`, which never waits for data.

Letters: N rows of the dataset, M instances, C labels, D feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.datasets.manifest import SPLITS, Split, read_manifest
from pipeline.heads.inputs import Inputs, InputStatistics
from pipeline.learning.batches import Feed, input_statistics
from pipeline.learning.splits import SplitData, instance_batch, open_split
from pipeline.shards.reader import RegionCache

_FIELDS = ("features", "boxes", "scores", "classes", "mask")


class RegionDataset(Dataset[dict[str, Any]]):
    """A region cache as a dataset, opened with `open_cache`. An item is one view of one image.

    An item is a dict that torch's default collation can batch:

    - ``image_id``: str, and ``view``: int, 0 for the whole image, above 0 for its random crops;
    - ``features``: (M, D) float32; ``boxes``: (M, 4) float32, xyxy in [0, 1] of the view;
      ``scores``: (M,) float32, the detector's, descending; ``classes``: (M,) int64, the
      detector's class numbers; ``mask``: (M,) bool, False for padding, which comes last;
    - with a manifest, ``labels``: (C,) int8, 1 positive, 0 negative, -1 ignored.

    Nothing in it is random; the caller decides the order. It can be pickled and forked, and each
    process opens the shards that it reads.

    Attributes:
        cache: the regions.
        vocabulary: the C label names; None without a manifest.
    """

    def __init__(
        self,
        cache: RegionCache,
        rows: npt.NDArray[np.int64],
        regions: int | None = None,
        vocabulary: tuple[str, ...] | None = None,
        labels: Tensor | None = None,
        train: SplitData | None = None,
    ) -> None:
        """
        Args:
            cache: the regions.
            rows: (N,), numbers of its rows.
            regions: M, the number of a view's best regions to return; None for all.
            vocabulary: names of the labels.
            labels: (N, C) int8.
            train: the training split, if its images are among the rows.
        """
        self.cache = cache
        self.vocabulary = vocabulary
        self._rows = rows
        self._regions = regions
        self._labels = labels
        self._train = train

    def __len__(self) -> int:
        """Number of items, N."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read several items at once, as a `DataLoader` does for each batch.

        Raises:
            IndexError: an index is out of range.
            DamagedError: as `RegionCache.gather`, for a damaged row.
        """
        rows = self.cache.gather(self._rows[np.asarray(indices)])
        batch = instance_batch(rows, self._regions).to(torch.device("cpu"), torch.float32)
        fields = {name: getattr(batch, name) for name in _FIELDS}
        fields["classes"] = fields["classes"].long()
        if self._labels is not None:
            fields["labels"] = self._labels[torch.as_tensor(indices)]
        return [
            {
                "image_id": rows.image_id[item].decode(),
                "view": int(rows.view[item]),
                **{name: values[item] for name, values in fields.items()},
            }
            for item in range(len(rows))
        ]

    def statistics(self) -> InputStatistics:
        """Compute mean and standard deviation of features and boxes, as gmpipe's training does.

        They are of the real regions in view 0 of the training images, never of test images. This
        reads those images once.

        Raises:
            ValueError: the dataset has no training images that it knows of.
            DamagedError: as `RegionCache.gather`.
        """
        if self._train is None:
            raise ValueError(
                "statistics are of training images, and this dataset has none that it knows of: "
                "open the cache with a manifest, and with split='train' or without a split"
            )
        return input_statistics(Feed(self._train, torch.device("cpu"), once=True))

    def standardizer(self, least_deviation: float = 0.1) -> Inputs:
        """Make the module with which gmpipe's own networks standardise what they read.

        Its ``features(x)`` subtracts the mean of `statistics` and divides by the deviation, and
        its ``boxes(x)`` does the same for boxes. As a part of your network, it moves to a device
        with it, and its numbers are saved with the weights.

        Args:
            least_deviation: a component that varies less than this share of the root mean square
                deviation of all components is divided by that instead.

        Raises:
            ValueError, DamagedError: as `statistics`.
        """
        statistics = self.statistics()
        inputs = Inputs(self.cache.feature_size, least_deviation)
        inputs.set_statistics(statistics)
        return inputs


def open_cache(
    folder: str | Path,
    manifest: str | Path | None = None,
    split: Split | None = None,
    *,
    view: int | None = None,
    regions: int | None = None,
) -> RegionDataset:
    """Open a region cache as a dataset.

    Args:
        folder: of the cache, e.g. ``cache/demo``.
        manifest: the file with the images' labels and splits, e.g.
            ``data/demo/prepared/manifest.parquet``. With a manifest, the items are in its order,
            and the views of an image follow each other; without, they are in the cache's order.
        split: ``train``, ``val`` or ``test``, which needs a manifest; None for all that it has, in
            this order.
        view: the view of each image to return; None for all views.
        regions: the number of a view's best regions to return; None for all that are cached.

    Raises:
        ValueError: ``split`` is given without a manifest or has no images, no image has such a
            ``view``, or ``regions`` is not between 1 and the number that is cached.
        GmpipeError: the cache or the manifest is missing or damaged, or an image of the manifest is
            neither in the cache nor among its failures.
    """
    cache = RegionCache.open(Path(folder))
    if regions is not None and not 1 <= regions <= cache.regions:
        raise ValueError(
            f"regions={regions}, expected a number from 1 to {cache.regions}, which are cached"
        )
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r}, expected one of {', '.join(SPLITS)}, or None for all")
    if manifest is None:
        if split is not None:
            raise ValueError(f"split={split!r} needs a manifest, which lists the splits")
        every = np.arange(len(cache))
        return RegionDataset(cache, every[_of_view(cache, every, view, str(folder))], regions)
    known = read_manifest(Path(manifest))
    names = [split] if split else known.splits
    if split is not None and split not in known.splits:
        raise ValueError(f"split={split!r}, but {manifest} has only {', '.join(known.splits)}")
    splits = [open_split(cache, known, name, regions=regions) for name in names]
    ids = pa.array(cache.ids)
    rows, labels = [], []
    for of_split in splits:
        split_rows, images = _rows_of(of_split, ids)
        rows.append(split_rows)
        labels.append(of_split.truth[images])
    every = np.concatenate(rows)
    wanted = _of_view(cache, every, view, f"the {f'{split} ' if split else ''}images in {folder}")
    return RegionDataset(
        cache,
        every[wanted],
        regions,
        known.vocabulary,
        torch.from_numpy(np.concatenate(labels)[wanted]),
        splits[0] if names[0] == "train" else None,
    )


def _of_view(
    cache: RegionCache, rows: npt.NDArray[np.int64], view: int | None, where: str
) -> npt.NDArray[np.bool_]:
    """Tell which rows hold a view; None for any.

    Raises:
        ValueError: none does.
    """
    views = cache.views[rows]
    wanted = np.ones(len(rows), dtype=np.bool_) if view is None else views == view
    if not np.any(wanted):
        there = ", ".join(map(str, np.unique(views))) or "none"
        raise ValueError(f"view={view}, but the views of {where} are: {there}")
    return wanted


def _rows_of(
    split: SplitData, ids: pa.Array
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the rows of a split's images.

    Returns:
        The rows, sorted by image and view, and the index of each row's image in the split.
    """
    image_of_row = pc.index_in(ids, value_set=pa.array(split.image_ids, pa.string()))
    images = np.asarray(pc.fill_null(image_of_row, -1), dtype=np.int64)
    rows = np.flatnonzero(images >= 0)
    rows = rows[np.lexsort((split.cache.views[rows], images[rows]))]
    return rows, images[rows]
