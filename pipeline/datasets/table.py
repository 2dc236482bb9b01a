"""Any data set from one table, a row an image: how users bring their own.

The file is CSV (UTF-8, with or without a byte order mark; a header; commas between cells; cells
quoted as RFC 4180 says) or Parquet, told apart by the end of its name. The settings name three of
its columns; others are left alone:

- the image's path, relative to the folder ``images`` of the settings or, without one, to
  data/<dataset>/, with forward slashes. Without a leading ``./``, it is the image's id too;
- its labels: a text with a separator between labels or, in Parquet, a list of texts. Blanks around
  a label don't count. An empty cell, or null, is an image without labels. An empty part, as in
  ``cat;;dog``, is an error: a label may have been lost there. A label that a cell repeats, as in
  exports that have one for each object, counts once;
- its split, ``train`` or ``test``. A table without such a column is split by the setting
  ``test_share``, which see.

The vocabulary is the settings' or, without one, all labels of the table in the order of their code
points.

`nuswide` reads its lists with the same functions. Letters: N rows, C labels.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.listing import Listing, hash_sources
from pipeline.datasets.manifest import COLUMNS, Split
from pipeline.errors import GmpipeError
from pipeline.settings import TableSettings

Where = Callable[[int], str]
"""A row's number, from 0 -> its file and its place there as an editor shows it."""

REMEDY = "Mend the file and run `gmpipe prepare` again."

_MOST_LABELS = np.iinfo(np.int16).max + 1
_CSV_BATCH = 1 << 16
"""Rows that are Python objects at a time."""

# What does not lead below a folder: an empty, `.` or `..` part, a slash at either end, a backslash,
# a control character (a quote that is never closed draws line breaks into its cell).
_UNSOUND_PATH = r"(^|/)\.{0,2}(/|$)|\\|[\x00-\x1f]"


def read_table(root: Path, settings: TableSettings) -> Listing:
    """The listing of a table below ``root``, which is data/<dataset>/.

    Raises:
        GmpipeError: the table can't be read, lacks a column, or breaks a rule of the module's
            docstring; names the file and the line (CSV) or the row counted from 0 (Parquet).
    """
    file = root / settings.file
    names = {"image": settings.image, "labels": settings.labels}
    hints = {}
    if settings.test_share is None:
        names["split"] = settings.split
        hints[settings.split] = (
            f" Without such a column, `prepare.{root.name}.test_share: 0.2` lets a fifth of the "
            "images test."
        )
    remedy = (
        f"Put the table there, or set `prepare.{root.name}.file` in params.yaml to its path below "
        f"{root}."
    )
    if file.suffix == ".csv":
        rows = read_csv(file, names, remedy, hints, f"prepare.{root.name}")
    elif file.suffix == ".parquet":
        rows = _read_parquet(file, names, remedy, hints, f"prepare.{root.name}")
    else:
        raise GmpipeError(
            f"{file}: expected a name that ends in .csv or .parquet, found {file.suffix!r}. Save "
            "the table as one of them and name it so."
        )
    if settings.test_share is not None and settings.split in rows.header:
        raise GmpipeError(
            f"{file} has a column {settings.split!r}, and `prepare.{root.name}.test_share` in "
            "params.yaml asks for another split. Take one of the two out."
        )
    labels = rows.table.column("labels")
    if pa.types.is_string(labels.type):
        cells = pc.utf8_trim_whitespace(labels)
        cells = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
        labels = pc.split_pattern(cells, settings.separator)
    images = pc.replace_substring_regex(rows.table.column("image"), r"^(\./)+", "")
    check_images(images, rows.where)
    vocabulary, numbers = number_labels(
        labels, settings.vocabulary, rows.where, f"`prepare.{root.name}.vocabulary` of params.yaml"
    )
    return Listing(
        vocabulary=vocabulary,
        split_name=settings.split_name,
        sources=hash_sources(root, [settings.file]),
        table=image_rows(
            images, below(settings.images, images), _splits(images, rows, settings), numbers
        ),
    )


