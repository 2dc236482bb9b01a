"""Region shards: the contract of a row, whole files or none, and nothing damaged ever read."""

from __future__ import annotations

import fcntl
import json
import pickle
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_rows
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import GmpipeError
from pipeline.files import sha256_file
from pipeline.shards import reader, writer
from pipeline.shards.reader import RegionCache, map_shard, read_header, read_ids, whole_shards
from pipeline.shards.schema import (
    AXES,
    FORMAT_VERSION,
    Recipe,
    RegionRows,
    check_same_recipe,
    fingerprint,
    row_checksums,
)
from pipeline.shards.writer import shard_name, write_index, write_shard

RECIPE: Recipe = {
    "images": "all of them",
    "m": 3,
    "nms_threshold": 0.5,
    "flip": True,
    "weights": None,
    "dtype": "float16",
}
DATASET = "tiny"


def write_cache(folder: Path, *parts: RegionRows) -> RegionRows:
    """Write each of ``parts`` as a shard of ``folder``, and the index; return all their rows."""
    paths = [folder / shard_name(number) for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, part, dataset=DATASET, recipe={**RECIPE, "images": path.name})
    write_index(folder, DATASET, RECIPE, paths)
    return RegionRows.concatenate(parts)


def assert_same_rows(found: RegionRows, expected: RegionRows) -> None:
    for field in AXES:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), field)
        if field != "image_id":
            assert getattr(found, field).dtype == getattr(expected, field).dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`cache/tiny`, where the name is the data set's, as messages assume."""
    return tmp_path / DATASET


@pytest.fixture
def shard(folder: Path) -> Path:
    """One shard of four rows."""
    path = folder / shard_name(0)
    write_shard(path, make_rows(), dataset=DATASET, recipe=RECIPE)
    return path


# Rows


def changed(field: str, place: Any, value: Any) -> RegionRows:
    """Sound rows but for one value; `image-1` (row 1) has two real regions of three."""
    rows = make_rows()
    array = getattr(rows, field).copy()
    array[place] = value
    return replace(rows, **{field: array})


def test_sound_rows_pass() -> None:
    make_rows().check()
    make_rows(feature_dtype="float32").check()
    make_rows(1, regions=1).check()
    make_rows().take([]).check()
    rows = make_rows()
    replace(rows, scores=np.where(rows.scores > 0, -1, 0).astype(np.float32)).check()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed("features", (1, 0, 2), np.nan), r"'image-1' .* features\[0\]\[2\] is nan; .*fin"),
        (
            changed("features", (1, 1, 4), -np.inf),
            r"'image-1' .* features\[1\]\[4\] is -inf; .*fin",
        ),
        (changed("features", (1, 2, 0), 1), r"'image-1' .* features\[2\] is .*; expected zeros"),
        (changed("boxes", (1, 1, 0), -np.inf), r"'image-1' .* boxes\[1\]\[0\] is -inf; .*finite"),
        (changed("boxes", (1, 1), [-0.1, 0, 1, 1]), r"'image-1' .* boxes\[1\] .*-0\.1.*in \[0, 1"),
        (changed("boxes", (1, 1), [0, 0, 1, 1.5]), r"'image-1' .* boxes\[1\] .*1\.5.*in \[0, 1"),
        (changed("boxes", (1, 1), [0.5, 0, 0.4, 1]), r"'image-1' .* boxes\[1\] .* x0 <= x1"),
        (changed("boxes", (1, 1), [0, 0.5, 1, 0.4]), r"'image-1' .* boxes\[1\] .* y0 <= y1"),
        (changed("boxes", (1, 2), [0, 0, 1, 1]), r"'image-1' .* boxes\[2\] .* expected zeros"),
        (changed("scores", (1, 0), np.inf), r"'image-1' .* scores\[0\] is inf; .*finite"),
        (changed("scores", (1, 1), 2), r"'image-1' .* scores\[1\] is 2\.0; .*descending"),
        (changed("scores", (1, 2), 0.5), r"'image-1' .* scores\[2\] is 0\.5; expected zeros"),
        (changed("classes", (1, 2), 7), r"'image-1' .* classes\[2\] is 7; expected zeros"),
        (changed("count", 1, 0), r"'image-1' .* count is 0; expected 1 to 3"),
        (changed("count", 1, 4), r"'image-1' .* count is 4; expected 1 to 3"),
        (changed("view", 1, -1), r"'image-1' .* view is -1; expected 0 or more"),
        (changed("image_id", 1, b""), r"'' \(row 1\): image_id is b''; expected the image's id"),
        (changed("image_id", 1, b"\xff"), r"\(row 1\): image_id is b'\\xff'; expected UTF-8"),
    ],
)
def test_a_value_that_breaks_the_contract_is_named(rows: RegionRows, message: str) -> None:
    with pytest.raises(GmpipeError, match=message + r".*write them again\.$"):
        rows.check()


