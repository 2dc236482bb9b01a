"""Rows of CSV and Parquet files, and their columns as the table of a listing.

The adapters `table` and `nuswide` read their files with these functions.

Letters: N rows.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.listing import open_source
from pipeline.datasets.manifest import COLUMNS, Split, repeats
from pipeline.datasets.readers.text import FIX_FILE, text_lines
from pipeline.errors import InputError
from pipeline.files import raise_if_refused
from pipeline.formats.encodings import plain_text

Where = Callable[[int], str]
"""Row number, from 0 -> its file and its position there, as an editor shows it."""

_LINES = re.compile(r"[^\r]*\r(?!\n)|.+", re.DOTALL)
_CSV_BATCH = 1 << 16
"""Rows that are Python objects at the same time."""

_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_TEXTS = (
    *_STRINGS,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_VIEWS = (pa.types.is_list_view, pa.types.is_large_list_view)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    *_VIEWS,
)
_NUMBERS = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)

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
            without nulls. ``labels`` may have nulls, and may have lists of texts; a column of
            Parquet whose key begins with ``labels.`` is a number or truth value as a text.
    """

    file: Path
    unit: Literal["line", "row"]
    header: Sequence[str] = field(repr=False)
    table: pa.Table = field(repr=False)

    def where(self, row: int) -> str:
        """The file and the position of a row."""
        return f"{self.file}, {self._position(row)}"

    def place(self, row: int) -> str:
        """The name of the file, and the position of a row."""
        return f"{self.file.name}, {self._position(row)}"

    def _position(self, row: int) -> str:
        return f"{self.unit} {self.table.column('position')[row].as_py()}"


def read_header(file: Path, wanted: Collection[str], remedy: str) -> tuple[list[str], set[str]]:
    """Read the names of a table's columns; and which of them have texts, numbers or truth values.

    ``wanted`` are columns that the table may have; other arguments and errors as for `read_csv`.
    """
    if file.suffix.lower() == ".parquet":
        with _open_parquet(file, remedy) as parquet:
            fields = [(plain_text(field.name), field.type) for field in parquet.schema_arrow]
            return [name for name, _ in fields], {name for name, kind in fields if _is_plain(kind)}
    header = _header(file, _csv_records(file, wanted, remedy))
    return header, set(header)


