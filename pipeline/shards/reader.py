"""Shards and their index back to region rows. Both are untrusted: they travel between machines.

A shard is opened with h5py only to check what it declares and to find where its arrays lie;
they are then mapped from the same file, which reads single random rows several times faster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import GmpipeError
from pipeline.shards.schema import (
    AXES,
    CHECKSUMS,
    DTYPES,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    Recipe,
    RegionRows,
    ShardEntry,
    check_same_recipe,
    fingerprint,
    layout_breach,
    row_checksums,
)

MAPPED_SHARDS = 256
"""Shards that a `RegionCache` keeps mapped: each costs a file descriptor, of which a process
commonly has 1024, and a large data set with many views has more shards than that."""

_SHARD_NAME = re.compile(r"regions-(\d{5,})\.h5")
INDEX_COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("view", pa.int16()),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ShardHeader:
    """What a shard declares, once it was found to keep to the format."""

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
    """Byte at which each array begins in the file: the fields of `schema.AXES`, and `row_crc32`."""


def read_header(path: Path) -> ShardHeader:
    """Check that a file is a shard of this format, without reading its arrays.

    Raises:
        GmpipeError: it is missing, no HDF5, truncated, of another or a newer format, or an array
            of it is missing, unknown, linked from elsewhere, not contiguous, or of another dtype
            or shape than the format has. Names the file, the field, what was found and expected.
    """
    if not path.is_file():
        raise GmpipeError(f"{path}: there is no such shard. {_run_extract(path.parent)}")
    try:
        with h5py.File(path, "r") as file:
            return _checked_header(path, file)
    # h5py's exceptions for a damaged file: which one depends on the structure that is damaged.
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise GmpipeError(
            f"{path}: found a damaged or truncated file, or none of HDF5 ({error}); expected a "
            f"shard. {_redo(path)}"
        ) from error


def map_shard(path: Path) -> tuple[ShardHeader, RegionRows, npt.NDArray[np.uint32]]:
    """Map a shard: its header, its rows and their stored checksums (R,).

    The arrays are read-only views of the file. Nothing of their contents was checked: compare
    `schema.row_checksums` of the rows that are used with the stored ones.

    Raises:
        GmpipeError: as `read_header`.
    """
    header = read_header(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = {"R": header.rows, "m": header.regions, "d": header.feature_size, "4": 4}
    dtypes = {
        "features": header.feature_dtype,
        "boxes": "float32",
        "scores": "float32",
        "image_id": f"S{header.id_width}",
        CHECKSUMS: "uint32",
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ndarray(
            tuple(lengths[axis] for axis in AXES.get(name, "R")),
            np.dtype(dtypes.get(name, "int16")).newbyteorder("<"),
            buffer=mapped,
            offset=offset,
        )
        for name, offset in header.offsets.items()
    }
    checksums = arrays.pop(CHECKSUMS)
    return header, RegionRows(**arrays), checksums


def whole_shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their numbers, without unfinished ones (`.tmp`)."""
    numbers = {
        path: int(match[1])
        for path in folder.glob("regions-*.h5")
        if (match := _SHARD_NAME.fullmatch(path.name))
    }
    return sorted(numbers, key=numbers.__getitem__)


def read_ids(path: Path) -> tuple[list[str], npt.NDArray[np.int16]]:
    """Image id and view (R,) of each row of a shard: what a resumed extraction need not redo.

    Raises:
        GmpipeError: as `read_header`, or an image id is not UTF-8.
    """
    _, rows, _ = map_shard(path)
    try:
        image_ids = [image_id.decode() for image_id in rows.image_id.tolist()]
    except UnicodeDecodeError as error:
        raise GmpipeError(
            f"{path}: image_id holds {error.object!r}; expected UTF-8. {_redo(path)}"
        ) from error
    return image_ids, rows.view.copy()