def _splits(images: pa.ChunkedArray, rows: Rows, settings: TableSettings) -> pa.ChunkedArray:
    """The split of each of N images: the table's, or by `share_of`."""
    if settings.test_share is None:
        words: dict[str, Split] = {"train": "train", "test": "test"}
        return name_splits(rows.table.column("split"), words, rows.where)
    tests = [share_of(path) < settings.test_share for path in images.to_pylist()]
    if all(tests) or not any(tests):
        raise GmpipeError(
            f"{rows.file}: by `test_share: {settings.test_share}` {sum(tests)} of {len(tests)} "
            "images test; expected some on both sides. Change it, or add a column "
            f"{settings.split!r} that says `train` or `test`."
        )
    return pa.chunked_array([["test" if test else "train" for test in tests]])


def share_of(path: str) -> float:
    """A number in [0,1), evenly spread over paths: the first 8 bytes of sha256 as a fraction."""
    digest = hashlib.sha256(path.encode()).digest()
    # A float has 53 bits: with all 64, the largest would be rounded to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


@dataclass(frozen=True)
class Rows:
    """Some columns of a table file.

    Attributes:
        file: where they are from.
        unit: what ``place`` counts: ``line``, from 1, or ``row``, from 0.
        header: the names of all columns that the file has.
        table: the N rows, at least one: ``place`` int64, and the columns that were asked for,
            texts without nulls; ``labels`` may have nulls, and may be lists of texts.
    """

    file: Path
    unit: Literal["line", "row"]
    header: Sequence[str] = field(repr=False)
    table: pa.Table = field(repr=False)

    def where(self, row: int) -> str:
        """The file and the place of a row."""
        return f"{self.file}, {self.unit} {self.table.column('place')[row].as_py()}"


