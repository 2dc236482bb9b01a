"""One shard: written whole or not at all, and nothing that is not a shard is opened as one."""

from __future__ import annotations

import fcntl
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from builders import make_rows
from caches import (
    DATASET,
    RECIPE,
    RECIPE_OF_WHOLE,
    assert_same_rows,
    changed_rows,
    cut,
    write_cache,
)

from pipeline.errors import AccessError, DamagedError, InputError, MismatchError, MissingError
from pipeline.files import canonical_json, sha256_file
from pipeline.shards.schema import AXES, FORMAT_VERSION, Recipe, fingerprint, row_checksums
from pipeline.shards.shard import (
    map_shard,
    read_header,
    read_ids,
    shard_name,
    whole_shards,
    write_shard,
)

# Writing -----------------------------------------------------------------------------------------


def test_the_stored_layout_is_the_documented_one(shard: Path) -> None:
    with h5py.File(shard, "r") as file:
        assert set(file) == {*AXES, "row_crc32"} - {"whole"}
        assert file.attrs["format_version"] == 1
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


def test_rows_with_the_whole_view_are_of_version_2(shard_of_whole: Path) -> None:
    rows = make_rows(whole=True)
    with h5py.File(shard_of_whole, "r") as file:
        assert set(file) == {*AXES, "row_crc32"}
        assert file.attrs["format_version"] == FORMAT_VERSION == 2
        np.testing.assert_array_equal(file["whole"], rows.whole)
        assert file["whole"].dtype == np.float16
        np.testing.assert_array_equal(file["row_crc32"], row_checksums(rows))
    header, stored, _ = map_shard(shard_of_whole)
    assert header.recipe == RECIPE_OF_WHOLE
    assert_same_rows(stored, rows)


def test_a_recipe_says_whether_the_rows_have_the_whole_view(shard_of_whole: Path) -> None:
    """So that the vectors can't get lost, or be taken for those of another cache, unnoticed."""
    for rows, recipe in ((make_rows(), RECIPE_OF_WHOLE), (make_rows(whole=True), RECIPE)):
        with pytest.raises(ValueError, match="fields"):
            write_shard(shard_of_whole, rows, dataset=DATASET, recipe=recipe)


