"""Regions in Parquet, a row for each image, as `pipeline.shards.export` writes them.

Letters: as in `pipeline.shards.imports.image_regions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as kinds

from pipeline.errors import InputError
from pipeline.files import open_regular, raise_if_refused, sha256_json
from pipeline.shards.imports.image_regions import (
    ImageRegions,
    ListedImage,
    OnBytes,
    first_true,
    hash_file,
    refuse,
    refuse_no_file,
    refuse_repeated,
)
from pipeline.shards.schema import WHOLE

_AT_ONCE = 64  # rows, of which each may take a megabyte

_COLUMNS: dict[str, tuple[int, Callable[[pa.DataType], bool], str]] = {
    "image_id": (0, lambda kind: kinds.is_string(kind) or kinds.is_large_string(kind), "text"),
    "width": (0, kinds.is_integer, "integers"),
    "height": (0, kinds.is_integer, "integers"),
    "features": (2, kinds.is_floating, "lists of n lists of d floats"),
    "boxes": (2, kinds.is_floating, "lists of n lists of four floats"),
    "scores": (1, kinds.is_floating, "lists of n floats"),
    "classes": (1, kinds.is_integer, "lists of n integers"),
    WHOLE: (1, kinds.is_floating, "lists of d floats"),
}
"""How deep the lists of each column are, what they hold, and both in words. A file may have other
columns, and may lack `whole`."""

_OF_IMAGES = ("image_id", "width", "height", "scores")
_OF_REGIONS = ("features", "boxes", "scores", "classes")


@dataclass(frozen=True, eq=False)
class ParquetFiles:
    """Regions in Parquet, of one file or several.

    ``image_id`` is text, ``width`` and ``height`` are pixels, ``features`` (n, d), ``boxes`` (n, 4)
    xyxy in [0, 1] of the image and ``scores`` (n,) floats, ``classes`` (n,) integers, and ``whole``
    (d,), which all files may lack, floats: the feature of the whole image.

    Attributes:
        sha256: hex, over the files.
        whole_sha256: the same if the column ``whole`` is read, else None.
        paths: of the files.
        lines: N, in the order of the files.
        counts: (N,) number of regions of each image.
        feature_size: d.
    """

    sha256: str
    whole_sha256: str | None
    paths: tuple[Path, ...]
    lines: tuple[ListedImage, ...]
    counts: npt.NDArray[np.int64]
    feature_size: int

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        on_bytes: OnBytes = lambda read, total: None,
        *,
        whole: bool = True,
    ) -> ParquetFiles:
        """Read the files through: their hashes, and all columns except those of the regions.

        Args:
            paths: of the files.
            on_bytes: called with the progress.
            whole: whether to read the column ``whole`` if the files have it.

        Raises:
            InputError: a file is missing, damaged or not Parquet, or a column is missing, has
                another type, or holds an impossible value. Names file, row and id.
        """
        for path in paths:
            refuse_no_file(path)
        total = sum(path.stat().st_size for path in paths)
        hashes = [hash_file(path, lambda read: on_bytes(read, total)) for path in paths]
        lines: list[ListedImage] = []
        counts: list[int] = []
        sizes: dict[int, Path] = {}
        with_whole: dict[bool, Path] = {}
        for path in paths:
            with _reading(path) as file:
                names = _check_columns(path, file.schema_arrow)
                with_whole.setdefault(WHOLE in names, path)
                for row, batch in _batches(file, _OF_IMAGES):
                    lines += _lines(path, row, batch)
                    counts += pc.list_value_length(batch.column("scores")).to_pylist()
                if size := _feature_size(file):
                    sizes.setdefault(size, path)
        refuse_repeated(lines)
        if len(with_whole) > 1:
            refuse(
                str(with_whole[False]), f"column `{WHOLE}`", "missing", "it in all files or none"
            )
        if len(sizes) != 1:
            found = ", ".join(f"{size} ({path})" for size, path in sizes.items())
            names_of = ", ".join(map(str, paths))
            refuse(names_of, "feature size", found or "not known", "one, of at least one region")
        sha256 = sha256_json(hashes)
        return cls(
            sha256=sha256,
            whole_sha256=sha256 if whole and True in with_whole else None,
            paths=tuple(paths),
            lines=tuple(lines),
            counts=np.array(counts, dtype=np.int64),
            feature_size=next(iter(sizes)),
        )

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """Yield the regions of the images with these ascending numbers.

        Raises:
            InputError: as `open`, or the columns of a row have different lengths.
        """
        wanted = set(images.tolist())
        last = max(wanted, default=-1)
        names = (*_OF_REGIONS, WHOLE) if self.whole_sha256 is not None else _OF_REGIONS
        start = 0
        for path in self.paths:
            with _reading(path) as file:
                for row, batch in _batches(file, names):
                    numbers = range(start + row, start + row + batch.num_rows)
                    if numbers[0] > last:
                        return
                    if not wanted.isdisjoint(numbers):
                        yield from self._images(batch, numbers, wanted)
                start += file.metadata.num_rows

    def _images(
        self, batch: pa.RecordBatch, numbers: range, wanted: set[int]
    ) -> Iterator[ImageRegions]:
        """Yield the wanted ones of the images with these numbers, whose columns are ``batch``."""
        lengths, values = {}, {}
        for name in batch.schema.names:
            column = batch.column(name)
            for (row,) in first_true(column.is_null()):
                refuse(self.lines[numbers[row]].where, f"`{name}`", "null", "a list")
            lengths[name] = np.asarray(pc.list_value_length(column))
            values[name] = column.flatten()
        inner = {"features": self.feature_size, "boxes": 4}
        for name, size in inner.items():
            sizes = np.asarray(pc.fill_null(pc.list_value_length(values[name]), -1))
            for (entry,) in first_true(sizes != size):
                found = "null" if sizes[entry] < 0 else sizes[entry]
                row = int(np.searchsorted(np.cumsum(lengths[name]), entry, side="right"))
                where = self.lines[numbers[row]].where
                refuse(where, f"length of a list in `{name}`", found, str(size))
            values[name] = values[name].flatten()
        for name, column in values.items():
            for row, number in enumerate(numbers):
                expected = self.feature_size if name == WHOLE else self.counts[number]
                if lengths[name][row] != expected:
                    where = self.lines[number].where
                    refuse(where, f"length of `{name}`", lengths[name][row], str(expected))
            if column.null_count:
                refuse(self.lines[numbers[0]].where, f"`{name}`, here or below,", "null", "numbers")
        ends = np.concatenate([[0], np.cumsum(lengths["scores"])])
        arrays = {
            name: np.asarray(column).reshape(-1, *([inner[name]] if name in inner else []))
            for name, column in values.items()
        }
        for row, number in enumerate(numbers):
            if number in wanted:
                part = slice(ends[row], ends[row + 1])
                regions = {name: arrays[name][part] for name in _OF_REGIONS}
                whole = arrays[WHOLE].reshape(len(numbers), -1)[row] if WHOLE in arrays else None
                yield ImageRegions(self.lines[number].where, **regions, whole=whole)


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file; raises an `InputError` that names it for what pyarrow finds wrong with it."""
    try:
        with (
            open_regular(path) as stream,
            pq.ParquetFile(stream, page_checksum_verification=True) as file,
        ):
            yield file
    except (pa.ArrowException, OSError) as error:
        raise_if_refused(error, path)
        raise InputError(
            f"{path} can't be read: it is damaged or not Parquet ({error}).",
            "Copy it again, or write it again.",
        ) from error


