"""The vector of the whole view on its way from the cache to a head, and where the cache lacks it.

Letters: N images of the split, d feature size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import make_rows
from caches import DATASET, write_cache

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts
from pipeline.errors import InputError
from pipeline.learning import batches as module
from pipeline.learning.batches import Feed, input_statistics
from pipeline.learning.splits import SplitData, check_whole, instance_batch, open_split
from pipeline.settings import TrainSettings
from pipeline.shards.reader import RegionCache

N, CPU = 7, torch.device("cpu")


def make_split(folder: Path, *, whole: bool, regions: int | None = None) -> SplitData:
    """A training split of N images, with one test image beside it."""
    write_cache(folder / DATASET, make_rows(N + 1, whole=whole))
    rows = [
        {
            "image_id": f"image-{number}",
            "path": f"{number}.png",
            "split": "train" if number < N else "test",
            "labels": [0],
            "ignored": [],
            "width": None,
            "height": None,
        }
        for number in range(N + 1)
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest(DATASET, "made", ("cat",), {}, full_counts(table), table)
    return open_split(RegionCache.open(folder / DATASET), manifest, "train", regions=regions)


@pytest.mark.parametrize("once", [False, True])
def test_batches_have_the_vectors_of_their_images(tmp_path: Path, once: bool) -> None:
    """From memory and from the shards."""
    rows = make_rows(N + 1, whole=True)
    assert rows.whole is not None
    feed = Feed(make_split(tmp_path, whole=True), CPU, once=once)
    for images in ([3, 0, 6], [5]):
        [(batch, _)] = feed.batches([(np.array(images), 0)])
        assert batch.whole is not None
        assert batch.whole.dtype == torch.float32
        np.testing.assert_array_equal(batch.whole, rows.whole[images].astype(np.float32))
    statistics = input_statistics(feed)
    whole = rows.whole[:N].astype(np.float64)
    np.testing.assert_allclose(statistics.whole_mean, whole.mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.whole_std, whole.std(0), atol=1e-6)


def test_batches_of_version_1_have_none(tmp_path: Path) -> None:
    feed = Feed(make_split(tmp_path, whole=False), CPU)
    [(batch, _)] = feed.batches([(np.arange(N), 0)])
    assert batch.whole is None
    assert input_statistics(feed).whole_mean is None
    assert instance_batch(make_rows()).whole is None


def test_the_vectors_count_where_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one region an image, they are half of what is read at once."""
    split = make_split(tmp_path, whole=True, regions=1)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 2 * 5 * 3)  # of three images, d = 5
    read: list[int] = []
    instances = SplitData.instances

    def counted(split: SplitData, images: np.ndarray, views: np.ndarray | int = 0) -> object:
        read.append(len(images))
        return instances(split, images, views)

    monkeypatch.setattr(SplitData, "instances", counted)
    Feed(split, CPU)
    assert read == [1, 3, 3, 1]  # the first to learn the size of a row


@pytest.mark.parametrize("head", ["gm-mlic", "max-pool"])
def test_a_head_that_reads_them_needs_a_cache_that_has_them(tmp_path: Path, head: str) -> None:
    plain = make_split(tmp_path / "plain", whole=False).cache
    full = make_split(tmp_path / "full", whole=True).cache
    reads, reads_not = (
        TrainSettings.model_validate({"network": {"head": head, "whole_region": whole}})
        for whole in (True, False)
    )
    check_whole(plain, DATASET, {"a": reads_not})
    check_whole(full, DATASET, {"a": reads, "b": reads_not})
    with pytest.raises(
        InputError,
        match=rf"`a`, `c` .*`{head}`.*plain/tiny.*extract\.tiny\.whole.*array `whole`",
    ):
        check_whole(plain, DATASET, {"a": reads, "b": reads_not, "c": reads})