class RegionCache:
    """All rows of a data set's shards, by number, in the order of the index.

    Shards are mapped when a row of theirs is first wanted, in the process that wants it: a cache
    may be pickled, and a process that holds one may be forked. Every row is held against its
    checksum before the process uses it for the first time.
    """

    def __init__(self, folder: Path, table: pa.Table, about: Mapping[str, Any]) -> None:
        """Use `open`; ``table`` and ``about`` are an index that was found sound."""
        self.folder = folder
        self.dataset: str = about["dataset"]
        self.recipe: Recipe = about["recipe"]
        self.fingerprint: str = about["fingerprint"]
        self.regions: int = about["regions"]
        """m."""
        self.feature_size: int = about["feature_size"]
        """d."""
        self.feature_dtype: str = about["feature_dtype"]
        """`float16` or `float32`."""
        self.shards: tuple[ShardEntry, ...] = about["shards"]
        self.ids: list[str] = table["image_id"].to_pylist()
        """Image id of each row, (len(self),)."""
        self.views: npt.NDArray[np.int16] = table["view"].to_numpy()
        """View of each row, (len(self),)."""
        numbers = {entry.name: number for number, entry in enumerate(self.shards)}
        self._shard = np.array([numbers[name] for name in table["shard"].to_pylist()], np.int32)
        self._row: npt.NDArray[np.int32] = table["row"].to_numpy()
        self._image_id = np.array([image_id.encode() for image_id in self.ids], np.bytes_)
        self._forget()

    @classmethod
    def open(cls, folder: Path, recipe: Recipe | None = None) -> RegionCache:
        """Read the index of ``folder`` and compare it with the shards' sizes.

        Args:
            recipe: what the features must have been made with; None takes any.

        Raises:
            GmpipeError: the index is missing, damaged, of another format or another recipe, or a
                shard is missing or of another size than the index says.
        """
        table, about = _read_index(folder)
        if recipe is not None:
            check_same_recipe(about["recipe"], recipe, str(folder))
        return cls(folder, table, about)

    def __len__(self) -> int:
        """Rows of all shards."""
        return len(self.ids)

    def lookup(self, image_ids: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Row numbers (N,) of one view of each of N images.

        Raises:
            GmpipeError: names the first image that has no such view, and how many have none.
        """
        if view not in self._by_view:
            rows = np.flatnonzero(self.views == view).tolist()
            self._by_view[view] = {self.ids[row]: row for row in rows}
        known = self._by_view[view]
        missing = [image_id for image_id in image_ids if image_id not in known]
        if missing:
            raise GmpipeError(
                f"{self.folder}: found no view {view} of image {missing[0]!r}, and {len(missing)} "
                f"of {len(image_ids)} images lack it; expected all of them. "
                f"{_run_extract(self.folder)}"
            )
        return np.array([known[image_id] for image_id in image_ids], dtype=np.int64)

    def gather(self, rows: npt.ArrayLike) -> RegionRows:
        """Copy the rows of these numbers (N,), in that order; repeats are allowed.

        Raises:
            IndexError: a number is not in 0 to len(self) - 1.
            GmpipeError: a row is damaged or breaks the contract, or a shard is not the one that
                the index lists. Names the shard, the row and its image.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        outside = (numbers < 0) | (numbers >= len(self))
        if outside.any():
            raise IndexError(f"row {numbers[outside][0]} of a cache of {len(self)} rows")
        shape = (len(numbers), self.regions)
        gathered = RegionRows(
            features=np.empty((*shape, self.feature_size), dtype=self.feature_dtype),
            boxes=np.empty((*shape, 4), dtype=np.float32),
            scores=np.empty(shape, dtype=np.float32),
            classes=np.empty(shape, dtype=np.int16),
            count=np.empty(len(numbers), dtype=np.int16),
            image_id=self._image_id[numbers],
            view=self.views[numbers],
        )
        order = np.argsort(self._shard[numbers], kind="stable")
        ends = np.flatnonzero(np.diff(self._shard[numbers[order]])) + 1
        for places in np.split(order, ends) if len(order) else ():
            wanted = numbers[places]
            stored = self._checked_shard(int(self._shard[wanted[0]]), np.unique(wanted))
            for field in ("features", "boxes", "scores", "classes", "count"):
                getattr(gathered, field)[places] = getattr(stored, field)[self._row[wanted]]
        return gathered

    def _checked_shard(self, shard: int, numbers: npt.NDArray[np.int64]) -> RegionRows:
        """All rows of a shard, mapped, of which those of ``numbers`` are known to be sound."""
        stored, checksums = self._mapped(shard)
        numbers = numbers[~self._checked[numbers]]
        if len(numbers) == 0:
            return stored
        path = self.folder / self.shards[shard].name
        fresh = stored.take(self._row[numbers])
        found, expected = row_checksums(fresh), checksums[self._row[numbers]]
        for place in np.flatnonzero(found != expected):
            number = numbers[place]
            raise GmpipeError(
                f"{path}: row {self._row[number]} (image {self.ids[number]!r}, view "
                f"{self.views[number]}) is damaged: its checksum is {found[place]:#010x}, "
                f"expected {expected[place]:#010x}. {_redo(path)}"
            )
        try:
            fresh.check()
        except GmpipeError as error:
            raise GmpipeError(f"{path}: {error} {_redo(path)}") from error
        moved = (fresh.image_id != self._image_id[numbers]) | (fresh.view != self.views[numbers])
        for place in np.flatnonzero(moved):
            number = numbers[place]
            raise GmpipeError(
                f"{path}: row {self._row[number]} holds image {fresh.image_id[place].decode()!r}, "
                f"view {fresh.view[place]}; expected {self.ids[number]!r}, view "
                f"{self.views[number]}, as {INDEX_NAME} says. {_run_extract(self.folder)}"
            )
        self._checked[numbers] = True
        return stored

    def _mapped(self, shard: int) -> tuple[RegionRows, npt.NDArray[np.uint32]]:
        """A shard's rows and stored checksums; the shard longest unused makes room for it."""
        if shard in self._maps:
            self._maps[shard] = self._maps.pop(shard)
            return self._maps[shard]
        entry = self.shards[shard]
        path = self.folder / entry.name
        header, rows, checksums = map_shard(path)
        check_same_recipe(header.recipe, self.recipe, str(path))
        found = (header.rows, header.regions, header.feature_size, header.feature_dtype)
        expected = (entry.rows, self.regions, self.feature_size, self.feature_dtype)
        if found != expected:
            raise GmpipeError(
                f"{path}: found (R, m, d, dtype) {found}; expected {expected}, as {INDEX_NAME} "
                f"says. {_run_extract(self.folder)}"
            )
        if len(self._maps) >= MAPPED_SHARDS:
            del self._maps[next(iter(self._maps))]
        self._maps[shard] = rows, checksums
        return self._maps[shard]

    def _forget(self) -> None:
        """Drop what belongs to one process: maps, what was checked, and tables made on demand."""
        self._maps: dict[int, tuple[RegionRows, npt.NDArray[np.uint32]]] = {}
        self._checked = np.zeros(len(self.ids), dtype=np.bool_)
        self._by_view: dict[int, dict[str, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_maps", "_checked", "_by_view"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _checked_header(path: Path, file: h5py.File) -> ShardHeader:
    """The header of an open file; raises as `read_header`."""

    def refuse(field: str, found: object, expected: str, step: str | None = None) -> NoReturn:
        step = step or _redo(path)
        raise GmpipeError(f"{path}: {field} is {found}; expected {expected}. {step}")

    def attribute(name: str, kinds: str, expected: str) -> Any:
        if name not in file.attrs:
            refuse(f"attribute `{name}`", "missing", expected)
        # Looked at before it is read: HDF5 can hang on variable-length text of a damaged file.
        stored = file.attrs.get_id(name)
        if stored.shape != () or stored.dtype.kind not in kinds:
            refuse(f"attribute `{name}`", f"of dtype {stored.dtype} {stored.shape}", expected)
        return file.attrs[name]

    def text(name: str) -> str:
        value: bytes = attribute(name, "S", "fixed-length text")
        return value.decode()

    if (found_name := text("format_name")) != FORMAT_NAME:
        refuse("attribute `format_name`", repr(found_name), repr(FORMAT_NAME))
    version = int(attribute("format_version", "iu", "an integer"))
    _check_version(str(path), version, _redo(path))
    dataset = text("dataset")
    recipe = _sound_recipe(text("recipe"), text("fingerprint"))
    if recipe is None:
        refuse("attribute `recipe`", "not what `fingerprint` was taken over", "a sound recipe")

    names = [*AXES, CHECKSUMS]
    for name in sorted({*names, *file} - ({*names} & {*file})):
        if name in names:
            refuse(f"array `{name}`", "missing", "an array of the format")
        refuse(f"`{name}`", "in the file", "only the arrays of the format")
    offsets: dict[str, int] = {}
    for name in names:
        # Looked at before it is followed: a link may lead to any file of this machine.
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            refuse(f"array `{name}`", f"a link ({type(link).__name__})", "an array in the file")
        array = file[name]
        if not isinstance(array, h5py.Dataset):
            refuse(f"array `{name}`", f"a {type(array).__name__}", "an array")
        layout = array.id.get_create_plist()
        if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters():
            kinds = {h5py.h5d.COMPACT: "compact", h5py.h5d.CHUNKED: "chunked"}
            found = kinds.get(layout.get_layout(), "virtual")
            refuse(f"array `{name}`", f"stored {found}", "contiguous storage without filters")
        if layout.get_external_count():
            refuse(f"array `{name}`", "stored in another file", "an array in the file")
        breach = layout_breach(name, array.shape, array.dtype, file["features"].shape)
        if breach:
            raise GmpipeError(f"{path}: {breach}. {_redo(path)}")
        # An HDF5 type may be wider or packed otherwise than the numpy dtype it is presented as.
        if not array.id.get_type().equal(h5py.h5t.py_create(array.dtype)):
            refuse(f"array `{name}`", "of another HDF5 type", f"plain {array.dtype}")
        offset = array.id.get_offset()
        if offset is None:
            refuse(f"array `{name}`", "without storage", "at least one row")
        if offset + array.nbytes > path.stat().st_size:
            refuse(f"array `{name}`", "cut off", f"{array.nbytes} bytes from byte {offset} on")
        offsets[name] = offset
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


def _read_index(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Table and metadata of a sound index, `shards` as entries; raises as `RegionCache.open`."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise GmpipeError(f"{path}: there is no index of regions. {_run_extract(folder)}")
    remake = f"Delete it and run `gmpipe extract --dataset {folder.name}` again."
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        about: dict[str, Any] = json.loads(table.schema.metadata[b"gmpipe"])
        _check_version(str(path), about["format_version"], remake)
        recipe = _sound_recipe(json.dumps(about["recipe"]), about["fingerprint"])
        about["shards"] = entries = tuple(ShardEntry(**entry) for entry in about["shards"])
        rows = {entry.name: entry.rows for entry in entries}
        limits = np.array([rows[name] for name in table["shard"].to_pylist()], dtype=np.int64)
        places = table["row"].to_numpy()
        sound = (
            recipe is not None
            and isinstance(about["dataset"], str)
            and all(isinstance(about[size], int) for size in ("regions", "feature_size"))
            and about["feature_dtype"] in DTYPES["features"]
            and table.schema.equals(INDEX_COLUMNS)
            and not any(column.null_count for column in table.columns)
            and all(_SHARD_NAME.fullmatch(entry.name) for entry in entries)
            and bool(((places >= 0) & (places < limits)).all())
        )
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise GmpipeError(
            f"{path}: found a damaged file or another format ({error!r}); expected an index of "
            f"format version {FORMAT_VERSION}. {remake}"
        ) from error
    if not sound:
        raise GmpipeError(
            f"{path}: found columns, rows or metadata that contradict each other; expected what "
            f"`gmpipe extract` wrote. {remake}"
        )
    for entry in entries:
        shard = folder / entry.name
        size: int | None = None
        with suppress(FileNotFoundError):
            size = shard.stat().st_size
        if size is None:
            raise GmpipeError(f"{shard}: {INDEX_NAME} lists it; not found. {_run_extract(folder)}")
        if size != entry.bytes:
            raise GmpipeError(
                f"{shard}: found {size} bytes; expected {entry.bytes}, as {INDEX_NAME} says. "
                f"{_redo(shard)}"
            )
    return table, about


def _check_version(where: str, version: int, step: str) -> None:
    """Refuse every version of the format but this one, the newer ones by name."""
    if version > FORMAT_VERSION:
        raise GmpipeError(
            f"{where}: found format version {version}, which a newer gmpipe wrote; expected "
            f"{FORMAT_VERSION}. Update gmpipe."
        )
    if version != FORMAT_VERSION:
        raise GmpipeError(
            f"{where}: found format version {version}; expected {FORMAT_VERSION}. {step}"
        )


def _sound_recipe(text: str, stored_fingerprint: str) -> Recipe | None:
    """The recipe in a JSON text, or None if it isn't a flat one of this fingerprint."""
    recipe = json.loads(text)
    if not isinstance(recipe, dict) or fingerprint(recipe) != stored_fingerprint:
        return None
    if not all(isinstance(value, str | int | float | None) for value in recipe.values()):
        return None
    return recipe


def _run_extract(folder: Path) -> str:
    return f"Run `gmpipe extract --dataset {folder.name}`."


def _redo(path: Path) -> str:
    return (
        f"Delete it and run `gmpipe extract --dataset {path.parent.name}` again, which redoes "
        "only what is missing."
    )