@pytest.mark.parametrize("field", AXES)
def test_another_dtype_is_named(field: str) -> None:
    rows = make_rows()
    other = getattr(rows, field).astype(np.str_ if field == "image_id" else np.float64)
    with pytest.raises(GmpipeError, match=rf"{field} has dtype .*; expected .*write them again"):
        replace(rows, **{field: other}).check()


@pytest.mark.parametrize("field", AXES)
def test_another_shape_is_named(field: str) -> None:
    rows = make_rows()
    other = getattr(rows, field)[..., None]
    with pytest.raises(GmpipeError, match=rf"'image-0' on: {field} has shape .*; expected \("):
        replace(rows, **{field: other}).check()


def test_rows_are_taken_and_joined_in_order() -> None:
    rows = make_rows(5)
    parts = [rows.take([0, 1]), rows.take([2]), rows.take([3, 4])]
    assert_same_rows(RegionRows.concatenate(parts), rows)
    assert rows.take([4, 4]).image_id.tolist() == [b"image-4", b"image-4"]
    with pytest.raises(ValueError, match="feature dtype"):
        RegionRows.concatenate([rows, make_rows(feature_dtype="float32")])


def test_a_checksum_covers_every_field_and_not_the_width_of_ids() -> None:
    rows = make_rows(2)
    plain = row_checksums(rows)
    row = [getattr(rows, field)[1] for field in AXES]
    assert plain[1] == zlib.crc32(b"".join(value.tobytes() for value in row[:5]) + b"image-1\0\0")
    wide = replace(rows, image_id=rows.image_id.astype("S40"))
    assert row_checksums(wide).tolist() == plain.tolist()
    for field in AXES:
        other = getattr(rows, field).copy()
        other[1] = b"other" if field == "image_id" else other[1] + 1
        sums = row_checksums(replace(rows, **{field: other}))
        assert (sums != plain).tolist() == [False, True], field


# Recipes


def test_a_fingerprint_ignores_the_order_of_fields_only() -> None:
    assert fingerprint(RECIPE) == fingerprint(dict(reversed(RECIPE.items())))
    assert fingerprint(RECIPE) != fingerprint({**RECIPE, "flip": 1})


def test_every_difference_of_recipes_is_named() -> None:
    check_same_recipe(RECIPE, dict(RECIPE), "here")
    found = {**RECIPE, "m": 10, "flip": 1, "old": "x"}
    with pytest.raises(GmpipeError) as caught:
        check_same_recipe(found, {**RECIPE, "new": 0.5}, "cache/tiny")
    message = str(caught.value)
    assert message.startswith("cache/tiny was made with other settings: ")
    assert "m is 10, expected 3;" in message
    assert "flip is 1, expected true;" in message
    assert 'old is "x", expected absent' in message
    assert "new is absent, expected 0.5;" in message
    assert "nms_threshold" not in message
    assert message.endswith(
        "`--replace` to `gmpipe extract` to drop these shards and extract again, or restore the "
        "old setting."
    )


# Writing


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_cache_gives_back_its_rows(folder: Path, dtype: str) -> None:
    parts = [make_rows(4, feature_dtype=dtype), make_rows(3, feature_dtype=dtype, first=98)]
    rows = write_cache(folder, *parts)
    cache = RegionCache.open(folder, RECIPE)
    assert (cache.dataset, cache.recipe) == (DATASET, RECIPE)
    assert cache.fingerprint == fingerprint(RECIPE)
    assert (cache.regions, cache.feature_size, cache.feature_dtype) == (3, 5, dtype)
    assert cache.ids == [*(f"image-{n}" for n in (0, 1, 2, 3, 98, 99, 100))]
    assert cache.views.tolist() == [0] * len(cache) == [0] * 7
    assert_same_rows(cache.gather(np.arange(7)), rows)
    assert_same_rows(cache.gather(cache.lookup(["image-99", "image-2"])), rows.take([5, 2]))
    assert len(cache.gather([])) == 0


