"""Every damage is found and named, none is ever read, and sound rows are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import make_rows
from caches import with_metadata

from pipeline.errors import DamagedError, GmpipeError
from pipeline.files import sha256_file
from pipeline.shards.index import read_index, write_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import AXES, Recipe, RegionRows, fingerprint, row_checksums
from pipeline.shards.shard import map_shard, read_header, read_ids, shard_name, write_shard
from pipeline.shards.verification import Damage, salvage_shard, verify_cache

DATASET = "tiny"
RECIPE: Recipe = {"images": "all", "m": 3, "weights": "f00", "whole": True}
SHARDS = 3


def shard_recipe(number: int) -> Recipe:
    return {**RECIPE, "images": f"those of {number}"}


@pytest.fixture
def rows() -> RegionRows:
    """Twelve rows with all fields; each shard of the cache has four of them."""
    return make_rows(4 * SHARDS, whole=True)


@pytest.fixture
def folder(tmp_path: Path, rows: RegionRows) -> Path:
    """A sound cache with `image-0` to `image-3` in the first shard, and so on."""
    folder = tmp_path / DATASET
    paths = [folder / shard_name(number) for number in range(SHARDS)]
    for number, path in enumerate(paths):
        part = rows.take(range(4 * number, 4 * number + 4))
        write_shard(path, part, dataset=DATASET, recipe=shard_recipe(number))
    write_index(folder, DATASET, RECIPE, paths)
    return folder


def flip(path: Path, byte: int, bit: int = 0) -> None:
    with path.open("r+b") as stream:
        stream.seek(byte)
        (value,) = stream.read(1)
        stream.seek(byte)
        stream.write(bytes([value ^ 1 << bit]))


def flip_row(path: Path, field: str, row: int) -> None:
    """Flip a bit of a field of one row of a shard of four."""
    with h5py.File(path, "r") as file:
        size = file[field].nbytes // 4
    flip(path, read_header(path).offsets[field] + row * size)


def damages_of(folder: Path) -> list[Damage]:
    return verify_cache(folder, read_index(folder))


def kinds(damages: list[Damage]) -> list[tuple[str, str, int | None]]:
    return [(damage.shard, damage.kind, damage.row) for damage in damages]


# Finding -----------------------------------------------------------------------------------------


def test_a_sound_cache_has_no_damage(folder: Path) -> None:
    seen: list[str] = []
    assert verify_cache(folder, read_index(folder), seen.append) == []
    assert seen == [shard_name(number) for number in range(SHARDS)]


@pytest.mark.parametrize("field", [*AXES, "row_crc32"])
def test_a_damaged_row_is_named(folder: Path, field: str) -> None:
    flip_row(folder / shard_name(1), field, 2)
    whole, row = damages_of(folder)
    assert (whole.shard, whole.kind, whole.row) == (shard_name(1), "file", None)
    assert (row.shard, row.kind, row.row) == (shard_name(1), "row", 2)
    assert (row.image_id, row.view) == ("image-6", 0)
    assert re.search(r"regions-00001\.h5.*row 2.*'image-6', view 0.*0x", str(row))


def test_all_damaged_rows_of_a_file_are_named(folder: Path) -> None:
    for row in (0, 3):
        flip_row(folder / shard_name(0), "boxes", row)
    flip_row(folder / shard_name(2), "features", 1)
    assert kinds(damages_of(folder)) == [
        (shard_name(0), "file", None),
        (shard_name(0), "row", 0),
        (shard_name(0), "row", 3),
        (shard_name(2), "file", None),
        (shard_name(2), "row", 1),
    ]


def test_rows_beyond_the_first_block_are_checked(tmp_path: Path) -> None:
    path = tmp_path / DATASET / shard_name(0)
    write_shard(path, make_rows(150, whole=True), dataset=DATASET, recipe=RECIPE)
    write_index(path.parent, DATASET, RECIPE, [path])
    with h5py.File(path, "r+") as file:
        for row in (63, 64, 149):
            file["view"][row] = 9
    assert [damage.row for damage in damages_of(path.parent)] == [
        None,
        63,
        64,
        149,
    ]


def test_a_row_that_breaks_the_contract_is_named_by_its_value(
    folder: Path, rows: RegionRows
) -> None:
    boxes = rows.boxes[:4].copy()
    boxes[1, 0, 2] = 3
    broken = replace(rows.take(range(4)), boxes=boxes)
    with h5py.File(folder / shard_name(0), "r+") as file:
        file["boxes"][...] = boxes
        file["row_crc32"][...] = row_checksums(broken)
    _, row = damages_of(folder)
    assert (row.kind, row.row) == ("row", 1)
    assert "boxes[0]" in row.found


def test_bytes_that_belong_to_no_row_are_found(folder: Path) -> None:
    path = folder / shard_name(0)
    with path.open("ab") as stream:
        stream.write(b"\0")
    size = path.stat().st_size
    (damage,) = damages_of(folder)
    assert (damage.kind, damage.row) == ("file", None)
    assert f"{size} bytes" in damage.found
    assert sha256_file(path) in damage.found
    assert f"{size - 1} " in damage.expected


def test_missing_and_unreadable_and_unlisted_shards_are_named(folder: Path) -> None:
    (folder / shard_name(0)).unlink()
    (folder / shard_name(1)).write_bytes(b"no shard")
    (folder / shard_name(7)).write_bytes(b"nor this")
    other = make_rows(4, first=50, whole=True)
    write_shard(folder / shard_name(8), other, dataset=DATASET, recipe=shard_recipe(8))
    flip_row(folder / shard_name(8), "scores", 3)
    damages = damages_of(folder)
    assert kinds(damages) == [
        (shard_name(0), "missing", None),
        (shard_name(1), "unreadable", None),
        (shard_name(7), "unlisted", None),
        (shard_name(7), "unreadable", None),
        (shard_name(8), "unlisted", None),
        (shard_name(8), "row", 3),
    ]
    assert damages[-1].image_id == "image-53"
    assert "HDF5" in damages[1].found
    assert "regions-00000.h5" in str(damages[0])


def test_a_folder_instead_of_a_shard_is_damage(folder: Path) -> None:
    (folder / shard_name(2)).unlink()
    (folder / shard_name(2)).mkdir()
    assert kinds(damages_of(folder)) == [(shard_name(2), "unreadable", None)]


def test_a_shard_that_the_system_can_not_read_is_inaccessible(folder: Path) -> None:
    """A repair must not remove it."""
    (folder / shard_name(2)).unlink()
    (folder / shard_name(2)).symlink_to("/proc/self/mem")  # a real EIO
    assert kinds(damages_of(folder)) == [(shard_name(2), "inaccessible", None)]


def test_foreign_shards_are_named_with_what_differs(folder: Path, rows: RegionRows) -> None:
    other: list[tuple[Recipe, str, RegionRows]] = [
        ({**shard_recipe(0), "m": 4}, DATASET, rows.take(range(4))),
        (shard_recipe(9), DATASET, rows.take(range(4, 8))),
        (shard_recipe(2), "other", rows.take(range(8, 12))),
    ]
    for number, (recipe, dataset, part) in enumerate(other):
        write_shard(folder / shard_name(number), part, dataset=dataset, recipe=recipe)
    damages = [damage for damage in damages_of(folder) if damage.kind != "file"]
    assert kinds(damages) == [(shard_name(number), "foreign", None) for number in range(SHARDS)]
    assert "m is 4, expected 3" in damages[0].found
    assert fingerprint(shard_recipe(9)) in damages[1].found
    assert "'other', 3, 5, 'float16')" in damages[2].found


def test_a_shard_of_other_rows_is_foreign(folder: Path, rows: RegionRows) -> None:
    path = folder / shard_name(0)
    write_shard(path, rows.take(range(3)), dataset=DATASET, recipe=shard_recipe(0))
    assert kinds(damages_of(folder)) == [
        (shard_name(0), "file", None),
        (shard_name(0), "foreign", None),
    ]


def rewrite_index(folder: Path, **columns: list[object]) -> None:
    path = folder / "index.parquet"
    table = pq.read_table(path, partitioning=None)
    arrays = {**table.to_pydict(), **columns}
    pq.write_table(type(table).from_pydict(arrays, schema=table.schema), path)


def test_an_index_that_lists_other_images_is_found(folder: Path) -> None:
    ids = [f"image-{n}" for n in range(12)]
    ids[1], ids[2] = ids[2], ids[1]
    rewrite_index(folder, image_id=ids)
    damages = damages_of(folder)
    assert kinds(damages) == [(shard_name(0), "index", 1), (shard_name(0), "index", 2)]
    assert damages[0].image_id == "image-2"
    assert "'image-1', view 0" in damages[0].found
    rewrite_index(folder, image_id=[f"image-{n}" for n in range(12)], view=[0] * 11 + [5])
    assert kinds(damages_of(folder)) == [(shard_name(2), "index", 3)]


def test_an_index_that_lacks_or_repeats_rows_is_found(folder: Path) -> None:
    rewrite_index(folder, row=[0, 0, 2, 3] * 3)
    damages = [damage for damage in damages_of(folder) if damage.shard == shard_name(1)]
    assert [(damage.row, damage.found[0]) for damage in damages] == [(0, "2"), (1, "0")]
    assert all("index.parquet" in damage.found for damage in damages)
    assert damages[1].image_id == "image-5"
    rewrite_index(
        folder, image_id=[f"image-{n}" for n in [0, 0, *range(2, 12)]], row=[*range(4)] * 3
    )
    rewrite_index(folder, row=[0, 0, 2, 3, *[*range(4)] * 2])
    assert kinds(damages_of(folder)) == [
        (shard_name(0), "index", 0),
        (shard_name(0), "index", 1),
    ]


# Salvaging ---------------------------------------------------------------------------------------


def test_sound_rows_of_a_damaged_shard_are_kept(folder: Path, rows: RegionRows) -> None:
    path = folder / shard_name(1)
    flip_row(path, "image_id", 2)
    salvage_shard(path, [0, 1, 3], {**RECIPE, "images": "three"})
    header, kept, checksums = map_shard(path)
    for field in AXES:
        expected = getattr(rows.take([4, 5, 7]), field)
        np.testing.assert_array_equal(getattr(kept, field), expected)
    np.testing.assert_array_equal(checksums, row_checksums(kept))
    assert (header.dataset, header.recipe) == (DATASET, {**RECIPE, "images": "three"})
    assert read_ids(path)[0] == ["image-4", "image-5", "image-7"]
    # The index still lists the old shard.
    assert kinds(damages_of(folder)) == [
        (shard_name(1), "file", None),
        (shard_name(1), "foreign", None),
    ]
    write_index(folder, DATASET, RECIPE, [folder / shard_name(n) for n in range(SHARDS)])
    assert damages_of(folder) == []
    assert len(RegionCache.open(folder)) == 11


def test_damaged_rows_are_not_kept(folder: Path) -> None:
    path = folder / shard_name(0)
    flip_row(path, "features", 1)
    before = sha256_file(path)
    for keep, recipe, message in [
        ([0, 1], shard_recipe(9), r"regions-00000\.h5.*row 1.*checksum"),
        ([0], {**RECIPE, "m": 4}, "m is 3, expected 4"),
        ([], shard_recipe(9), r"regions-00000\.h5"),
    ]:
        with pytest.raises(GmpipeError, match=message):
            salvage_shard(path, keep, recipe)
    assert sha256_file(path) == before
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"regions-00000\.h5"):
        salvage_shard(path, [0], RECIPE)


# Any damage to a file ----------------------------------------------------------------------------


def assert_found_and_never_read(folder: Path, rows: RegionRows, damaged: Path) -> int:
    """Check that only the damaged shard is named, and that what is still read is what was written.

    Returns:
        the number of rows that could be read.
    """
    damages = damages_of(folder)
    assert damages
    assert {damage.shard for damage in damages} == {damaged.name}
    named = {damage.row for damage in damages if damage.kind == "row"}
    whole = any(damage.kind in ("unreadable", "foreign") for damage in damages)
    try:
        cache = RegionCache.open(folder)
    except GmpipeError:
        return 0
    read = 0
    for number in range(len(rows)):
        try:
            found = cache.gather([number])
        except GmpipeError:
            # verify names all that a reader refuses
            assert whole or number % 4 in named
            continue
        assert not (number // 4 == int(damaged.stem[-5:]) and number % 4 in named)
        read += 1
        for field in AXES:
            np.testing.assert_array_equal(getattr(found, field), getattr(rows, field)[[number]])
    return read


def damaged_copies(
    folder: Path, seed: int, count: int, spoil: Callable[[np.random.Generator, bytes], bytes]
) -> Iterator[Path]:
    """Yield ``count`` times a shard whose bytes were spoilt, and restore it after each."""
    rng = np.random.default_rng(seed)
    for number in rng.integers(SHARDS, size=count):
        path = folder / shard_name(number)
        content = path.read_bytes()
        path.write_bytes(spoil(rng, content))
        yield path
        path.write_bytes(content)
    assert damages_of(folder) == []


def flip_any_bit(rng: np.random.Generator, content: bytes) -> bytes:
    spoilt = bytearray(content)
    spoilt[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(spoilt)


def cut_anywhere(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: rng.integers(len(content))]


FLIPS = [pytest.param(0, 50), pytest.param(1, 500, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("seed", "count"), FLIPS)
def test_flipped_bits_are_found_and_never_read(
    folder: Path, rows: RegionRows, seed: int, count: int
) -> None:
    read = [
        assert_found_and_never_read(folder, rows, path)
        for path in damaged_copies(folder, seed, count, flip_any_bit)
    ]
    # The flips make a difference: some cost a row, some a shard, and some nothing at all.
    assert {8, 11, 12} <= set(read)


@pytest.mark.parametrize(("seed", "count"), [(0, 20), pytest.param(1, 200, marks=pytest.mark.slow)])
def test_truncated_files_are_found_and_never_read(
    folder: Path, rows: RegionRows, seed: int, count: int
) -> None:
    for path in damaged_copies(folder, seed, count, cut_anywhere):
        assert assert_found_and_never_read(folder, rows, path) == 0
        # Nor if the index gave that size: whoever made the file may have made the index.
        size = path.stat().st_size
        table = pq.read_table(folder / "index.parquet", partitioning=None)
        metadata = table.schema.metadata
        about = json.loads(metadata[b"gmpipe"])
        next(e for e in about["shards"] if e["name"] == path.name)["bytes"] = size
        if size > 15:  # the features of a row; fewer bytes are refused by themselves
            pq.write_table(with_metadata(table, about), folder / "index.parquet")
            assert_found_and_never_read(folder, rows, path)
            pq.write_table(table, folder / "index.parquet")
