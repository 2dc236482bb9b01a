"""A cache of regions as a `torch.utils.data.Dataset`, for training loops of one's own.

gmpipe's own training reads a cache by `pipeline.learning.batches`, which never waits for data.

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
from pipeline.learning.splits import SplitData, instance_batch, open_split
from pipeline.shards.reader import RegionCache

_FIELDS = ("features", "boxes", "scores", "classes", "mask")


class RegionDataset(Dataset[dict[str, Any]]):
    """The regions of one view of one image an item. Made by `open_cache`.

    An item is a dict that torch's default collation makes batches of:

    - ``image_id``: str, and ``view``: int, 0 the whole image, above 0 its random crops;
    - ``features``: (M, D) float32; ``boxes``: (M, 4) float32, xyxy in [0, 1] of the view;
      ``scores``: (M,) float32, the detector's, descending; ``classes``: (M,) int64, the
      detector's class numbers; ``mask``: (M,) bool, False for padding, which comes last;
    - with a manifest, ``labels``: (C,) int8, 1 positive, 0 negative, -1 ignored.

    Nothing is random in it: the order is the caller's. It may be pickled and forked, and each
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
    ) -> None:
        """
        Args:
            cache: the regions.
            rows: (N,), numbers of its rows.
            regions: M, the best regions of a view that are given; None: all.
            vocabulary: names of the labels.
            labels: (N, C) int8.
        """
        self.cache = cache
        self.vocabulary = vocabulary
        self._rows = rows
        self._regions = regions
        self._labels = labels

    def __len__(self) -> int:
        """N"""
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The items of several places, which a `DataLoader` asks for a batch at a time.

        Raises:
            IndexError: there is no such place.
            GmpipeError: as `RegionCache.gather`, of a damaged row.
        """
        rows = self.cache.gather(self._rows[np.asarray(places)])
        batch = instance_batch(rows, self._regions).to(torch.device("cpu"), torch.float32)
        fields = {name: getattr(batch, name) for name in _FIELDS}
        fields["classes"] = fields["classes"].long()
        if self._labels is not None:
            fields["labels"] = self._labels[torch.as_tensor(places)]
        return [
            {
                "image_id": rows.image_id[item].decode(),
                "view": int(rows.view[item]),
                **{name: values[item] for name, values in fields.items()},
            }
            for item in range(len(rows))
        ]


def open_cache(
    folder: str | Path,
    manifest: str | Path | None = None,
    split: Split | None = None,
    *,
    view: int | None = None,
    regions: int | None = None,
) -> RegionDataset:
    """A cache of regions as a dataset.

    Args:
        folder: of the cache, e.g. ``cache/demo``.
        manifest: file that knows the images' labels and splits, e.g.
            ``data/demo/prepared/manifest.parquet``. With it the order is the manifest's, the views
            of an image following each other; without it, that of the cache.
        split: ``train`` or ``test``, of a manifest; None: both, train first.
        view: the one view of each image that is wanted; None: all that there are.
        regions: the best regions of a view that are given; None: all that the cache holds.

    Raises:
        ValueError: a split without a manifest, or a number of regions that is not 1 to the
            cache's.
        GmpipeError: cache or manifest is missing or damaged, or an image of the manifest is
            neither in the cache nor among its failures.
    """
    cache = RegionCache.open(Path(folder))
    if regions is not None and not 1 <= regions <= cache.regions:
        raise ValueError(f"regions={regions}, expected 1 to the cache's {cache.regions}")
    wanted = np.ones(len(cache), dtype=bool) if view is None else cache.views == view
    if manifest is None:
        if split is not None:
            raise ValueError(f"split={split!r} without a manifest, which alone knows the splits")
        return RegionDataset(cache, np.flatnonzero(wanted), regions)
    known = read_manifest(Path(manifest))
    splits = [open_split(cache, known, name) for name in ([split] if split else SPLITS)]
    ids = pa.array(cache.ids)
    rows, labels = [], []
    for of_split in splits:
        found, images = _rows_of(of_split, ids, wanted)
        rows.append(found)
        labels.append(of_split.truth[images])
    return RegionDataset(
        cache,
        np.concatenate(rows),
        regions,
        known.vocabulary,
        torch.from_numpy(np.concatenate(labels)),
    )


def _rows_of(
    split: SplitData, ids: pa.Array, wanted: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The wanted rows of a split's images, by image and view, and the place of each's image."""
    found = pc.index_in(ids, value_set=pa.array(split.image_ids, pa.string()))
    images = np.asarray(pc.fill_null(found, -1), dtype=np.int64)
    rows = np.flatnonzero((images >= 0) & wanted)
    rows = rows[np.lexsort((split.cache.views[rows], images[rows]))]
    return rows, images[rows]