def _batches(file: pq.ParquetFile, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield some rows at a time with the number of their first row; nulls are refused later."""
    row = 0
    for batch in file.iter_batches(batch_size=_AT_ONCE, columns=list(names)):
        yield row, batch
        row += batch.num_rows


def _check_columns(path: Path, schema: pa.Schema) -> list[str]:
    """Refuse a file without the columns; returns the names of those that are read."""
    names = [name for name in _COLUMNS if name in schema.names]
    for name, (depth, holds, words) in _COLUMNS.items():
        if name not in names:
            if name == WHOLE:
                continue
            required = ", ".join(name for name in _COLUMNS if name != WHOLE)
            found = f"missing; the file has {schema.names[:20]}"
            refuse(str(path), f"column `{name}`", found, f"the columns {required}")
        kind, lists = schema.field(name).type, 0
        while hasattr(kind, "value_type") and not kinds.is_dictionary(kind):
            kind, lists = kind.value_type, lists + 1
        if lists != depth or not holds(kind):
            refuse(f"{path}, column `{name}`", "type", schema.field(name).type, words)
    return names


def _lines(path: Path, start: int, batch: pa.RecordBatch) -> Iterator[ListedImage]:
    """The images of some rows, which begin at row ``start``."""
    columns = [batch.column(name).to_pylist() for name in ("image_id", "width", "height")]
    empty = batch.column("scores").is_null().to_pylist()
    for row, (file_id, width, height, null) in enumerate(zip(*columns, empty, strict=True), start):
        where = f"{path}, row {row} ({file_id!r})"
        if not file_id:
            refuse(where, "image_id", repr(file_id), "an image's id")
        for name, pixels in (("width", width), ("height", height)):
            if pixels is None or not 1 <= pixels <= np.iinfo(np.int32).max:
                refuse(where, name, pixels, "a whole number of pixels, 1 or more")
        if null:
            refuse(where, "scores", None, "a list, which may be empty")
        yield ListedImage(where, file_id, width, height)


def _feature_size(file: pq.ParquetFile) -> int:
    """d by the first row that has a region; 0 if none has."""
    for _, batch in _batches(file, ["features"]):
        sizes = pc.list_value_length(batch.column("features").flatten())
        if len(sizes):
            return int(sizes[0].as_py() or 0)
    return 0
