"""One shard: an HDF5 file of region rows that is written whole and checked before it is read.

A shard is untrusted, since shards travel between machines. h5py opens it only to check what it
declares and to find where its arrays begin. The arrays are then mapped from the same file, which
reads single random rows several times faster.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedError, InputError, MismatchError, MissingError
from pipeline.files import canonical_json, open_regular, replacing
from pipeline.shards.schema import (
    AXES,
    CHECKSUMS,
    DTYPES,
    FORMAT_NAME,
    FORMAT_VERSION,
    WHOLE,
    Recipe,
    RegionRows,
    fields_of,
    fingerprint,
    holds_whole,
    layout_breach,
    row_checksums,
)

_SHARD_NAME = re.compile(r"regions-(\d{5,})\.h5")
_LAYOUTS = {h5py.h5d.COMPACT: "compact", h5py.h5d.CHUNKED: "chunked"}
_WRITE_AGAIN = "Delete it, and write its rows again."


@dataclass(frozen=True)
class ShardHeader:
    """What a shard declares, after a check that it follows the format."""

    dataset: str
    recipe: Recipe
    fingerprint: str
    """`schema.fingerprint` of the recipe."""
    rows: int
    """R."""
    regions: int
    """m."""
    feature_size: int
    """d."""
    feature_dtype: str
    """`float16` or `float32`."""
    id_width: int
    """Bytes of an image id, padding included."""
    offsets: Mapping[str, int]
    """The byte at which each array begins: the fields of the rows, and `row_crc32`."""


def shard_name(number: int) -> str:
    """The file name of a shard: `regions-00000.h5` for number 0."""
    return f"regions-{number:05d}.h5"


def is_shard_name(name: str) -> bool:
    """Whether a text is the file name of a shard, and so names no other folder."""
    return _SHARD_NAME.fullmatch(name) is not None


def whole_shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their numbers, without unfinished ones (`.tmp`).

    There are none in a folder that does not exist.

    Raises:
        OSError: the folder can't be read.
    """
    try:
        # Not `glob`, to which a folder that may not be read is an empty one.
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    numbers = {
        folder / name: int(match[1]) for name in names if (match := _SHARD_NAME.fullmatch(name))
    }
    return sorted(numbers, key=numbers.__getitem__)


# Writing -----------------------------------------------------------------------------------------


def write_shard(path: Path, rows: RegionRows, *, dataset: str, recipe: Recipe) -> None:
    """Write ``rows`` as the shard ``path``. The same rows give the same bytes.

    It is of format version 1 unless the rows have the field `whole`, as the recipe must say. The
    file is read back and compared before it gets its name.

    Raises:
        ValueError: rows and recipe don't agree on the field `whole`.
        InputError: the rows break their contract, or there are none.
        DamagedError: a row is not read back as it was written.
    """
    has_whole = rows.whole is not None
    if has_whole != holds_whole(recipe):
        raise ValueError(f"the rows have the fields {rows.fields}, but the recipe is {recipe}")
    rows.check()
    if len(rows) == 0:
        raise InputError(f"{path}: found no rows; a shard holds at least one.", "Write no shard.")
    checksums = row_checksums(rows)
    arrays = {field: getattr(rows, field) for field in rows.fields}
    # The smallest width that holds the ids, even if the rows were cut from a wider column.
    arrays["image_id"] = np.array(rows.image_id.tolist(), dtype=np.bytes_)
    arrays[CHECKSUMS] = checksums
    with replacing(path) as temporary:
        # Built in memory first, since HDF5 crashes the process on a full disk.
        image = io.BytesIO()
        # Fixed bounds: a newer HDF5 library may choose other structures, and so other bytes.
        with h5py.File(image, "w", libver=("earliest", "v110")) as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=np.ascontiguousarray(array), track_times=False)
            file.attrs["format_version"] = FORMAT_VERSION if has_whole else 1
            texts = {
                "format_name": FORMAT_NAME,
                "dataset": dataset,
                "fingerprint": fingerprint(recipe),
                "recipe": canonical_json(dict(recipe)),
            }
            # Of fixed length: HDF5 keeps others in a heap, and can hang on a damaged heap.
            for name, text in texts.items():
                file.attrs[name] = np.bytes_(text.encode())
        temporary.write_bytes(image.getbuffer())
        _, stored, stored_checksums = map_shard(temporary)
        damaged = (stored_checksums != checksums) | (row_checksums(stored) != checksums)
        if damaged.any():
            row = int(damaged.argmax())
            raise DamagedError(
                f"{path}: row {row} (image {rows.image_id[row].decode()!r}) was written with the "
                f"checksum {checksums[row]:#010x} and read back with another one.",
                "Check the disk, and run the command again.",
            )