def text_lines(file: Path, remedy: str) -> Iterator[str]:
    """The lines of a UTF-8 text with their ends; unpacked if the name ends in ``.gz``.

    Raises:
        GmpipeError: the file is missing (the message ends with ``remedy``), can't be read or
            unpacked, or is not UTF-8; names the line.
    """
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for line in stream:
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except FileNotFoundError:
        raise GmpipeError(f"there is no {file}. {remedy}") from None
    except UnicodeDecodeError as error:
        raise GmpipeError(
            f"{file}, line {number}: the byte {error.object[error.start]:#04x} is not UTF-8. Save "
            "the file as UTF-8 text and run `gmpipe prepare` again."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise GmpipeError(
            f"{file} can't be read beyond line {number}: {error}. {REMEDY}"
        ) from error


def read_csv(
    file: Path,
    columns: Mapping[str, str],
    remedy: str,
    hints: Mapping[str, str] | None = None,
    block: str | None = None,
) -> Rows:
    """Columns of a CSV file with a header; empty lines are skipped.

    The reader is Python's: pyarrow's knows no row's line, and takes all that follows a quote that
    is never closed for one cell.

    Args:
        columns: what to call a column -> its name in the header.
        remedy: what to do if the file is missing.
        hints: a name in the header -> what else can be done if it is missing.
        block: the block of params.yaml whose settings, called as the columns are, name them; None:
            the names are fixed.

    Raises:
        GmpipeError: as `text_lines`; a column is absent or there twice; a row has another number
            of cells than the header; quotes are not RFC 4180's; there is no row.
    """
    records = _csv_records(file, remedy)
    _, header = next(records, (1, []))
    if not header:
        raise GmpipeError(f"{file} is empty, expected a header and rows. {REMEDY}")
    if len(header) == 1 and len(columns) > 1 and (mark := _other_separator(header[0])):
        raise GmpipeError(
            f"{file}: its cells are separated by {mark}, expected commas: the header is "
            f"{header[0]!r}. Save the file as CSV with commas between cells and run `gmpipe "
            "prepare` again."
        )
    _check_header(file, header, columns, hints or {}, block)
    places = [header.index(name) for name in columns.values()]
    tables = []
    while batch := list(islice(records, _CSV_BATCH)):
        for line, cells in batch:
            if len(cells) != len(header):
                raise GmpipeError(
                    f"{file}, line {line}: found {len(cells)} cells, expected {len(header)} as in "
                    f"the header; a cell with a comma in it stands in double quotes. {REMEDY}"
                )
        found = {"place": [line for line, _ in batch]}
        texts = {
            key: pa.array([cells[place] for _, cells in batch], pa.string())
            for key, place in zip(columns, places, strict=True)
        }
        tables.append(pa.table(found | texts))
    if not tables:
        raise GmpipeError(f"{file} has no row below its header. {REMEDY}")
    return Rows(file, "line", header, pa.concat_tables(tables))


def _csv_records(file: Path, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each record that is not an empty line."""
    reader = csv.reader(text_lines(file, remedy), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise GmpipeError(
            f"{file}, line {line}: {error}; is a quote not closed, or not doubled? {REMEDY}"
        ) from error


def _other_separator(header: str) -> str | None:
    """What separates the cells of a header that has no comma, in words."""
    marks = {";": "semicolons", "\t": "tabs"}
    return next((name for mark, name in marks.items() if mark in header), None)


def _check_header(
    file: Path,
    header: Sequence[str],
    columns: Mapping[str, str],
    hints: Mapping[str, str],
    block: str | None,
) -> None:
    """Refuse a header that lacks columns, or has them twice; arguments as those of `read_csv`."""
    wrong = {key: name for key, name in columns.items() if header.count(name) != 1}
    if not wrong:
        return
    absent = [name for name in wrong.values() if name not in header]
    found = []
    for name in wrong.values():
        meant = _closest(name, header) if name in absent else None
        found.append(
            f"{name!r} {'is not a column' if name in absent else 'is more than one column'}"
            + (f" (perhaps {meant!r} is)" if meant else "")
        )
    step = "Rename it" if len(wrong) == 1 else "Rename them"
    if block is None:
        step += " in the file."
    else:
        keys = [f"`{block}.{key}`" for key in wrong]
        step += f" in the file, or set {' and '.join(keys)} in params.yaml to "
        step += "the column's name." if len(wrong) == 1 else "the columns' names."
    raise GmpipeError(
        f"{file}: {', '.join(found)}; the columns are {', '.join(map(repr, header))}. {step}"
        + "".join(hints.get(name, "") for name in absent)
    )


def _read_parquet(
    file: Path, columns: Mapping[str, str], remedy: str, hints: Mapping[str, str], block: str
) -> Rows:
    """Columns of a Parquet file, as `read_csv`."""
    try:
        # Not `read_table`: that would read a folder's files as one table.
        with pq.ParquetFile(file) as parquet:
            header = parquet.schema_arrow.names
            _check_header(file, header, columns, hints, block)
            table = parquet.read(columns=list(columns.values()))
    except FileNotFoundError:
        raise GmpipeError(f"there is no {file}. {remedy}") from None
    except (OSError, pa.ArrowException) as error:
        raise GmpipeError(f"{file} is not a whole Parquet file: {error}. {REMEDY}") from error
    if not table.num_rows:
        raise GmpipeError(f"{file} has no row. {REMEDY}")
    found = {"place": pa.chunked_array([np.arange(table.num_rows)])}
    for key, name in columns.items():
        column = table.column(name)
        found[key] = _as_text(file, name, column, lists=key == "labels")
        row = None if key == "labels" else first_true(pc.is_null(column))
        if row is not None:
            raise GmpipeError(f"{file}, row {row}: {name!r} is null, expected text. {REMEDY}")
    return Rows(file, "row", header, pa.table(found))


def _as_text(file: Path, name: str, column: pa.ChunkedArray, *, lists: bool) -> pa.ChunkedArray:
    """A column of any kind of text as strings; with ``lists``, lists of them as well."""
    kind, target = column.type, pa.string()
    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind, target = kind.value_type, pa.list_(pa.string())
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        expected = "text or lists of text" if lists else "text"
        raise GmpipeError(
            f"{file}: the column {name!r} holds {column.type}, expected {expected}. Write it anew, "
            "or name another column in params.yaml."
        )
    return column.cast(target)


def check_images(images: pa.ChunkedArray, where: Where) -> None:
    """Check that N paths lie below the folder that they are relative to, and that none is twice.

    Raises:
        GmpipeError: the first that doesn't, or the first repetition, with both places.
    """
    row = first_true(pc.match_substring_regex(images, _UNSOUND_PATH))
    if row is not None:
        raise GmpipeError(
            f"{where(row)}: the image is {images[row].as_py()!r}, expected a path below its folder "
            f"with forward slashes, and no part empty, `.` or `..`. {REMEDY}"
        )
    codes = images.combine_chunks().dictionary_encode().indices.to_numpy()
    # Codes count up from 0 in order of appearance: one that is no new maximum was there before.
    known = np.maximum.accumulate(np.concatenate([[-1], codes[:-1]]))
    if (codes <= known).any():
        row = int((codes <= known).argmax())
        first = int((codes == codes[row]).argmax())
        raise GmpipeError(
            f"{where(row)}: the image {images[row].as_py()!r} stands in {where(first)} already; "
            f"expected each image once. {REMEDY}"
        )


def name_splits(
    splits: pa.ChunkedArray, expected: Mapping[str, Split], where: Where
) -> pa.ChunkedArray:
    """The split of each of N rows, from the file's word for it.

    Raises:
        GmpipeError: the first row with another word.
    """
    words = pa.array(expected, pa.string())
    codes = pc.index_in(splits, value_set=words)
    row = first_true(pc.is_null(codes))
    if row is not None:
        raise GmpipeError(
            f"{where(row)}: the split is {splits[row].as_py()!r}, expected "
            f"{' or '.join(map(repr, expected))}. {REMEDY}"
        )
    return pc.take(pa.array(expected.values(), pa.string()), codes)


def number_labels(
    labels: pa.ChunkedArray, vocabulary: Sequence[str] | None, where: Where, source: str
) -> tuple[tuple[str, ...], pa.ListArray]:
    """Label names -> the vocabulary, and each row's label numbers, ascending, each once.

    Args:
        labels: N lists of names; null is a row without labels.
        vocabulary: all names in their order; None: those found, in the order of code points.
        source: where the vocabulary is from, for the message.

    Raises:
        GmpipeError: an empty or unknown name, with its row; no name at all.
    """
    lists = labels.combine_chunks()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    rows = np.repeat(np.arange(len(lists)), lengths)
    names = pc.fill_null(pc.utf8_trim_whitespace(lists.flatten()), "")
    place = first_true(pc.equal(names, ""))
    if place is not None:
        raise GmpipeError(
            f"{where(int(rows[place]))}: one of the labels {lists[int(rows[place])].as_py()} is "
            f"empty. {REMEDY}"
        )
    known = tuple(sorted(pc.unique(names).to_pylist()) if vocabulary is None else vocabulary)
    codes = pc.index_in(names, value_set=pa.array(known, pa.string()))
    place = first_true(pc.is_null(codes))
    if place is not None:
        name = names[place].as_py()
        raise GmpipeError(
            f"{where(int(rows[place]))}: the label {name!r} is not in {source}. Mend the file or "
            f"add the label there.{nearest(name, known)}"
        )
    if not 1 <= len(known) <= _MOST_LABELS:
        raise GmpipeError(
            f"from {where(0)} on: {len(known)} different labels, expected 1 to {_MOST_LABELS}. Say "
            "in params.yaml which column holds labels and what separates them."
        )
    keys = np.unique(rows * len(known) + np.asarray(codes))
    return known, label_lists(keys // len(known), keys % len(known), len(lists))


def label_lists(rows: np.ndarray, numbers: np.ndarray, count: int) -> pa.ListArray:
    """Lists of label numbers, int16, of ``count`` rows.

    Args:
        rows: the row of each entry, ascending.
        numbers: its label.
    """
    lengths = np.bincount(rows, minlength=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers.astype(np.int16)))


def below(folder: str, images: pa.ChunkedArray) -> pa.ChunkedArray:
    """The paths of images that are relative to a folder of the data set."""
    folder = PurePosixPath(folder).as_posix()
    return images if folder == "." else pc.binary_join_element_wise(folder, images, "/")


def image_rows(
    image_ids: pa.ChunkedArray,
    paths: pa.ChunkedArray,
    splits: pa.ChunkedArray,
    labels: pa.ListArray,
) -> pa.Table:
    """A listing's table of N images that have no ignored label and no known size."""
    count = len(image_ids)
    nobody = np.empty(0, dtype=np.int64)
    size = pa.nulls(count, pa.int32())
    columns = [image_ids, paths, splits, labels, label_lists(nobody, nobody, count), size, size]
    return pa.table(columns, schema=COLUMNS)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that suggests the choice that ``word`` may be a misspelling of, if any is near."""
    found = _closest(word, choices)
    return "" if found is None else f" Did you mean {found!r}?"


def _closest(word: str, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def first_true(flags: pa.BooleanArray | pa.ChunkedArray) -> int | None:
    """The place of the first true flag, if there is one."""
    place = pc.index(flags, True).as_py()
    return None if place < 0 else int(place)
