"""The index: what it lists, and that a damaged one is never used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_rows
from caches import (
    DATASET,
    RECIPE,
    RECIPE_OF_WHOLE,
    assert_same_rows,
    cut,
    with_metadata,
    write_cache,
)

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.shards import index
from pipeline.shards.index import write_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import fingerprint
from pipeline.shards.shard import shard_name, write_shard


def test_an_index_lists_the_given_shards_of_one_recipe(folder: Path) -> None:
    paths = [folder / shard_name(number) for number in range(4)]
    for path, images in zip(paths, ["a", "b", "c", "d"], strict=True):
        rows = make_rows(2, first=2 * paths.index(path))
        recipe = {**RECIPE, "images": images, "m": 4 if images == "d" else 3}
        write_shard(path, rows, dataset=DATASET, recipe=recipe)
    write_index(folder, DATASET, RECIPE, [paths[2], paths[0]])
    cache = RegionCache.open(folder, RECIPE)
    assert [entry.name for entry in cache.shards] == ["regions-00002.h5", "regions-00000.h5"]
    assert [entry.fingerprint for entry in cache.shards] == [
        fingerprint({**RECIPE, "images": images}) for images in ("c", "a")
    ]
    assert cache.ids == ["image-4", "image-5", "image-0", "image-1"]
    assert cache.gather([0, 2]).image_id.tolist() == [b"image-4", b"image-0"]
    with pytest.raises(MismatchError, match=r"regions-00003\.h5.*m is 4, expected 3"):
        write_index(folder, DATASET, RECIPE, paths)
    with pytest.raises(MissingError, match="tiny"):
        write_index(folder, DATASET, RECIPE, [])


def test_shards_of_one_recipe_must_be_alike(shard: Path) -> None:
    with pytest.raises(MismatchError, match=r"regions-00000\.h5.*'tiny'.*'other'"):
        write_index(shard.parent, "other", RECIPE, [shard])
    wide = make_rows(feature_size=6, first=9)
    other = shard.with_name(shard_name(1))
    write_shard(other, wide, dataset=DATASET, recipe=RECIPE)
    with pytest.raises(MismatchError, match=r"regions-00001\.h5.* 3, 6, .* 3, 5, "):
        write_index(shard.parent, DATASET, RECIPE, [shard, other])


def test_an_index_is_of_shards_of_one_version(shard: Path) -> None:
    other = shard.with_name(shard_name(1))
    rows = make_rows(first=9, whole=True)
    write_shard(other, rows, dataset=DATASET, recipe=RECIPE_OF_WHOLE)
    with pytest.raises(MismatchError, match=r"regions-00001\.h5.*whole is true, expected absent"):
        write_index(shard.parent, DATASET, RECIPE, [shard, other])
    with pytest.raises(MismatchError, match=r"regions-00000\.h5.*whole is absent, expected true"):
        write_index(shard.parent, DATASET, RECIPE_OF_WHOLE, [shard, other])


def test_a_view_that_is_stored_twice_names_both_shards(folder: Path) -> None:
    write_cache(folder, make_rows(2), make_rows(2, view=1))
    with pytest.raises(
        DamagedError, match=r"'image-1', view 0.*regions-00000\.h5.*regions-00002\.h5"
    ):
        write_cache(folder, make_rows(2), make_rows(2, view=1), make_rows(1, first=1))
    with pytest.raises(
        DamagedError, match=r"'image-0', view 0.*regions-00000\.h5.*regions-00000\.h5"
    ):
        write_cache(folder, make_rows(2).take([0, 1, 0]))


def test_a_long_index_is_written_and_read_in_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_ROW_GROUP", 10)
    monkeypatch.setattr(index, "_PART", 7)
    parts = [make_rows(4, first=first, view=first % 3) for first in range(0, 10_004, 1000)]
    rows = write_cache(folder, *parts)
    assert pq.read_metadata(folder / "index.parquet").num_row_groups == 4
    cache = RegionCache.open(folder, RECIPE)
    assert_same_rows(cache.gather(np.arange(44)), rows)
    assert cache.lookup(["image-8001", "image-2003"], view=2).tolist() == [33, 11]


def test_a_missing_index_is_named(folder: Path) -> None:
    with pytest.raises(MissingError, match=r"tiny/index\.parquet"):
        RegionCache.open(folder)


def test_an_index_of_another_recipe_is_refused(folder: Path) -> None:
    write_cache(folder, make_rows())
    with pytest.raises(MismatchError, match=r"tiny.*m is 3, expected 10"):
        RegionCache.open(folder, {**RECIPE, "m": 10})


def change_index(path: Path, **changes: object) -> None:
    table = pq.read_table(path, partitioning=None)
    about = json.loads(table.schema.metadata[b"gmpipe"])
    pq.write_table(with_metadata(table, {**about, **changes}), path)


ENTRY = {"name": shard_name(0), "sha256": "", "bytes": 1, "rows": 4, "fingerprint": ""}


def change_column(path: Path, name: str, values: list[Any]) -> None:
    table = pq.read_table(path, partitioning=None)
    columns = {**table.to_pydict(), name: values}
    pq.write_table(pa.Table.from_pydict(columns, schema=table.schema), path)


def misspell_ids(path: Path) -> None:
    """Change a byte of the stored ids so that only the pages' checksums no longer fit."""
    path.write_bytes(path.read_bytes().replace(b"image-0", b"imagf-0", 1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"PAR1"),
        lambda path: cut(path, path.stat().st_size // 2),
        lambda path: change_index(path, shards=[]),
        lambda path: change_index(path, shards=[ENTRY, ENTRY]),
        lambda path: change_index(path, shards=[{"name": 1}]),
        misspell_ids,
        lambda path: change_column(path, "image_id", ["a", "b", None, "c"]),
        lambda path: change_column(path, "view", [0, None, 0, 0]),
        lambda path: change_column(path, "row", [0, 1, 2, 4]),
        lambda path: change_column(path, "row", [0, 1, 2, -1]),
        lambda path: change_column(path, "shard", ["regions-00009.h5"] * 4),
        lambda path: change_index(path, recipe={"m": 4}),
        lambda path: change_index(path, feature_size=1 << 40),
        lambda path: change_index(path, regions="3"),
        lambda path: change_index(path, shards=[{**ENTRY, "rows": 3}]),
        lambda path: change_index(path, shards=[{**ENTRY, "bytes": ""}]),
        lambda path: change_index(path, shards=[ENTRY, {**ENTRY, "name": "../x"}]),
        lambda path: change_index(path, format_version=1),
        lambda path: pq.write_table(  # deeper than Python reads
            pq.read_table(path).replace_schema_metadata({"gmpipe": "[" * 100_000}), path
        ),
    ],
)
def test_a_damaged_index_is_refused(folder: Path, spoil: Callable[[Path], object]) -> None:
    write_cache(folder, make_rows())
    spoil(folder / "index.parquet")
    with pytest.raises(DamagedError, match=r"version 2|version 1.*2") as caught:
        RegionCache.open(folder)
    assert str(caught.value).startswith(f"{folder / 'index.parquet'}: ")


def test_an_index_of_a_newer_format_is_refused_by_name(folder: Path) -> None:
    write_cache(folder, make_rows())
    change_index(folder / "index.parquet", format_version=3)
    with pytest.raises(MismatchError, match=r"index\.parquet.*version 3.*Update gmpipe"):
        RegionCache.open(folder)
