"""Shards and their index back to region rows. Both are untrusted: they travel between machines.

A shard is opened with h5py only to check what it declares and to find where its arrays lie;
they are then mapped from the same file, which reads single random rows several times faster.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import GmpipeError
from pipeline.shards.mapping import MappedFiles
from pipeline.shards.schema import (
    AXES,
    CHECKSUMS,
    DTYPES,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    INDEX_VERSION,
    Recipe,
    RegionRows,
    ShardEntry,
    check_same_recipe,
    fingerprint,
    layout_breach,
    row_checksums,
    without_images,
)

_INDEX_PART = 1024
"""Rows of an index that are decoded together."""

_LOOKED_UP = 4096  # images whose rows are looked for together
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
        # Without HDF5's lock, which many network file systems lack: a shard never changes once it
        # has its name, so there is no writer to wait for.
        with h5py.File(path, "r", locking=False) as file:
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
    checksum and its contract before the process uses it for the first time.

    What a process holds for each row are some 15 bytes and as many as the longest image id has.
    """

    def __init__(self, folder: Path, index: Index, *, check_rows: bool) -> None:
        """Use `open`."""
        self.folder = folder
        self.dataset = index.dataset
        self.recipe = index.recipe
        self.fingerprint = index.fingerprint
        self.regions = m = index.regions
        """m."""
        self.feature_size = d = index.feature_size
        """d."""
        self.feature_dtype = index.feature_dtype
        """`float16` or `float32`."""
        self.shards = index.shards
        self.views = index.views
        """View of each row, (len(self),)."""
        self._index = index
        self._check_rows = check_rows
        self._checked = np.zeros(len(self), dtype=np.bool_)
        self._files = MappedFiles([entry.bytes for entry in index.shards])
        forms: dict[str, npt.DTypeLike] = {
            "features": (index.feature_dtype, (m, d)),
            "boxes": ("<f4", (m, 4)),
            "scores": ("<f4", (m,)),
            "classes": ("<i2", (m,)),
            "count": "<i2",
            "view": "<i2",
            CHECKSUMS: "<u4",
        }
        # What a row has of a field: for numpy, a dtype that comprises a shape.
        self._forms = {field: np.dtype(form) for field, form in forms.items()}
        self._sizes = np.array([form.itemsize for form in self._forms.values()], dtype=np.int64)
        self._items = {
            field: self._files.items(form.itemsize) for field, form in self._forms.items()
        }
        # Of each shard: whether it is mapped, and where in the maps its arrays begin.
        shards = len(index.shards)
        self._is_mapped = np.zeros(shards, dtype=np.bool_)
        self._all_mapped = False
        self._places = np.zeros((shards, len(forms)), dtype=np.int64)
        self._id_places = np.zeros(shards, dtype=np.int64)
        self._id_widths = np.zeros(shards, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """A cache pickles as its index: maps, and what was checked, belong to one process."""
        return partial(RegionCache, check_rows=self._check_rows), (self.folder, self._index)

    @classmethod
    def open(
        cls, folder: Path, recipe: Recipe | None = None, *, check_rows: bool = True
    ) -> RegionCache:
        """Read the index of ``folder`` and compare it with the shards' sizes.

        Args:
            recipe: what the features must have been made with; None takes any.
            check_rows: False reads rows without looking whether they are damaged.

        Raises:
            GmpipeError: the index is missing, damaged, of another format or another recipe, or a
                shard is missing or of another size than the index says.
        """
        index = read_index(folder)
        if recipe is not None:
            check_same_recipe(index.recipe, recipe, str(folder))
        for entry in index.shards:
            _check_size(folder / entry.name, entry)
        return cls(folder, index, check_rows=check_rows)

    def __len__(self) -> int:
        """Rows of all shards."""
        return len(self.views)

    @property
    def ids(self) -> list[str]:
        """Image id of each row, (len(self),), made anew at each call."""
        return [image_id.decode() for image_id in self._index.image_ids.tolist()]

    def lookup(self, image_ids: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Row numbers (N,) of one view of each of N images.

        Raises:
            GmpipeError: names the first image that has no such view, and how many have none.
        """
        rows = np.flatnonzero(self.views == view)
        known = self._index.image_ids[rows]
        order = np.argsort(known, kind="stable")
        found = np.full(len(image_ids), -1, dtype=np.int64)
        # In pieces and by bisection: a hash table of millions of ids takes far more memory.
        for start in range(0, len(image_ids) if len(rows) else 0, _LOOKED_UP):
            piece = [image_id.encode() for image_id in image_ids[start : start + _LOOKED_UP]]
            wanted = np.array(piece, dtype=np.bytes_)
            places = np.searchsorted(known, wanted, sorter=order).clip(max=len(rows) - 1)
            places = order[places]
            there = known[places] == wanted
            found[start : start + len(piece)][there] = rows[places[there]]
        missing = np.flatnonzero(found < 0)
        if len(missing):
            raise GmpipeError(
                f"{self.folder}: found no view {view} of image {image_ids[missing[0]]!r}, and "
                f"{len(missing)} of {len(image_ids)} images lack it; expected all of them. "
                f"{_run_extract(self.folder)}"
            )
        return found

    def gather(self, rows: npt.ArrayLike) -> RegionRows:
        """Copy the rows of these numbers (N,), in that order; repeats are allowed.

        Raises:
            IndexError: a number is not in 0 to len(self) - 1.
            GmpipeError: a row is damaged or breaks the contract, or a shard is not the one that
                the index lists. Names the shard, the row and its image.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        outside = numbers.view(np.uint64) >= len(self)  # and so is a negative one
        if outside.any():
            raise IndexError(f"row {numbers[outside][0]} of a cache of {len(self)} rows")
        shard, row = self._index.shard[numbers], self._index.row[numbers].astype(np.int64)
        if not self._all_mapped:
            self._map(shard)
        places = self._places_of(shard, row)
        gathered = RegionRows(
            features=self._stored("features", places),
            boxes=self._stored("boxes", places),
            scores=self._stored("scores", places),
            classes=self._stored("classes", places),
            count=self._stored("count", places),
            image_id=self._index.image_ids[numbers],
            view=self.views[numbers],
        )
        if self._check_rows and not self._checked[numbers].all():
            fresh = np.flatnonzero(~self._checked[numbers])
            self._check(gathered.take(fresh), numbers[fresh])
        return gathered

    def _places_of(
        self, shard: npt.NDArray[np.int32], row: npt.NDArray[np.int64]
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Where in the maps each field of N rows of mapped shards lies: (N,) for each field."""
        places = self._places[shard] + row[:, None] * self._sizes
        return dict(zip(self._forms, places.T, strict=True))

    def _stored(self, field: str, places: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[Any]:
        """A field of the N rows of ``places``, copied from the maps: (N, *its shape)."""
        return self._items[field][places[field]].view(self._forms[field])

    def _check(self, rows: RegionRows, numbers: npt.NDArray[np.int64]) -> None:
        """See that ``rows``, copied from the shards, are sound and those that the index tells of.

        Raises:
            GmpipeError: as `gather`.
        """

        def refuse(place: int, breach: str, step: str | None = None) -> NoReturn:
            path = self.folder / self.shards[shard[place]].name
            image = f"image {rows.image_id[place].decode()!r}, view {rows.view[place]}"
            raise GmpipeError(f"{path}: row {row[place]} ({image}) {breach}. {step or _redo(path)}")

        shard, row = self._index.shard[numbers], self._index.row[numbers].astype(np.int64)
        widths = self._id_widths[shard]
        image_id = np.empty(len(rows), f"S{widths.max()}")
        for width in np.unique(widths).tolist():
            same = np.flatnonzero(widths == width)
            of_ids = self._id_places[shard[same]] + row[same] * width
            image_id[same] = self._files.items(width)[of_ids].view(f"S{width}")
        places = self._places_of(shard, row)
        stored = replace(rows, image_id=image_id, view=self._stored("view", places))
        expected = self._stored(CHECKSUMS, places)
        found = row_checksums(stored)
        for place in np.flatnonzero(found != expected).tolist():
            refuse(
                place,
                f"is damaged: its checksum is {found[place]:#010x}, expected "
                f"{expected[place]:#010x}",
            )
        for place, (breach, rule) in stored.breaches().items():
            refuse(place, f"breaks the contract: {breach}; expected {rule}")
        moved = (stored.image_id != rows.image_id) | (stored.view != rows.view)
        for place in np.flatnonzero(moved).tolist():
            refuse(
                place,
                f"holds image {stored.image_id[place].decode()!r}, view {stored.view[place]}, "
                f"where {INDEX_NAME} has the former",
                f"Delete {INDEX_NAME} and {_again(self.folder)}",
            )
        self._checked[numbers] = True

    def _map(self, wanted: npt.NDArray[np.int32]) -> None:
        """Map those of the shards ``wanted`` that aren't yet, after a look at their headers."""
        for shard in np.unique(wanted[~self._is_mapped[wanted]]).tolist():
            path = self.folder / self.shards[shard].name
            header = read_header(path)
            check_listed(path, header, self._index, shard)
            self._files.map(shard, path)
            start = self._files.starts[shard]
            self._places[shard] = [start + header.offsets[field] for field in self._forms]
            self._id_places[shard] = start + header.offsets["image_id"]
            self._id_widths[shard] = header.id_width
            self._is_mapped[shard] = True
        self._all_mapped = bool(self._is_mapped.all())


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
        if stored.dtype.itemsize > path.stat().st_size:
            refuse(f"attribute `{name}`", f"of {stored.dtype.itemsize} bytes", "one in the file")
        return file.attrs[name]

    def text(name: str) -> str:
        value: bytes = attribute(name, "S", "fixed-length text")
        return value.decode()

    if (found_name := text("format_name")) != FORMAT_NAME:
        refuse("attribute `format_name`", repr(found_name), repr(FORMAT_NAME))
    version = int(attribute("format_version", "iu", "an integer"))
    _check_version(str(path), version, FORMAT_VERSION, _redo(path))
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
        # Not `array.nbytes`, which overflows for a shape that no file can hold.
        size = math.prod(array.shape) * array.dtype.itemsize
        if offset + size > path.stat().st_size:
            refuse(f"array `{name}`", "cut off", f"{size} bytes from byte {offset} on")
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


@dataclass(frozen=True)
class Index:
    """What an index holds, once its columns, rows and metadata were found to go together."""

    dataset: str
    recipe: Recipe
    """Of the whole cache."""
    fingerprint: str
    """`schema.fingerprint` of the recipe."""
    regions: int
    """m."""
    feature_size: int
    """d."""
    feature_dtype: str
    """`float16` or `float32`."""
    shards: tuple[ShardEntry, ...]
    image_ids: npt.NDArray[np.bytes_]
    """(R,) fixed-width bytes: image id of each of the cache's rows."""
    views: npt.NDArray[np.int16]
    """(R,)."""
    shard: npt.NDArray[np.int32]
    """(R,) number of each row's shard in `shards`."""
    row: npt.NDArray[np.int32]
    """(R,) number of each row in its shard."""


def read_index(folder: Path) -> Index:
    """The index of a folder of shards, without a look at the shards.

    Raises:
        GmpipeError: it is missing, damaged or of another format.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise GmpipeError(f"{path}: there is no index of regions. {_run_extract(folder)}")
    remake = f"Delete it and run `gmpipe extract --dataset {folder.name}` again."
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            schema = file.schema_arrow
            about: dict[str, Any] = json.loads(schema.metadata[b"gmpipe"])
            _check_version(str(path), about["format_version"], INDEX_VERSION, remake)
            recipe = _sound_recipe(json.dumps(about["recipe"]), about["fingerprint"])
            dataset, m, d = about["dataset"], about["regions"], about["feature_size"]
            entries = tuple(ShardEntry(**entry) for entry in about["shards"])
            sound = (
                recipe is not None
                and isinstance(dataset, str)
                and type(m) is type(d) is int
                and about["feature_dtype"] in DTYPES["features"]
                and schema.equals(INDEX_COLUMNS)
                and len({entry.name for entry in entries}) == len(entries) > 0
                and all(_sound_entry(entry) for entry in entries)
                and 0 < m * d < min(entry.bytes for entry in entries)
            )
            names = pa.array([entry.name for entry in entries])
            # In parts: a large index takes several times as much memory while it is decoded.
            parts = file.iter_batches(_INDEX_PART, use_threads=False) if sound else ()
            columns = [_index_part(batch, names) for batch in parts]
        if sound:
            image_ids, views, shard, row = (
                np.concatenate(arrays) for arrays in zip(*columns, strict=True)
            )
            rows = np.array([entry.rows for entry in entries])
            sound = bool(((shard >= 0) & (row >= 0) & (row < rows[shard])).all())
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise GmpipeError(
            f"{path}: found a damaged file or another format ({error!r}); expected an index of "
            f"format version {INDEX_VERSION}. {remake}"
        ) from error
    if not sound or recipe is None:
        raise GmpipeError(
            f"{path}: found columns, rows or metadata that contradict each other; expected what "
            f"`gmpipe extract` wrote. {remake}"
        )
    pa.default_memory_pool().release_unused()
    return Index(
        dataset=dataset,
        recipe=recipe,
        fingerprint=about["fingerprint"],
        regions=m,
        feature_size=d,
        feature_dtype=about["feature_dtype"],
        shards=entries,
        image_ids=image_ids,
        views=views,
        shard=shard,
        row=row,
    )


def _index_part(batch: pa.RecordBatch, names: pa.Array) -> tuple[npt.NDArray[Any], ...]:
    """The columns of some of an index's rows, `shard` as the name's place in ``names``, or -1."""
    batch.validate(full=True)  # ids are UTF-8
    if any(column.null_count for column in batch.columns):
        raise ValueError("a value is missing")
    image_ids = np.array(batch["image_id"].cast(pa.binary()).to_pylist(), dtype=np.bytes_)
    shard = pc.fill_null(pc.index_in(batch["shard"], value_set=names), -1)
    # Copies: the batch's memory belongs to Arrow, which would keep it.
    return image_ids, *(column.to_numpy().copy() for column in (batch["view"], shard, batch["row"]))


def check_listed(path: Path, header: ShardHeader, index: Index, shard: int) -> None:
    """Refuse a shard that is not the one that the index has under number ``shard``.

    Raises:
        GmpipeError: it was made with other settings (names the field) or of other images, or has
            another data set, layout or number of rows.
    """
    entry = index.shards[shard]
    if header.fingerprint != entry.fingerprint:
        check_same_recipe(without_images(header.recipe), without_images(index.recipe), str(path))
        raise GmpipeError(
            f"{path}: found a shard of other images, with fingerprint {header.fingerprint}; "
            f"expected {entry.fingerprint}, as {INDEX_NAME} says. {_run_extract(path.parent)}"
        )
    layouts = [
        (of.dataset, of.regions, of.feature_size, of.feature_dtype) for of in (header, index)
    ]
    found, expected = (header.rows, *layouts[0]), (entry.rows, *layouts[1])
    if found != expected:
        raise GmpipeError(
            f"{path}: found (R, data set, m, d, dtype) {found}; expected {expected}, as "
            f"{INDEX_NAME} says. {_redo(path)}"
        )


def _check_size(path: Path, entry: ShardEntry) -> None:
    """Refuse a shard that is missing or of another size than the index says."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise GmpipeError(
            f"{path}: {INDEX_NAME} lists it; not found. {_run_extract(path.parent)}"
        ) from None
    if size != entry.bytes:
        raise GmpipeError(
            f"{path}: found {size} bytes; expected {entry.bytes}, as {INDEX_NAME} says. "
            f"{_redo(path)}"
        )


def _check_version(where: str, version: int, expected: int, step: str) -> None:
    """Refuse every version of a format but ``expected``, the newer ones by name."""
    if version > expected:
        raise GmpipeError(
            f"{where}: found format version {version}, which a newer gmpipe wrote; expected "
            f"{expected}. Update gmpipe."
        )
    if version != expected:
        raise GmpipeError(f"{where}: found format version {version}; expected {expected}. {step}")


def _sound_recipe(text: str, stored_fingerprint: str) -> Recipe | None:
    """The recipe in a JSON text, or None if it isn't a flat one of this fingerprint."""
    recipe = json.loads(text)
    if not isinstance(recipe, dict) or fingerprint(recipe) != stored_fingerprint:
        return None
    if not all(isinstance(value, str | int | float | None) for value in recipe.values()):
        return None
    return recipe


def _sound_entry(entry: ShardEntry) -> bool:
    """Whether the fields of an entry, which came from JSON, are of their types."""
    texts, numbers = (entry.name, entry.sha256, entry.fingerprint), (entry.bytes, entry.rows)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
        and _SHARD_NAME.fullmatch(entry.name) is not None
    )


def _run_extract(folder: Path) -> str:
    return f"Run `gmpipe extract --dataset {folder.name}`."


def _again(folder: Path) -> str:
    return f"run `gmpipe extract --dataset {folder.name}` again, which redoes only what is missing."


def _redo(path: Path) -> str:
    return f"Delete it and {_again(path.parent)}"