@pytest.mark.parametrize("version", [1, 2])
def test_an_array_that_the_version_lacks_or_needs_is_named(
    shard: Path, tmp_path: Path, version: int
) -> None:
    """A shard can't be turned into one of the other version by its attributes alone."""
    path = tmp_path / shard_name(1)
    recipe = RECIPE if version == 2 else RECIPE_OF_WHOLE
    write_shard(path, make_rows(whole=version == 1), dataset=DATASET, recipe=recipe)
    set_attribute(path, "format_version", version)
    with pytest.raises(DamagedError, match=rf"`recipe`.*whole.*version {version}"):
        read_header(path)
    set_recipe(path, RECIPE_OF_WHOLE if version == 2 else RECIPE)
    with pytest.raises(DamagedError, match=r"regions-00001\.h5: .*`whole`"):
        read_header(path)


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
    with pytest.raises(InputError, match=r"count.*0"):
        write_shard(path, changed_rows("count", 1, 0), dataset=DATASET, recipe=RECIPE)
    with pytest.raises(InputError, match=r"regions-00000\.h5"):
        write_shard(path, make_rows().take([]), dataset=DATASET, recipe=RECIPE)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError("No space left on device"), AccessError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_interrupted_write_leaves_no_file(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: type[BaseException],
) -> None:
    write = h5py.Group.create_dataset

    def fail_late(group: h5py.Group, name: str, **options: Any) -> h5py.Dataset:
        if name == "view":
            raise error
        return write(group, name, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", fail_late)
    with pytest.raises(kind):
        write_shard(folder / shard_name(0), make_rows(), dataset=DATASET, recipe=RECIPE)
    assert list(folder.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_shard(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256_file(shard)
    write = h5py.Group.create_dataset

    def write_wrongly(group: h5py.Group, name: str, data: Any, **options: Any) -> h5py.Dataset:
        return write(group, name, data=data / 2 if name == "features" else data, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", write_wrongly)
    with pytest.raises(DamagedError, match=r"regions-00000\.h5.*row 0.*'image-7'"):
        write_shard(shard, make_rows(first=7), dataset=DATASET, recipe=RECIPE)
    assert list(shard.parent.iterdir()) == [shard]
    assert sha256_file(shard) == before


def test_whole_shards_are_sorted_by_number_without_unfinished_ones(tmp_path: Path) -> None:
    names = ["regions-100000.h5", "regions-00002.h5", "regions-99999.h5"]
    for name in [*names, "regions-00003.h5.0123abcd.tmp", "regions-x.h5", "index.parquet"]:
        (tmp_path / name).touch()
    listed = [path.name for path in whole_shards(tmp_path)]
    assert listed == ["regions-00002.h5", "regions-99999.h5", "regions-100000.h5"]


# Refusing ----------------------------------------------------------------------------------------


def replace_array(shard: Path, name: str, **options: Any) -> None:
    """Store an array again with other ``options`` of `create_dataset`."""
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


def set_recipe(shard: Path, recipe: Recipe) -> None:
    set_attribute(shard, "recipe", canonical_json(dict(recipe)))
    set_attribute(shard, "fingerprint", fingerprint(recipe))


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


EXTERNAL = h5py.ExternalLink("other.h5", "/boxes")
OUTSIDE = {"external": [("other.bin", 0, 8)], "shape": (4,), "dtype": "int16", "data": None}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: drop(s, "whole"), "`whole`.*missing"),
        (lambda s: replace_array(s, "whole", dtype="f4"), "whole.*float32.*float16"),
        (lambda s: replace_array(s, "whole", data=np.zeros((4, 6), "f2")), r"\(4, 6\).*\(4, 5\)"),
        (lambda s: replace_array(s, "whole", chunks=(1, 5)), "`whole`.*chunked"),
        (lambda s: link_array(s, "whole", EXTERNAL), "`whole`.*ExternalLink"),
    ],
)
def test_a_shard_of_version_2_needs_a_sound_array_of_whole_views(
    shard_of_whole: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(shard_of_whole)
    with pytest.raises(DamagedError, match=message) as caught:
        read_header(shard_of_whole)
    assert str(caught.value).startswith(f"{shard_of_whole}: ")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: shard.write_bytes(b""), "HDF5"),
        (lambda shard: shard.write_text("no HDF5 " * 99), "HDF5"),
        (lambda shard: cut(shard, shard.stat().st_size - 1), "truncated"),
        (lambda shard: cut(shard, 100), "truncated"),
        (lambda s: link_array(s, "boxes", EXTERNAL), "`boxes`.*ExternalLink"),
        (lambda s: link_array(s, "boxes", h5py.SoftLink("/elsewhere")), "`elsewhere`"),
        (
            lambda s: link_array(s, "boxes", h5py.SoftLink("/scores")) or drop(s, "elsewhere"),
            "`boxes`.*SoftLink",
        ),
        (make_virtual, "`boxes`.*virtual.*contiguous"),
        (lambda s: replace_array(s, "boxes", chunks=(1, 3, 4)), "`boxes`.*chunked"),
        (lambda s: replace_array(s, "boxes", compression="gzip"), "`boxes`.*chunked"),
        (lambda s: replace_array(s, "view", **OUTSIDE), "`view`"),
        (lambda s: replace_array(s, "boxes", dtype="f8"), "boxes.*float64.*float32"),
        (lambda s: replace_array(s, "view", dtype=">i2"), "view.*>i2.*int16"),
        (make_enum, "`view`.*int16"),
        (lambda s: replace_array(s, "view", data=np.zeros(3, "i2")), r"view.*\(3,\).*\(4,\)"),
        (lambda s: replace_array(s, "image_id", dtype=h5py.string_dtype()), "image_id"),
        (make_group, "`view`.*Group"),
        (lambda s: drop(s, "row_crc32"), "`row_crc32`.*missing"),
        (add, "`extra`"),
        (lambda s: set_attribute(s, "format_name", "zip"), "`format_name`.*'zip'.*'gmpipe-reg"),
        (lambda s: set_attribute(s, "format_name", 7), "`format_name`.*int64"),
        (lambda s: set_attribute(s, "dataset", h5py.Empty("S9")), "`dataset`"),
        (lambda s: set_text_of_any_length(s, "dataset"), "`dataset`.*object"),
        (lambda s: set_attribute(s, "format_version", [1, 1]), "`format_version`.*int"),
        (lambda s: drop(s, "dataset"), "`dataset`.*missing"),
        (lambda s: set_attribute(s, "format_version", 0), "version 0.*1 or 2"),
        (lambda s: set_attribute(s, "recipe", '{"m": 4}'), "`recipe`.*`fingerprint`"),
        (lambda s: set_attribute(s, "recipe", "{"), "HDF5|recipe"),
    ],
)
def test_what_is_not_a_shard_of_this_format_is_refused(
    shard: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(shard)
    with pytest.raises(DamagedError, match=message) as caught:
        read_header(shard)
    assert str(caught.value).startswith(f"{shard}: ")


def test_a_missing_shard_is_named(folder: Path) -> None:
    path = folder / shard_name(3)
    with pytest.raises(MissingError, match=r"regions-00003\.h5"):
        read_header(path)


def test_a_shard_without_rows_is_refused(shard: Path) -> None:
    for name in [*make_rows().fields, "row_crc32"]:
        with h5py.File(shard, "r") as file:
            data = file[name][:0]
        replace_array(shard, name, data=data)
    with pytest.raises(DamagedError, match="`features`"):
        read_header(shard)


@pytest.mark.parametrize("field", AXES)
@pytest.mark.parametrize("rows", [5, 10**6, 2**58, 2**62, 2**63 - 1])
def test_a_shape_that_the_file_can_not_hold_is_refused(
    shard_of_whole: Path, field: str, rows: int
) -> None:
    shard = shard_of_whole
    with h5py.File(shard, "r") as file:
        shape = file[field].shape
        header = h5py.h5o.get_info(file[field].id).addr
    stored, declared = (struct.pack(f"<{len(shape)}Q", r, *shape[1:]) for r in (4, rows))
    content = bytearray(shard.read_bytes())
    start = content.index(stored, header)
    assert content[start + len(stored) :].startswith(stored)  # the maximum, which is the same
    content[start : start + 2 * len(stored)] = 2 * declared
    shard.write_bytes(content)
    with pytest.raises(DamagedError, match=r"regions-00000\.h5"):
        map_shard(shard)


def test_a_text_that_the_file_can_not_hold_is_refused(shard: Path) -> None:
    content = shard.read_bytes()
    size = struct.pack("<I", len(DATASET))
    # The dtype of the attribute follows its name: class and version, character set, size.
    start = content.index(size, content.index(b"dataset\0"))
    shard.write_bytes(content[:start] + struct.pack("<I", 1 << 31) + content[start + 4 :])
    with pytest.raises(DamagedError, match=r"regions-00000\.h5"):
        read_header(shard)


def test_a_shard_that_another_process_has_locked_is_read(shard: Path) -> None:
    with shard.open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert read_header(shard).rows == 4


def test_a_newer_format_is_refused_by_name(shard: Path) -> None:
    set_attribute(shard, "format_version", FORMAT_VERSION + 1)
    with pytest.raises(MismatchError, match=r"version 3.*Update gmpipe"):
        read_header(shard)


def test_ids_that_are_not_text_are_refused(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["image_id"][2] = b"\xff"
    with pytest.raises(DamagedError, match=r"image_id.*b'\\xff'.*UTF-8"):
        read_ids(shard)
