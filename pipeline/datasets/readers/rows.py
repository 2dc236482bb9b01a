"""Rows of CSV and Parquet files, and their columns as the table of a listing.

The adapters `table` and `nuswide` read their files with these functions.

Letters: N rows, C labels.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.listing import open_source
from pipeline.datasets.manifest import COLUMNS, Split
from pipeline.errors import InputError
from pipeline.files import raise_if_refused

Where = Callable[[int], str]
"""Row number, from 0 -> its file and its position there, as an editor shows it."""

FIX_FILE = "Fix the file, then prepare the data set again."

_MOST_LABELS = np.iinfo(np.int16).max + 1
_CSV_BATCH = 1 << 16
"""Rows that are Python objects at the same time."""

# A path that does not lead below a folder: with an empty, `.` or `..` part, a slash at either end,
# a backslash, or a control character (an unclosed quote draws line breaks into its cell).
_INVALID_PATH = r"(^|/)\.{0,2}(/|$)|\\|[\x00-\x1f]"


# --- reading a file ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Some columns of a table file.

    Attributes:
        file: the file.
        unit: what ``position`` counts: ``line``, from 1, or ``row``, from 0.
        header: the names of all columns of the file.
        table: the N rows, at least one: ``position`` int64, and the requested columns, texts
            without nulls. ``labels`` may have nulls, and may have lists of texts.
    """

    file: Path
    unit: Literal["line", "row"]
    header: Sequence[str] = field(repr=False)
    table: pa.Table = field(repr=False)

    def where(self, row: int) -> str:
        """The file and the position of a row."""
        return f"{self.file}, {self.unit} {self.table.column('position')[row].as_py()}"