# Reading -----------------------------------------------------------------------------------------


def read_header(path: Path) -> ShardHeader:
    """Check that a file is a shard of this format, without reading its arrays.

    Raises:
        MissingError: there is no such file.
        OSError: the system can't read it.
        DamagedError: it is not HDF5, truncated or of an older format, or one of its arrays is
            missing, unknown, linked from elsewhere, not contiguous, or of another dtype or shape
            than the format has. Names the file, the field, what was found and what was expected.
        MismatchError: a newer version of gmpipe wrote it.
    """
    try:
        # Without HDF5, which reports a disk or a permission that fails as a damaged file.
        with open_regular(path) as stream:
            stream.read(1)
    except FileNotFoundError:
        raise MissingError(f"{path}: there is no such shard.", "Write its rows again.") from None
    except InputError as error:  # it is no regular file
        remedy = "Move it away, and write its rows again."
        raise DamagedError(error.problem, remedy) from error
    try:
        # Without HDF5's lock, which many network file systems lack. A shard never changes once it
        # has its name, so there is no writer to wait for.
        with h5py.File(path, "r", locking=False) as file:
            return _checked_header(path, file)
    # h5py's exceptions for a damaged file: which one depends on the structure that is damaged.
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the system: a disk that fails is not a damaged file
        raise DamagedError(
            f"{path}: expected a shard, found a damaged or truncated file, or one that is not HDF5 "
            f"({error}).",
            _WRITE_AGAIN,
        ) from error


def map_shard(path: Path) -> tuple[ShardHeader, RegionRows, npt.NDArray[np.uint32]]:
    """Map a shard: its header, its rows and their stored checksums (R,).

    The arrays are read-only views of the file. Their contents are not checked: compare
    `schema.row_checksums` of the rows that are used with the stored ones.

    Raises:
        GmpipeError: as `read_header`.
    """
    header = read_header(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = {"R": header.rows, "m": header.regions, "d": header.feature_size, "4": 4}
    dtypes = {field: names[0] for field, names in DTYPES.items()}
    dtypes |= dict.fromkeys(("features", WHOLE), header.feature_dtype)
    dtypes["image_id"] = f"S{header.id_width}"
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ndarray(
            tuple(lengths[axis] for axis in AXES.get(name, "R")),
            np.dtype(dtypes[name]).newbyteorder("<"),
            buffer=mapped,
            offset=offset,
        )
        for name, offset in header.offsets.items()
    }
    checksums = arrays.pop(CHECKSUMS)
    return header, RegionRows(**arrays), checksums


def read_ids(path: Path) -> tuple[list[str], npt.NDArray[np.int16]]:
    """Read the image id and the view (R,) of each row of a shard.

    Raises:
        GmpipeError: as `read_header`.
        DamagedError: an image id is not UTF-8.
    """
    _, rows, _ = map_shard(path)
    return decoded_ids(path, rows), rows.view.copy()


def decoded_ids(path: Path, rows: RegionRows) -> list[str]:
    """Decode the image ids of the rows of the shard ``path``.

    Raises:
        DamagedError: one is not UTF-8.
    """
    try:
        return [image_id.decode() for image_id in rows.image_id.tolist()]
    except UnicodeDecodeError as error:
        raise DamagedError(
            f"{path}: image_id holds {error.object!r}; expected UTF-8.", _WRITE_AGAIN
        ) from error


def _checked_header(path: Path, file: h5py.File) -> ShardHeader:
    """The header of an open file; raises as `read_header`."""
    format_name = _text(path, file, "format_name")
    if format_name != FORMAT_NAME:
        _refuse(path, "attribute `format_name`", repr(format_name), repr(FORMAT_NAME))
    version = int(_attribute(path, file, "format_version", "iu", "an integer"))
    check_version(path, version, FORMAT_VERSION, oldest=1)
    dataset = _text(path, file, "dataset")
    recipe = sound_recipe(_text(path, file, "recipe"), _text(path, file, "fingerprint"))
    if recipe is None:
        taken = "not what `fingerprint` was computed from"
        _refuse(path, "attribute `recipe`", taken, "a sound recipe")
    has_whole = version == FORMAT_VERSION
    if holds_whole(recipe) != has_whole:
        found = f"{'without' if has_whole else 'with'} `{WHOLE}: true`"
        _refuse(path, "attribute `recipe`", found, f"a recipe of format version {version}")
    names = [*fields_of(whole=has_whole), CHECKSUMS]
    for name in sorted({*names, *file} - ({*names} & {*file})):
        if name in names:
            _refuse(path, f"array `{name}`", "missing", "an array of the format")
        _refuse(path, f"`{name}`", "in the file", "only the arrays of the format")
    offsets = {name: _checked_array(path, file, name) for name in names}
    rows, regions, feature_size = file["features"].shape
    return ShardHeader(
        dataset=dataset,
        recipe=recipe,
        fingerprint=fingerprint(recipe),
        rows=rows,
        regions=regions,
        feature_size=feature_size,
        feature_dtype=file["features"].dtype.name,
        id_width=file["image_id"].dtype.itemsize,
        offsets=offsets,
    )