def test_the_stored_layout_is_the_documented_one(shard: Path) -> None:
    with h5py.File(shard, "r") as file:
        assert set(file) == {*AXES, "row_crc32"}
        assert set(file.attrs) == {
            "format_name",
            "format_version",
            "dataset",
            "fingerprint",
            "recipe",
        }
        assert json.loads(file.attrs["recipe"]) == RECIPE
        np.testing.assert_array_equal(file["row_crc32"], row_checksums(make_rows()))
        assert all(array.chunks is None for array in file.values())
    header = read_header(shard)
    assert (header.rows, header.regions, header.feature_size) == (4, 3, 5)
    assert (header.dataset, header.recipe, header.feature_dtype) == (DATASET, RECIPE, "float16")
    assert header.fingerprint == fingerprint(RECIPE)
    image_ids, views = read_ids(shard)
    assert (image_ids, views.tolist()) == ([f"image-{n}" for n in range(4)], [0] * 4)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = make_rows(rows=50)
    wide = replace(rows, image_id=rows.image_id.astype("S40"))
    hashes = set()
    for name, written in (("a", rows), ("b", rows), ("c", wide)):
        write_cache(tmp_path / name, written)
        files = (tmp_path / name / shard_name(0), tmp_path / name / "index.parquet")
        hashes.add(tuple(sha256_file(path) for path in files))
    assert len(hashes) == 1