def text_lines(file: Path, remedy: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 text with their ends; decompressed if the name ends in ``.gz``.

    Raises:
        MissingError, OSError: as `open_source`.
        InputError: as `open_source`, or the file can't be decompressed, or is not UTF-8; names the
            line.
    """
    number = 0
    try:
        with open_source(file, remedy) as stored, _plain(stored, file.suffix == ".gz") as stream:
            for line in stream:
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}, line {number}: the byte {error.object[error.start]:#04x} is not UTF-8.",
            "Save the file as UTF-8 text, then prepare the data set again.",
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{file} can't be read beyond line {number}: {error}.", FIX_FILE
        ) from error


def _plain(stream: BufferedReader, compressed: bool) -> BufferedReader | gzip.GzipFile:
    return gzip.GzipFile(fileobj=stream) if compressed else stream


def read_csv(
    file: Path,
    columns: Mapping[str, str],
    remedy: str,
    hints: Mapping[str, str] | None = None,
    block: str | None = None,
) -> Rows:
    """Read columns of a CSV file with a header; empty lines are skipped.

    The parser is Python's: pyarrow's does not know the line of a row, and reads everything after an
    unclosed quote as one cell.

    Args:
        columns: name of a column in `Rows.table` -> its name in the header.
        remedy: what to do if the file is missing.
        hints: name in the header -> what else can be done if that column is missing.
        block: the block of params.yaml with the settings that name the columns, by the keys of
            ``columns``; None if the names are fixed.

    Raises:
        MissingError: as `text_lines`.
        InputError: as `text_lines`; or a column is missing or appears twice, a row has another
            number of cells than the header, the quotes are not as in RFC 4180, or there is no row.
    """
    records = _csv_records(file, remedy)
    _, header = next(records, (1, []))
    if not header:
        raise InputError(f"{file} is empty, expected a header and rows.", FIX_FILE)
    if len(header) == 1 and len(columns) > 1 and (separator := _other_separator(header[0])):
        raise InputError(
            f"{file}: its cells are separated by {separator}, expected commas. The header is "
            f"{header[0]!r}.",
            "Save the file as CSV with commas between cells, then prepare the data set again.",
        )
    _check_header(file, header, columns, hints or {}, block)
    indices = [header.index(name) for name in columns.values()]
    tables = []
    while batch := list(islice(records, _CSV_BATCH)):
        for line, cells in batch:
            if len(cells) != len(header):
                raise InputError(
                    f"{file}, line {line}: the row has {len(cells)} cells, expected {len(header)} "
                    "as in the header.",
                    f"Put double quotes around a cell that contains a comma. {FIX_FILE}",
                )
        lines = {"position": [line for line, _ in batch]}
        texts = {
            key: pa.array([cells[index] for _, cells in batch], pa.string())
            for key, index in zip(columns, indices, strict=True)
        }
        tables.append(pa.table(lines | texts))
    if not tables:
        raise InputError(f"{file} has no rows below its header.", FIX_FILE)
    return Rows(file, "line", header, pa.concat_tables(tables))


def _csv_records(file: Path, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each record that is not an empty line."""
    reader = csv.reader(text_lines(file, remedy), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{file}, line {line}: {error}. A quote may not be closed, or not be doubled.", FIX_FILE
        ) from error


def _other_separator(header: str) -> str | None:
    """What separates the cells of a header without a comma, in words."""
    separators = {";": "semicolons", "\t": "tabs"}
    return next((name for mark, name in separators.items() if mark in header), None)


def _check_header(
    file: Path,
    header: Sequence[str],
    columns: Mapping[str, str],
    hints: Mapping[str, str],
    block: str | None,
) -> None:
    """Check that a header has each column once; arguments as for `read_csv`."""
    wrong = {key: name for key, name in columns.items() if header.count(name) != 1}
    if not wrong:
        return
    absent = [name for name in wrong.values() if name not in header]
    problems = []
    for name in wrong.values():
        if name not in absent:
            problems.append(f"the column {name!r} appears more than once")
            continue
        close = _closest(name, header)
        problems.append(
            f"the column {name!r} is missing" + (f" (perhaps it is {close!r})" if close else "")
        )
    remedy = "Rename it" if len(wrong) == 1 else "Rename them"
    if block is None:
        remedy += " in the file."
    else:
        keys = [f"`{block}.{key}`" for key in wrong]
        remedy += f" in the file, or set {' and '.join(keys)} in params.yaml to "
        remedy += "the column's name." if len(wrong) == 1 else "the columns' names."
    raise InputError(
        f"{file}: {', '.join(problems)}. The columns are {', '.join(map(repr, header))}.",
        remedy + "".join(hints.get(name, "") for name in absent),
    )


def read_parquet(
    file: Path, columns: Mapping[str, str], remedy: str, hints: Mapping[str, str], block: str
) -> Rows:
    """Read columns of a Parquet file; arguments and errors as for `read_csv`."""
    try:
        # Not `read_table`, which would read all files of a folder as one table.
        with open_source(file, remedy) as stream, pq.ParquetFile(stream) as parquet:
            header = parquet.schema_arrow.names
            _check_header(file, header, columns, hints, block)
            table = parquet.read(columns=list(columns.values()))
            table.validate(full=True)  # texts may not be UTF-8
    except (OSError, pa.ArrowException) as error:
        raise_if_refused(error, file)
        raise InputError(f"{file} is not a complete Parquet file: {error}.", FIX_FILE) from error
    if not table.num_rows:
        raise InputError(f"{file} has no rows.", FIX_FILE)
    texts = {"position": pa.chunked_array([np.arange(table.num_rows)])}
    for key, name in columns.items():
        column = table.column(name)
        texts[key] = _as_text(file, name, column, lists=key == "labels")
        row = None if key == "labels" else first_true(pc.is_null(column))
        if row is not None:
            raise InputError(
                f"{file}, row {row}: the column {name!r} is null, expected text.", FIX_FILE
            )
    return Rows(file, "row", header, pa.table(texts))


def _as_text(file: Path, name: str, column: pa.ChunkedArray, *, lists: bool) -> pa.ChunkedArray:
    """Cast a column of any text type to strings; with ``lists``, also lists of text."""
    kind, target = column.type, pa.string()
    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind, target = kind.value_type, pa.list_(pa.string())
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        expected = "text or lists of text" if lists else "text"
        raise InputError(
            f"{file}: the column {name!r} has the type {column.type}, expected {expected}.",
            "Write the column again, or name another column in params.yaml.",
        )
    return column.cast(target)


# --- columns -> a listing ------------------------------------------------------------------------


def check_paths(images: pa.ChunkedArray, where: Where) -> None:
    """Check that N paths lie below the folder that they are relative to, and that none repeats.

    Raises:
        InputError: the first invalid path, or the first repetition with both positions.
    """
    row = first_true(pc.match_substring_regex(images, _INVALID_PATH))
    if row is not None:
        raise InputError(
            f"{where(row)}: the image is {images[row].as_py()!r}, expected a path below its folder "
            "with forward slashes, and no part that is empty, `.` or `..`.",
            FIX_FILE,
        )
    codes = images.combine_chunks().dictionary_encode().indices.to_numpy()
    # Codes count up from 0 in order of appearance: only a new path is a new maximum.
    known = np.maximum.accumulate(np.concatenate([[-1], codes[:-1]]))
    if (codes <= known).any():
        row = int((codes <= known).argmax())
        first = int((codes == codes[row]).argmax())
        raise InputError(
            f"{where(row)}: the image {images[row].as_py()!r} is already in {where(first)}. "
            "Expected each image once.",
            FIX_FILE,
        )


def parse_splits(
    splits: pa.ChunkedArray, expected: Mapping[str, Split], where: Where
) -> pa.ChunkedArray:
    """The split of each of N rows; ``expected`` maps the words of the file to splits.

    Raises:
        InputError: the first row with another word.
    """
    words = pa.array(expected, pa.string())
    codes = pc.index_in(splits, value_set=words)
    row = first_true(pc.is_null(codes))
    if row is not None:
        *others, last = map(repr, expected)
        raise InputError(
            f"{where(row)}: the split is {splits[row].as_py()!r}, expected "
            f"{', '.join(others)} or {last}.",
            FIX_FILE,
        )
    return pc.take(pa.array(expected.values(), pa.string()), codes)


def encode_labels(
    labels: pa.ChunkedArray, vocabulary: Sequence[str] | None, where: Where, source: str
) -> tuple[tuple[str, ...], pa.ListArray]:
    """Encode label names as numbers.

    Args:
        labels: N lists of names; null is a row without labels.
        vocabulary: all names in their order; None for the names in ``labels``, sorted by code
            point.
        source: where the vocabulary is from, for the message.

    Returns:
        the vocabulary; and the label numbers of each row, ascending and without repetition.

    Raises:
        InputError: a name is empty or unknown, with its row; or there is no name at all.
    """
    lists = labels.combine_chunks()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    rows = np.repeat(np.arange(len(lists)), lengths)
    names = pc.fill_null(pc.utf8_trim_whitespace(lists.flatten()), "")
    entry = first_true(pc.equal(names, ""))
    if entry is not None:
        row = int(rows[entry])
        raise InputError(
            f"{where(row)}: one of the labels {lists[row].as_py()} is empty.", FIX_FILE
        )
    known = tuple(sorted(pc.unique(names).to_pylist()) if vocabulary is None else vocabulary)
    codes = pc.index_in(names, value_set=pa.array(known, pa.string()))
    entry = first_true(pc.is_null(codes))
    if entry is not None:
        name = names[entry].as_py()
        raise InputError(
            f"{where(int(rows[entry]))}: the label {name!r} is not in {source}.",
            f"Fix the file, or add the label there.{did_you_mean(name, known)}",
        )
    if not 1 <= len(known) <= _MOST_LABELS:
        raise InputError(
            f"From {where(0)} on, there are {len(known)} different labels, expected 1 to "
            f"{_MOST_LABELS}.",
            "Set the column of the labels and their separator in params.yaml.",
        )
    keys = np.unique(rows * len(known) + np.asarray(codes))
    return known, label_lists(keys // len(known), keys % len(known), len(lists))


def label_lists(rows: np.ndarray, numbers: np.ndarray, count: int) -> pa.ListArray:
    """Group label numbers, as int16, into one list for each of ``count`` rows.

    Args:
        rows: the row of each entry, ascending.
        numbers: the label of each entry.
    """
    lengths = np.bincount(rows, minlength=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers.astype(np.int16)))


def join_folder(folder: str, images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Put a folder of the data set in front of paths that are relative to it."""
    folder = PurePosixPath(folder).as_posix()
    return images if folder == "." else pc.binary_join_element_wise(folder, images, "/")


def listing_table(
    image_ids: pa.ChunkedArray,
    paths: pa.ChunkedArray,
    splits: pa.ChunkedArray,
    labels: pa.ListArray,
) -> pa.Table:
    """`Listing.table` of N images without ignored labels and without known sizes."""
    count = len(image_ids)
    none = np.empty(0, dtype=np.int64)
    size = pa.nulls(count, pa.int32())
    columns = [image_ids, paths, splits, labels, label_lists(none, none, count), size, size]
    return pa.table(columns, schema=COLUMNS)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence, after a blank, that suggests the closest choice; empty if none is close."""
    close = _closest(word, choices)
    return "" if close is None else f" Did you mean {close!r}?"


def _closest(word: str, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def first_true(flags: pa.BooleanArray | pa.ChunkedArray) -> int | None:
    """The index of the first true flag; None if there is none."""
    index = pc.index(flags, True).as_py()
    return None if index < 0 else int(index)