def _checked_array(path: Path, file: h5py.File, name: str) -> int:
    """The byte at which an array of an open file begins; raises as `read_header`."""
    field = f"array `{name}`"
    # Checked before it is followed: a link may lead to any file of this machine.
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        _refuse(path, field, f"a link ({type(link).__name__})", "an array in the file")
    array = file[name]
    if not isinstance(array, h5py.Dataset):
        _refuse(path, field, f"a {type(array).__name__}", "an array")
    layout = array.id.get_create_plist()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters():
        stored = f"stored {_LAYOUTS.get(layout.get_layout(), 'virtual')}"
        _refuse(path, field, stored, "contiguous storage without filters")
    if layout.get_external_count():
        _refuse(path, field, "stored in another file", "an array in the file")
    breach = layout_breach(name, array, file["features"])
    if breach:
        raise DamagedError(f"{path}: {breach}.", _WRITE_AGAIN)
    # An HDF5 type may be wider or packed differently than the numpy dtype that h5py shows.
    if not array.id.get_type().equal(h5py.h5t.py_create(array.dtype)):
        _refuse(path, field, "of another HDF5 type", f"plain {array.dtype}")
    offset = array.id.get_offset()
    if offset is None:
        _refuse(path, field, "without storage", "at least one row")
    # Not `array.nbytes`, which overflows for a shape that no file can hold.
    size = math.prod(array.shape) * array.dtype.itemsize
    if offset + size > path.stat().st_size:
        _refuse(path, field, "cut off", f"{size} bytes from byte {offset} on")
    return int(offset)


def _attribute(path: Path, file: h5py.File, name: str, kinds: str, expected: str) -> Any:
    """The value of an attribute whose dtype is of one of the ``kinds``, numpy's letters."""
    field = f"attribute `{name}`"
    if name not in file.attrs:
        _refuse(path, field, "missing", expected)
    # Checked before it is read: HDF5 can hang on variable-length text in a damaged file.
    stored = file.attrs.get_id(name)
    if stored.shape != () or stored.dtype.kind not in kinds:
        _refuse(path, field, f"of dtype {stored.dtype} {stored.shape}", expected)
    if stored.dtype.itemsize > path.stat().st_size:
        _refuse(path, field, f"of {stored.dtype.itemsize} bytes", "one in the file")
    return file.attrs[name]


def _text(path: Path, file: h5py.File, name: str) -> str:
    value: bytes = _attribute(path, file, name, "S", "fixed-length text")
    return value.decode()


def _refuse(path: Path, field: str, found: str, expected: str) -> NoReturn:
    raise DamagedError(f"{path}: {field} is {found}; expected {expected}.", _WRITE_AGAIN)


def check_version(path: Path, version: int, newest: int, *, oldest: int | None = None) -> None:
    """Refuse every version of a format but those from ``oldest``, by default ``newest``, on.

    Raises:
        MismatchError: the version is newer.
        DamagedError: it is older.
    """
    oldest = newest if oldest is None else oldest
    expected = " or ".join(map(str, range(oldest, newest + 1)))
    if version > newest:
        raise MismatchError(
            f"{path}: found format version {version}, which a newer gmpipe wrote; expected "
            f"{expected}.",
            "Update gmpipe.",
        )
    if version < oldest:
        raise DamagedError(
            f"{path}: found format version {version}; expected {expected}.", _WRITE_AGAIN
        )


def sound_recipe(text: str, stored_fingerprint: str) -> Recipe | None:
    """Parse a recipe in JSON; None if it is not a flat one with this fingerprint."""
    recipe = json.loads(text)
    if not isinstance(recipe, dict) or fingerprint(recipe) != stored_fingerprint:
        return None
    if not all(isinstance(value, str | int | float | None) for value in recipe.values()):
        return None
    return recipe