def test_rows_that_break_the_contract_are_not_written(folder: Path) -> None:
    path = folder / shard_name(0)
    with pytest.raises(GmpipeError, match="count is 0"):
        write_shard(path, changed("count", 1, 0), dataset=DATASET, recipe=RECIPE)
    with pytest.raises(GmpipeError, match=r"regions-00000\.h5: found no rows"):
        write_shard(path, make_rows().take([]), dataset=DATASET, recipe=RECIPE)
    assert not folder.exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = h5py.Group.create_dataset

    def fail_late(group: h5py.Group, name: str, **options: Any) -> h5py.Dataset:
        if name == "view":
            raise error
        return write(group, name, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", fail_late)
    with pytest.raises(type(error)):
        write_shard(folder / shard_name(0), make_rows(), dataset=DATASET, recipe=RECIPE)
    assert list(folder.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_shard(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256_file(shard)
    write = h5py.Group.create_dataset

    def write_wrongly(group: h5py.Group, name: str, data: Any, **options: Any) -> h5py.Dataset:
        return write(group, name, data=data / 2 if name == "features" else data, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", write_wrongly)
    with pytest.raises(GmpipeError, match=r"row 0 \(image 'image-7'\) was read back .* again\.$"):
        write_shard(shard, make_rows(first=7), dataset=DATASET, recipe=RECIPE)
    assert list(shard.parent.iterdir()) == [shard]
    assert sha256_file(shard) == before


def test_whole_shards_are_sorted_by_number_without_unfinished_ones(tmp_path: Path) -> None:
    names = ["regions-100000.h5", "regions-00002.h5", "regions-99999.h5"]
    for name in [*names, "regions-00003.h5.0123abcd.tmp", "regions-x.h5", "index.parquet"]:
        (tmp_path / name).touch()
    found = [path.name for path in whole_shards(tmp_path)]
    assert found == ["regions-00002.h5", "regions-99999.h5", "regions-100000.h5"]


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
    with pytest.raises(GmpipeError, match=r"00003\.h5 was made .*settings: m is 4, expected 3\. "):
        write_index(folder, DATASET, RECIPE, paths)
    with pytest.raises(GmpipeError, match=r"tiny: found no shards to list; .*--dataset tiny`\.$"):
        write_index(folder, DATASET, RECIPE, [])


def test_shards_of_one_recipe_must_be_alike(shard: Path) -> None:
    with pytest.raises(GmpipeError, match=r"00000\.h5: found .*'tiny'.* expected .*'other'"):
        write_index(shard.parent, "other", RECIPE, [shard])
    wide = make_rows(feature_size=6, first=9)
    other = shard.with_name(shard_name(1))
    write_shard(other, wide, dataset=DATASET, recipe=RECIPE)
    with pytest.raises(GmpipeError, match=r"00001\.h5: found .* 3, 6, .* expected .* 3, 5, "):
        write_index(shard.parent, DATASET, RECIPE, [shard, other])


def test_a_view_that_is_there_twice_names_both_shards(folder: Path) -> None:
    write_cache(folder, make_rows(2), make_rows(2, view=1))
    with pytest.raises(
        GmpipeError, match=r"image 'image-1', view 0, is in regions-00000\.h5 and in .*-00002\.h5"
    ):
        write_cache(folder, make_rows(2), make_rows(2, view=1), make_rows(1, first=1))
    with pytest.raises(
        GmpipeError, match=r"'image-0', view 0, is in regions-00000\.h5 and in .*-00000"
    ):
        write_cache(folder, make_rows(2).take([0, 1, 0]))


def test_a_long_index_is_written_and_read_in_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_ROW_GROUP", 10)
    monkeypatch.setattr(reader, "_INDEX_PART", 7)
    parts = [make_rows(4, first=first, view=first % 3) for first in range(0, 10_004, 1000)]
    rows = write_cache(folder, *parts)
    assert pq.read_metadata(folder / "index.parquet").num_row_groups == 4
    cache = RegionCache.open(folder, RECIPE)
    assert_same_rows(cache.gather(np.arange(44)), rows)
    assert cache.lookup(["image-8001", "image-2003"], view=2).tolist() == [33, 11]


# Refusing shards


def replace_array(shard: Path, name: str, **options: Any) -> None:
    """Store an array anew with other ``options`` of `create_dataset`."""
    with h5py.File(shard, "r+") as file:
        options = {"data": file[name][()], **options}
        del file[name]
        file.create_dataset(name, **options)


def link_array(shard: Path, name: str, link: object) -> None:
    with h5py.File(shard, "r+") as file:
        file.move(name, "elsewhere") if isinstance(link, h5py.SoftLink) else file.pop(name)
        file[name] = link


def make_virtual(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        source = file["boxes"]
        layout = h5py.VirtualLayout(source.shape, source.dtype)
        layout[:] = h5py.VirtualSource("other.h5", "boxes", source.shape)
        del file["boxes"]
        file.create_virtual_dataset("boxes", layout)


def set_attribute(shard: Path, name: str, value: object) -> None:
    with h5py.File(shard, "r+") as file:
        file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value


def set_text_of_any_length(shard: Path, name: str) -> None:
    with h5py.File(shard, "r+") as file:
        file.attrs[name] = DATASET


def add(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["extra"] = h5py.ExternalLink("/etc/passwd", "/")


def drop(shard: Path, name: str) -> None:
    with h5py.File(shard, "r+") as file:
        del (file if name in file else file.attrs)[name]


def make_group(shard: Path) -> None:
    drop(shard, "view")
    with h5py.File(shard, "r+") as file:
        file.create_group("view")


def make_enum(shard: Path) -> None:
    drop(shard, "view")
    with h5py.File(shard, "r+") as file:
        file.create_dataset("view", (4,), h5py.enum_dtype({"plain": 0}, basetype="i2"))


def cut(shard: Path, size: int) -> None:
    with shard.open("r+b") as stream:
        stream.truncate(size)


EXTERNAL = h5py.ExternalLink("other.h5", "/boxes")
OUTSIDE = {"external": [("other.bin", 0, 8)], "shape": (4,), "dtype": "int16", "data": None}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: shard.unlink(), "there is no such shard"),
        (lambda shard: shard.write_bytes(b""), "expected a shard"),
        (lambda shard: shard.write_text("no HDF5 " * 99), "expected a shard"),
        (lambda shard: cut(shard, shard.stat().st_size - 1), "truncated file"),
        (lambda shard: cut(shard, 100), "truncated file"),
        (lambda s: link_array(s, "boxes", EXTERNAL), "`boxes` is a link .ExternalLink.; exp"),
        (
            lambda s: link_array(s, "boxes", h5py.SoftLink("/elsewhere")),
            "`elsewhere` is in the file; expected only the arrays",
        ),
        (
            lambda s: link_array(s, "boxes", h5py.SoftLink("/scores")) or drop(s, "elsewhere"),
            "`boxes` is a link .SoftLink.; expected an array in the file",
        ),
        (make_virtual, "`boxes` is stored virtual; expected contiguous"),
        (lambda s: replace_array(s, "boxes", chunks=(1, 3, 4)), "`boxes` is stored chunked"),
        (lambda s: replace_array(s, "boxes", compression="gzip"), "`boxes` is stored chunked"),
        (lambda s: replace_array(s, "view", **OUTSIDE), "`view` is stored in another file"),
        (lambda s: replace_array(s, "boxes", dtype="f8"), "boxes has dtype float64; expected fl"),
        (lambda s: replace_array(s, "view", dtype=">i2"), "view has dtype >i2; expected int16"),
        (make_enum, "`view` is of another HDF5 type; expected plain int16"),
        (lambda s: replace_array(s, "view", data=np.zeros(3, "i2")), r"shape \(3,\); .*\(4,\)"),
        (lambda s: replace_array(s, "image_id", dtype=h5py.string_dtype()), "image_id has dtype"),
        (make_group, "`view` is a Group; expected an array"),
        (lambda s: drop(s, "row_crc32"), "`row_crc32` is missing; expected an array of the form"),
        (add, "`extra` is in the file; expected only the arrays of the format"),
        (lambda s: set_attribute(s, "format_name", "zip"), "`format_name` is 'zip'; expected 'gm"),
        (lambda s: set_attribute(s, "format_name", 7), "`format_name` is of dtype int64"),
        (lambda s: set_attribute(s, "dataset", h5py.Empty("S9")), "`dataset` is of dtype"),
        (lambda s: set_text_of_any_length(s, "dataset"), "`dataset` is of dtype object"),
        (lambda s: set_attribute(s, "format_version", [1, 1]), "`format_version` is of dtype int"),
        (
            lambda s: drop(s, "dataset"),
            "attribute `dataset` is missing; expected fixed-length text",
        ),
        (lambda s: set_attribute(s, "format_version", 0), "found format version 0; expected 1"),
        (lambda s: set_attribute(s, "recipe", '{"m": 4}'), "`recipe` is not what `fingerprint`"),
        (lambda s: set_attribute(s, "recipe", "{"), "expected a shard"),
    ],
)
def test_what_is_no_shard_of_this_format_is_refused(
    shard: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(shard)
    with pytest.raises(GmpipeError, match=message) as caught:
        read_header(shard)
    assert str(caught.value).startswith(f"{shard}: ")
    assert "gmpipe extract --dataset tiny`" in str(caught.value)


def test_a_shard_of_no_rows_is_refused(shard: Path) -> None:
    for name in [*AXES, "row_crc32"]:
        with h5py.File(shard, "r") as file:
            data = file[name][:0]
        replace_array(shard, name, data=data)
    with pytest.raises(GmpipeError, match="`features` is without storage; expected at least one"):
        read_header(shard)


@pytest.mark.parametrize("field", AXES)
@pytest.mark.parametrize("rows", [5, 10**6, 2**58, 2**62, 2**63 - 1])
def test_a_shape_that_the_file_cannot_hold_is_refused(shard: Path, field: str, rows: int) -> None:
    with h5py.File(shard, "r") as file:
        shape = file[field].shape
        header = h5py.h5o.get_info(file[field].id).addr
    stored, declared = (struct.pack(f"<{len(shape)}Q", r, *shape[1:]) for r in (4, rows))
    content = bytearray(shard.read_bytes())
    place = content.index(stored, header)
    assert content[place + len(stored) :].startswith(stored)  # the maximum, which is the same
    content[place : place + 2 * len(stored)] = 2 * declared
    shard.write_bytes(content)
    with pytest.raises(GmpipeError, match=r"shape|cut off|expected a shard"):
        map_shard(shard)


def test_a_text_that_the_file_cannot_hold_is_refused(shard: Path) -> None:
    content = shard.read_bytes()
    size = struct.pack("<I", len(DATASET))
    # The dtype of the attribute after its name: class and version, character set, size.
    place = content.index(size, content.index(b"dataset\0"))
    shard.write_bytes(content[:place] + struct.pack("<I", 1 << 31) + content[place + 4 :])
    with pytest.raises(GmpipeError, match=r"of 2147483648 bytes; expected|expected a shard"):
        read_header(shard)


def test_a_shard_that_another_process_has_locked_is_read(shard: Path) -> None:
    with shard.open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert read_header(shard).rows == 4


def test_a_newer_format_is_refused_by_name(shard: Path) -> None:
    set_attribute(shard, "format_version", FORMAT_VERSION + 1)
    with pytest.raises(GmpipeError, match=r"format version 2, .*newer gmpipe .*Update gmpipe\.$"):
        read_header(shard)


def test_ids_that_are_no_text_are_refused(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["image_id"][2] = b"\xff"
    with pytest.raises(GmpipeError, match=r"image_id holds b'\\xff'; expected UTF-8"):
        read_ids(shard)


# Reading a cache


@pytest.mark.parametrize("field", [*AXES, "row_crc32"])
def test_a_flipped_bit_is_never_read(folder: Path, field: str) -> None:
    rows = write_cache(folder, make_rows(4), make_rows(4, first=4))
    path = folder / shard_name(1)
    header = read_header(path)
    with h5py.File(path, "r") as file:
        size = file[field].nbytes // header.rows
    with path.open("r+b") as stream:
        stream.seek(header.offsets[field] + 2 * size)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    cache = RegionCache.open(folder, RECIPE)
    sound = [0, 1, 2, 3, 4, 5, 7]
    assert_same_rows(cache.gather(sound), rows.take(sound))
    for _ in range(2):
        with pytest.raises(
            GmpipeError,
            match=r"tiny/regions-00001\.h5: row 2 \(image 'image-6', view 0\) is damaged: .*"
            r"Delete it and run `gmpipe extract --dataset tiny` again",
        ):
            cache.gather([0, 6, 5])


def test_a_row_that_breaks_the_contract_is_not_read(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    broken = changed("boxes", (1, 0, 0), 2)
    with h5py.File(path, "r+") as file:
        file["boxes"][...] = broken.boxes
        file["row_crc32"][...] = row_checksums(broken)
    with pytest.raises(
        GmpipeError, match=r"00000\.h5: row 1 \(image 'image-1', .*: boxes\[0\] is .*Delete"
    ):
        RegionCache.open(folder).gather([1])


def test_an_index_that_tells_of_other_shards_is_refused(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    recipe = {**RECIPE, "images": path.name}
    rewrite = {"dataset": DATASET, "recipe": recipe}
    write_shard(path, make_rows().take([1, 0, 2, 3]), **rewrite)
    with pytest.raises(
        GmpipeError, match=r"row 0 \(image 'image-0'.* holds image 'image-1', .*Delete"
    ):
        RegionCache.open(folder).gather([0])
    write_shard(path, make_rows(), dataset=DATASET, recipe={**recipe, "m": 4})
    with pytest.raises(GmpipeError, match=r"00000\.h5 was made .*settings: m is 4, expected 3\. "):
        RegionCache.open(folder).gather([0])
    write_shard(path, make_rows(), dataset=DATASET, recipe={**RECIPE, "images": "regions-00001.h5"})
    with pytest.raises(GmpipeError, match=r"a shard of other images, .*; expected .*Run `gmpipe"):
        reopened_without_sizes(folder).gather([0])
    write_shard(path, make_rows(regions=4), **rewrite)
    with pytest.raises(GmpipeError, match=r"regions-00000\.h5: found .* expected .* as index"):
        reopened_without_sizes(folder).gather([0])


def reopened_without_sizes(folder: Path) -> RegionCache:
    """A cache whose index says the size that the shard now has."""
    path = folder / "index.parquet"
    table = pq.read_table(path, partitioning=None)
    about = json.loads(table.schema.metadata[b"gmpipe"])
    about["shards"][0]["bytes"] = (folder / shard_name(0)).stat().st_size
    pq.write_table(table.replace_schema_metadata({"gmpipe": json.dumps(about)}), path)
    return RegionCache.open(folder)


def test_a_truncated_or_missing_shard_is_found_on_opening(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    size = path.stat().st_size
    cut(path, size - 1)
    with pytest.raises(GmpipeError, match=rf"found {size - 1} bytes; expected {size}.*Delete it"):
        RegionCache.open(folder)
    path.unlink()
    with pytest.raises(GmpipeError, match=r"index\.parquet lists it; not found\. Run `gmpipe ext"):
        RegionCache.open(folder)


def test_a_missing_index_names_the_command(folder: Path) -> None:
    with pytest.raises(GmpipeError, match=r"no index .* `gmpipe extract --dataset tiny`\.$"):
        RegionCache.open(folder)


def test_an_index_of_another_recipe_is_refused(folder: Path) -> None:
    write_cache(folder, make_rows())
    with pytest.raises(GmpipeError, match=r"tiny was made with .* m is 3, expected 10.*--replace"):
        RegionCache.open(folder, {**RECIPE, "m": 10})


def change_index(path: Path, **changes: object) -> None:
    table = pq.read_table(path, partitioning=None)
    about = json.loads(table.schema.metadata[b"gmpipe"])
    metadata = {"gmpipe": json.dumps({**about, **changes})}
    pq.write_table(table.replace_schema_metadata(metadata), path)


ENTRY = {"name": shard_name(0), "sha256": "", "bytes": 1, "rows": 4, "fingerprint": ""}


def change_column(path: Path, name: str, values: list[Any]) -> None:
    table = pq.read_table(path, partitioning=None)
    columns = {**table.to_pydict(), name: values}
    pq.write_table(pa.Table.from_pydict(columns, schema=table.schema), path)


def misspell_ids(path: Path) -> None:
    """Change a byte of the stored ids such that all but the pages' checksums still fits."""
    path.write_bytes(path.read_bytes().replace(b"image-0", b"imagf-0", 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"PAR1"), "found a damaged file or another format"),
        (lambda path: cut(path, path.stat().st_size // 2), "found a damaged file or another fo"),
        (lambda path: change_index(path, shards=[]), "contradict each other"),
        (lambda path: change_index(path, shards=[ENTRY, ENTRY]), "contradict each other"),
        (lambda path: change_index(path, shards=[{"name": 1}]), "found a damaged file or anoth"),
        (misspell_ids, "found a damaged file .*CRC"),
        (lambda path: change_column(path, "image_id", ["a", "b", None, "c"]), "value is missing"),
        (lambda path: change_column(path, "view", [0, None, 0, 0]), "value is missing"),
        (lambda path: change_column(path, "row", [0, 1, 2, 4]), "contradict each other"),
        (lambda path: change_column(path, "row", [0, 1, 2, -1]), "contradict each other"),
        (lambda path: change_column(path, "shard", ["regions-00009.h5"] * 4), "contradict each ot"),
        (lambda path: change_index(path, recipe={"m": 4}), "contradict each other"),
        (lambda path: change_index(path, feature_size=1 << 40), "contradict each other"),
        (lambda path: change_index(path, regions="3"), "contradict each other"),
        (lambda path: change_index(path, shards=[{**ENTRY, "rows": 3}]), "contradict each other"),
        (lambda path: change_index(path, shards=[{**ENTRY, "bytes": ""}]), "contradict each oth"),
        (
            lambda path: change_index(path, shards=[ENTRY, {**ENTRY, "name": "../x"}]),
            "contradict each other",
        ),
        (lambda path: change_index(path, format_version=1), r"version 1; expected 2\. Delete it"),
        (lambda path: change_index(path, format_version=3), r"version 3, .*Update gmpipe\.$"),
    ],
)
def test_a_damaged_index_is_refused(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    write_cache(folder, make_rows())
    spoil(folder / "index.parquet")
    with pytest.raises(GmpipeError, match=message) as caught:
        RegionCache.open(folder)
    assert str(caught.value).startswith(f"{folder / 'index.parquet'}: ")


def test_missing_images_are_named_and_counted(folder: Path) -> None:
    write_cache(folder, make_rows(2), make_rows(1, view=1))
    cache = RegionCache.open(folder)
    assert cache.lookup(["image-1", "image-0", "image-1"]).tolist() == [1, 0, 1]
    assert cache.lookup(["image-0"], view=1).tolist() == [2]
    assert cache.lookup([]).tolist() == []
    with pytest.raises(
        GmpipeError, match=r"no view 0 of image 'x', and 2 of 3 images lack it.*--dataset tiny`\.$"
    ):
        cache.lookup(["image-0", "x", "y"])
    with pytest.raises(GmpipeError, match="no view 1 of image 'image-1', and 1 of 1"):
        cache.lookup(["image-1"], view=1)


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_outside_the_cache_is_an_index_error(folder: Path, row: int) -> None:
    write_cache(folder, make_rows())
    with pytest.raises(IndexError, match=re.escape(f"row {row} of a cache of 4 rows")):
        RegionCache.open(folder).gather([0, row])


def test_a_cache_pickles_without_its_maps(folder: Path) -> None:
    rows = write_cache(folder, make_rows(rows=40, feature_size=1000))
    cache = RegionCache.open(folder)
    cache.gather(np.arange(40))
    stored = pickle.dumps(cache)
    assert len(stored) < rows.features.nbytes / 10
    copy = pickle.loads(stored)
    assert_same_rows(copy.gather([39, 0]), rows.take([39, 0]))
    # A damaged row is found by the copy, which checks anew, in the process that reads.
    header = read_header(folder / shard_name(0))
    with (folder / shard_name(0)).open("r+b") as stream:
        stream.seek(header.offsets["features"])
        stream.write(b"\xff")
    with pytest.raises(GmpipeError, match="is damaged"):
        pickle.loads(stored).gather([0])


def test_mapped_shards_hold_no_files_open(folder: Path) -> None:
    rows = write_cache(folder, *(make_rows(2, first=2 * part) for part in range(40)))
    cache = RegionCache.open(folder)
    cache.gather([0])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 20, limit[1])
    )
    try:
        assert_same_rows(cache.gather(np.arange(80)[::-1]), rows.take(np.arange(80)[::-1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_shard_that_changes_after_opening_is_refused(folder: Path) -> None:
    write_cache(folder, make_rows(), make_rows(first=4))
    cache = RegionCache.open(folder)
    path = folder / shard_name(1)
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(GmpipeError, match=r"h5: found \d+ bytes; expected \d+: it was changed"):
        cache.gather([4])
    path.unlink()
    with pytest.raises(GmpipeError, match=r"00001\.h5: there is no such shard\. Run `gmpipe ext"):
        cache.gather([4])


def test_rows_are_read_unchecked_only_on_request(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    with path.open("r+b") as stream:
        stream.seek(read_header(path).offsets["scores"])
        stream.write(b"\xff")
    assert RegionCache.open(folder, check_rows=False).gather([0]).scores.view(np.uint8)[0, 0] == 255
    with pytest.raises(GmpipeError, match="is damaged"):
        RegionCache.open(folder).gather([0])


ANONYMOUS_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from pipeline.shards.reader import RegionCache

def anonymous():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return 1024 * int(line.split()[1])

def read(folder):
    cache = RegionCache.open(folder)
    cache.lookup([f"image-{number}" for number in range(len(cache))])
    for start in range(0, len(cache), 32):
        cache.gather(np.arange(start, min(start + 32, len(cache))))
    return cache

small, large = map(Path, sys.argv[1:])
caches = [read(small)]
before = anonymous()
caches.append(read(large))
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
@pytest.mark.parametrize("rows", [10_000, 100_000])
def test_a_reader_takes_little_memory_of_its_own_for_a_row(tmp_path: Path, rows: int) -> None:
    for name, count in (("small", 1000), ("large", rows)):
        parts = [
            make_rows(1000, regions=1, feature_size=1, first=first)
            for first in range(0, count, 1000)
        ]
        write_cache(tmp_path / name, *parts)
    command = [sys.executable, "-c", ANONYMOUS_MEMORY, tmp_path / "small", tmp_path / "large"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 300 * rows


@pytest.fixture(scope="module")
def read_often(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegionCache, RegionRows]:
    folder = tmp_path_factory.mktemp("cache") / DATASET
    rows = write_cache(folder, make_rows(5), make_rows(1, first=5), make_rows(6, view=1))
    return RegionCache.open(folder), rows


@given(numbers=st.lists(st.integers(0, 11), max_size=30))
def test_gathered_rows_equal_their_source(
    read_often: tuple[RegionCache, RegionRows], numbers: list[int]
) -> None:
    cache, rows = read_often
    assert_same_rows(cache.gather(numbers), rows.take(numbers))