def _is_plain(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_one((*_STRINGS, *_NUMBERS), kind)


def read_csv(
    file: Path,
    columns: Mapping[str, str],
    remedy: str,
    hints: Mapping[str, str] | None = None,
    block: str | None = None,
) -> Rows:
    """Read columns of a CSV file with a header; empty lines and rows of empty cells are skipped.

    Cells are separated by commas, semicolons or tabs (`_mark_between_cells`). Where each
    cell of the header but the first begins with a blank, so do the cells of the rows. The parser is
    Python's: pyarrow's does not know the line of a row, and reads everything after an unclosed
    quote as one cell.

    Args:
        columns: name of a column in `Rows.table` -> its name in the header.
        remedy: what to do if the file is missing.
        hints: name in the header -> what else can be done if that column is missing.
        block: the block of params.yaml with the settings that name the columns, by the keys of
            ``columns`` up to a dot; None if the names are fixed.

    Raises:
        MissingError: as `text_lines`.
        InputError: as `text_lines`; or a column is missing or appears twice, a row has another
            number of cells than the header, the quotes are not as in RFC 4180, or there is no row.
    """
    records = _csv_records(file, columns.values(), remedy)
    header = _header(file, records)
    check_header(file, header, columns, hints or {}, block)
    indices = [header.index(name) for name in columns.values()]
    tables = []
    while batch := list(islice(records, _CSV_BATCH)):
        if wrong := _wrong_length(file, batch, header):
            raise wrong
        lines = {"position": [line for line, _ in batch]}
        texts = {
            key: pa.array([cells[index] for _, cells in batch], pa.string())
            for key, index in zip(columns, indices, strict=True)
        }
        tables.append(pa.table(lines | texts))
    if not tables:
        raise InputError(f"{file} has no rows below its header.", FIX_FILE)
    return Rows(file, "line", header, pa.concat_tables(tables))


def _header(file: Path, records: Iterator[tuple[int, list[str]]]) -> list[str]:
    _, header = next(records, (1, []))
    if not header:
        raise InputError(f"{file} is empty, expected a header and rows.", FIX_FILE)
    return [plain_text(name) for name in header]


def _csv_records(
    file: Path, wanted: Collection[str], remedy: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each record that is not empty."""
    # A carriage return alone ends a line, too, in files of an old Mac.
    lines = (part for line in text_lines(file, remedy) for part in _LINES.findall(line))
    start: list[str] = []
    said = None
    for text in lines:
        if found := re.fullmatch(r"sep=([,;\t])\s*", text):  # Excel's way to say it
            said, text = found[1], "\n"
        start.append(text)
        if text.strip():
            break
    header = start[-1] if start else ""
    mark = said or _mark_between_cells(header, wanted, file.suffix)
    _, *others = header.split(mark)
    reader = csv.reader(
        chain(start, lines),
        delimiter=mark,
        skipinitialspace=bool(others) and all(cell.startswith(" ") for cell in others),
        strict=True,
    )
    line = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):  # a spreadsheet writes only marks for an empty row
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{file}, line {line}: {error}. A quote may not be closed, or not be doubled.", FIX_FILE
        ) from error


def _mark_between_cells(header: str, wanted: Collection[str], suffix: str) -> str:
    """The mark with which most wanted columns appear; else a .tsv's tab, or the most frequent."""
    unquoted = re.sub('"[^"]*"', "", header)

    def rank(mark: str) -> tuple[int, bool, int]:
        names = {plain_text(name.strip().strip('"')) for name in header.split(mark)}
        tab = mark == "\t" and suffix.lower() == ".tsv" and "\t" in unquoted
        return len(names.intersection(wanted)), tab, unquoted.count(mark)

    return max(",;\t", key=rank)


def _wrong_length(
    file: Path, batch: Sequence[tuple[int, list[str]]], header: Sequence[str]
) -> InputError | None:
    """Say what is wrong with the first row that has not as many cells as the header."""
    width = len(header)
    line, cells = next(((line, cells) for line, cells in batch if len(cells) != width), (0, []))
    if not cells:
        return None
    if not any(map(str.strip, cells[width:])) and len(cells) > width:
        remedy = "The last ones are empty: remove the marks at the ends of the lines."
    elif len(cells) < width:
        remedy = "Write all marks between cells, also around cells that are empty."
    elif all(len(cells) == width + 1 for _, cells in batch):
        remedy = (
            "All rows have one cell more: the header may lack a name. If R wrote the table with "
            "the names of its rows, write it again with `row.names = FALSE`."
        )
    else:
        remedy = (
            "Put double quotes around a cell that contains the mark between cells, such as a comma."
        )
    return InputError(
        f"{file}, line {line}: the row has {len(cells)} cells, expected {width} as in the header.",
        f"{remedy} {FIX_FILE}",
    )


def check_header(
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
    for name in dict.fromkeys(wrong.values()):
        if name not in absent:
            problems.append(f"the column {name!r} appears {header.count(name)} times")
            continue
        close = _closest(name, header)
        problems.append(
            f"the column {name!r} is missing" + (f" (perhaps it is {close!r})" if close else "")
        )
    remedy = "Rename it" if len(wrong) == 1 else "Rename them"
    if not absent:
        remedy = "Rename or remove one of them in the file."
    elif block is None:
        remedy += " in the file."
    else:
        keys = list(dict.fromkeys(f"`{block}.{key.partition('.')[0]}`" for key in wrong))
        remedy += f" in the file, or set {' and '.join(keys)} in params.yaml to "
        remedy += "the column's name." if len(wrong) == 1 else "the columns' names."
    if len(header) == 1 and "|" in header[0]:
        remedy = f"Write a comma, a semicolon or a tab between cells in place of `|`. {remedy}"
    if any(re.search(r"\.(jpe?g|png|gif|webp|bmp|tiff?)$", name, re.I) for name in header):
        remedy = f"The first line looks like a row: put the names of the columns above it. {remedy}"
    raise InputError(
        f"{file}: {', '.join(problems)}. The columns are {', '.join(map(repr, header))}.",
        remedy + "".join(hints.get(name, "") for name in absent),
    )


def read_parquet(
    file: Path, columns: Mapping[str, str], remedy: str, hints: Mapping[str, str], block: str
) -> Rows:
    """Read columns of a Parquet file; arguments and errors as for `read_csv`."""
    with _open_parquet(file, remedy) as parquet:
        names = parquet.schema_arrow.names
        header = [plain_text(name) for name in names]
        check_header(file, header, columns, hints, block)
        stored = {key: names[header.index(name)] for key, name in columns.items()}
        table = parquet.read(columns=list(stored.values()))
        table.validate(full=True)  # texts may not be UTF-8
        if not table.num_rows:
            raise InputError(f"{file} has no rows.", FIX_FILE)
        texts = {"position": pa.chunked_array([np.arange(table.num_rows)])}
        for key, name in columns.items():
            column = table.column(stored[key])
            texts[key] = _as_text(file, name, column, key)
            row = None if key.startswith("labels") else first_true(pc.is_null(column))
            if row is not None:
                raise InputError(
                    f"{file}, row {row}: the column {name!r} is null, expected text.", FIX_FILE
                )
    return Rows(file, "row", header, pa.table(texts))


@contextmanager
def _open_parquet(file: Path, remedy: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; what pyarrow says about it in the block is an `InputError`."""
    try:
        # Not `read_table`, which would read all files of a folder as one table.
        with open_source(file, remedy) as stream, pq.ParquetFile(stream) as parquet:
            yield parquet
    except (OSError, pa.ArrowException) as error:
        raise_if_refused(error, file)
        with file.open("rb") as stream:
            start = stream.read(4)
        if start != b"PAR1" and start.isascii():
            raise InputError(
                f"{file} begins with {start.decode()!r}, which is text; expected Parquet.",
                f"If it is CSV, rename it to {file.stem}.csv, and name it so in params.yaml.",
            ) from error
        raise InputError(f"{file} is not a complete Parquet file: {error}.", FIX_FILE) from error


def _as_text(file: Path, name: str, column: pa.ChunkedArray, key: str) -> pa.ChunkedArray:
    """Cast a column of any text type to strings.

    With the key ``labels``, also lists of text and a column of nulls; with a key below it, also
    numbers and truth values. Labels and images may also be whole numbers.
    """
    lists = key == "labels"
    kind, target = column.type, pa.string()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if lists and _is_one(_LISTS, kind):
        if _is_one(_VIEWS, kind):  # pyarrow 26 casts a view with a null to an invalid list
            column = pa.chunked_array([pa.array(column.to_pylist(), pa.list_(kind.value_type))])
        kind, target = kind.value_type, pa.list_(pa.string())
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
    numeric = _is_one(_NUMBERS, kind)
    if key in ("labels", "image") and pa.types.is_floating(kind):  # pandas's, beside a null
        whole = pa.list_(pa.int64()) if pa.types.is_list(target) else pa.int64()
        with suppress(pa.ArrowInvalid):
            column, kind = column.cast(whole), pa.int64()
    if (
        _is_one(_TEXTS, kind)
        or (lists and pa.types.is_null(kind))
        or (numeric and key.startswith("labels."))
        or (pa.types.is_integer(kind) and key in ("labels", "image"))
    ):
        return column.cast(target)
    expected = "text or lists of text" if lists else "text"
    remedy = "Write the column again, or name another column in params.yaml."
    if lists:
        remedy = "Write the names of the labels, as text, or name another column in params.yaml."
    if lists and numeric:
        remedy += f" If it says whether an image has the label {name!r}, set `labels: [{name}]`."
    raise InputError(
        f"{file}: the column {name!r} has the type {column.type}, expected {expected}.", remedy
    )


def _is_one(kinds: Sequence[Callable[[pa.DataType], bool]], kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in kinds)


# --- columns -> a listing ------------------------------------------------------------------------


def check_paths(images: pa.ChunkedArray, where: Where, folder: Path | None = None) -> None:
    """Check that N paths lie below the folder that they are relative to.

    Raises:
        InputError: the first invalid path, with its position.
    """
    row = first_true(pc.match_substring_regex(images, _INVALID_PATH))
    if row is not None:
        raise InputError(
            f"{where(row)}: the image is {images[row].as_py()!r}, expected a path below its folder "
            "with forward slashes, and no part that is empty, `.` or `..`.",
            f"{_path_remedy(images[row].as_py(), folder) if folder else ''}{FIX_FILE}",
        )


def _path_remedy(image: str, folder: Path) -> str:
    """What to change in a path with backslashes, or of a whole disk; empty for another."""
    path = image.replace("\\", "/")
    if not re.match(r"/|[A-Za-z]:/", path):
        return f"Write {path!r} in place of {image!r}. " if path != image else ""
    for cut in re.finditer("/+", path):
        if (folder / path[cut.end() :]).is_file():
            return f"Remove {image[: cut.end()]!r} from the start of each such path. "
    return f"Write each path as it is below {folder}, without the folders above. "


def check_once(images: pa.ChunkedArray, where: Where) -> None:
    """Check that none of N paths repeats.

    Raises:
        InputError: the first repetition, with both positions.
    """
    codes = image_codes(images)
    row = first_true(pa.array(repeats(codes)))
    if row is not None:
        first = int((codes == codes[row]).argmax())
        raise InputError(
            f"{where(row)}: the image {images[row].as_py()!r} is already in {where(first)}. "
            "Expected each image once.",
            FIX_FILE,
        )


def image_codes(images: pa.ChunkedArray) -> np.ndarray:
    """(N,) int: a number for each path, from 0 in order of appearance.

    Two paths have one number if they differ only in their Unicode form. On macOS they would be the
    same file.
    """
    paths = pc.utf8_normalize(images, form="NFC").combine_chunks()
    return np.asarray(paths.dictionary_encode().indices)


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
        found = splits[row].as_py()
        meant = next((word for word in expected if found.strip().lower().startswith(word)), None)
        raise InputError(
            f"{where(row)}: the split is {found!r}, expected {', '.join(others)} or {last}.",
            f"Write {meant!r} in each such row. {FIX_FILE}" if meant else FIX_FILE,
        )
    return pc.take(pa.array(expected.values(), pa.string()), codes)


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
    ignored: pa.ListArray | None = None,
) -> pa.Table:
    """`Listing.table` of N images without known sizes; None for no ignored labels."""
    count = len(image_ids)
    none = np.empty(0, dtype=np.int64)
    size = pa.nulls(count, pa.int32())
    ignored = label_lists(none, none, count) if ignored is None else ignored
    columns = [image_ids, paths, splits, labels, ignored, size, size]
    return pa.table(columns, schema=COLUMNS)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence, after a blank, that suggests the closest choice; empty if none is close."""
    close = _closest(word, choices)
    return "" if close is None else f" Did you mean {close!r}?"


def _closest(word: str, choices: Iterable[str]) -> str | None:
    listed = list(choices)
    same = [choice for choice in listed if choice.casefold() == word.casefold()]
    return next(iter(same or difflib.get_close_matches(word, listed, n=1)), None)


def first_true(flags: pa.BooleanArray | pa.ChunkedArray) -> int | None:
    """The index of the first true flag; None if there is none."""
    index = pc.index(flags, True).as_py()
    return None if index < 0 else int(index)
