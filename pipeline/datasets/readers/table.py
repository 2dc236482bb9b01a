"""Any data set from one table. This is how users bring their own.

The file is CSV (UTF-8, with or without a byte order mark; with a header; commas, semicolons or tabs
between the cells of all lines; quotes as in RFC 4180) or Parquet, by the suffix of its name. The
settings name its columns, and others are ignored:

- the image's path, relative to the folder ``images`` of the settings or, without one, to
  data/<dataset>/, with forward slashes. Without a leading ``./``, it is also the image's id;
- its labels: text with a separator between labels, a list or JSON (`cells`) or, in Parquet, a list
  of texts. Or a list of columns that hold 0 and 1 (`onehot`). If no column ``labels`` exists, and
  all other columns hold 0 and 1, they are the labels. Blanks around a label are removed. An empty
  cell, or null, is an image without labels. An empty part, as in ``cat;;dog``, is an error, because
  a label may have been lost there. A label that a cell repeats, as in exports with one label per
  object, counts once;
- its split: ``train``, ``test`` or, for images that validate each training, ``val``, or a plain
  form of these (`Training`, `valid`). A table
  without this column is split by the setting ``test_share``.

An image has one row, or one row for each of its labels.

The vocabulary is that of the settings. Without one, it is all labels of the table, sorted by code
point, or the columns of 0 and 1 in their order. What was read in a way that could be wrong is in
the listing's notes.

Letters: N rows, C labels.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.listing import Listing, hash_sources, split_by_share
from pipeline.datasets.manifest import Split, repeats
from pipeline.datasets.readers.cells import encode_labels, notes_on_names, split_cells
from pipeline.datasets.readers.onehot import (
    Marks,
    columns_of_flags,
    guess_columns,
    marks_of,
    read_flags,
    yaml_list,
)
from pipeline.datasets.readers.rows import (
    Rows,
    check_header,
    check_paths,
    image_codes,
    join_folder,
    label_lists,
    listing_table,
    parse_splits,
    read_csv,
    read_header,
    read_parquet,
)
from pipeline.datasets.spelling import (
    is_list_like,
    names_with_entities,
    names_with_scores,
    packed_labels,
)
from pipeline.errors import InputError
from pipeline.formats.encodings import plain_text
from pipeline.settings import TableSettings

_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
_SPLIT_WORDS: dict[str, Split] = {
    **_SPLITS,
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}
_SUFFIXES = (".csv", ".tsv", ".parquet")
_SHOWN = 5  # columns that a note names

_UNNAMED = re.compile(r"|Unnamed: \d+(\.\d+)*|(__index_)?level_\d+(__)?|index", re.IGNORECASE)
"""Columns without a name, as pandas calls them: they hold the number of a row, or nothing."""


@dataclass(frozen=True)
class _Labels:
    """The labels of N rows.

    Attributes:
        vocabulary: their names.
        numbers: N lists of label numbers.
        flags: whether each label has a column of its own.
        listed: as in `CellLabels`; None where no cell was split.
        notes: on how they were read.
        unknown: N lists of the numbers of labels that are unknown; None if none can be.
    """

    vocabulary: tuple[str, ...]
    numbers: pa.ListArray = field(repr=False)
    flags: bool
    notes: list[str]
    listed: npt.NDArray[np.bool_] | None = field(default=None, repr=False)
    unknown: pa.ListArray | None = field(default=None, repr=False)


def read_table(root: Path, settings: TableSettings) -> Listing:
    """List the images of a table below ``root``, which is data/<dataset>/.

    Raises:
        MissingError: the table does not exist.
        InputError: it can't be read, lacks a column, or breaks a rule of the module's docstring;
            names the file, and the line (CSV) or the row counted from 0 (Parquet).
    """
    _check_settings(root, settings)
    rows, columns = _read_rows(root, settings)
    images = pc.utf8_trim_whitespace(rows.table.column("image"))
    images = pc.replace_substring_regex(images, r"^(\./)+", "")
    check_paths(images, rows.where, root / settings.images)
    labels = _read_labels(rows, columns, root, settings)
    splits, split_notes = _splits(images, rows, settings)
    first_rows = _first_rows(labels)
    notes = [
        *_note_blanks(rows),
        *split_notes,
        *labels.notes,
        *_note_packed(rows, images, labels, first_rows, root, settings),
    ]
    repeated = repeats(image_codes(images))
    numbers = labels.numbers
    if repeated.any():
        numbers, note = _joined(images, splits, labels, rows, settings)
        notes.append(note)
        images, splits = (column.filter(pa.array(~repeated)) for column in (images, splits))
    return Listing(
        vocabulary=labels.vocabulary,
        split_name=settings.split_name,
        sources=hash_sources(root, [settings.file]),
        table=listing_table(
            images, join_folder(settings.images, images), splits, numbers, labels.unknown
        ),
        notes=tuple(notes),
        places={name: rows.place(row) for name, row in first_rows.items()},
    )


# --- columns -------------------------------------------------------------------------------------


def _check_settings(root: Path, settings: TableSettings) -> None:
    """Check the settings, of which mistakes would otherwise be taken for the table's."""
    block, images = f"prepare.{root.name}", settings.images
    if re.match(r"/|[A-Za-z]:", images) or "\\" in images or ".." in Path(images).parts:
        raise InputError(
            f"`{block}.images` in params.yaml is {images!r}, expected a folder below {root}, with "
            "forward slashes.",
            f"Move the photographs there, or link their folder (`ln -s FOLDER {root}/photos`), and "
            f"set `{block}.images: photos`.",
        )
    file = root / settings.file
    if file.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{file}: the suffix is {file.suffix!r}, expected {', '.join(_SUFFIXES)}.",
            "Save the table in one of these formats, with its suffix.",
        )
    names = [plain_text(name) for name in settings.vocabulary or ()]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(
            f"`{block}.vocabulary` in params.yaml has the label {twice[0]!r} "
            f"{names.count(twice[0])} times.",
            "Write it once.",
        )


def _read_rows(root: Path, settings: TableSettings) -> tuple[Rows, tuple[str, ...]]:
    """Read the file; and the columns of 0 and 1, none if one column has the labels."""
    file, block = root / settings.file, f"prepare.{root.name}"
    hints: dict[str, str] = {}
    names = {"image": plain_text(settings.image)}
    if settings.test_share is None:
        names["split"] = plain_text(settings.split)
        hints[names["split"]] = (
            f" Without such a column, set `{block}.test_share: 0.2` to make a fifth of the images "
            "the test split."
        )
    remedy = f"Put the table there, or set `{block}.file` in params.yaml to its path below {root}."
    labels = [settings.labels] if isinstance(settings.labels, str) else settings.labels
    wanted = {*names.values(), plain_text(settings.split), *map(plain_text, labels)}
    header, plain = read_header(file, wanted, remedy)
    if settings.test_share is not None and plain_text(settings.split) in header:
        raise InputError(
            f"{file} has a column {settings.split!r}, but `{block}.test_share` in params.yaml asks "
            "for another split.",
            "Remove one of the two.",
        )

    def read(labels: Mapping[str, str]) -> Rows:
        columns = {**names, **labels}
        check_header(file, header, columns, hints, block)
        _check_uses(columns, block)
        return read_columns(columns)

    def read_columns(columns: Mapping[str, str]) -> Rows:
        if file.suffix.lower() == ".parquet":
            return read_parquet(file, columns, remedy, hints, block)
        return read_csv(file, columns, remedy, hints, block)

    if settings.test_share is None and names["split"] not in header:
        single = [name for name in header if name in plain and header.count(name) == 1]
        with suppress(InputError):  # of the file: the missing columns may explain it
            rows = read_columns(_keys(single))
            hints[names["split"]] = _hint_at_split(rows, single, block) or hints[names["split"]]
    if isinstance(settings.labels, list):
        several = tuple(map(plain_text, settings.labels))
        return read(_keys(several)), several
    label = plain_text(settings.labels)
    hints[label] = " If the table has a column with 0 and 1 for each label instead, "
    if set(names.values()) <= set(header):
        hints[label] += f"set `{block}.labels` to the list of these columns."
    else:
        hints[label] += "these are read by themselves once the other columns are found."
    others = _others(header, (*names.values(), plain_text(settings.split)), label)
    once = tuple(name for name in others if name in plain and header.count(name) == 1)
    if once and all(header.count(name) == 1 for name in names.values()):
        rows = read(_keys(once))
        twice = [name for name in others if header.count(name) > 1]
        marks = _marks(root, settings)
        if twice and columns_of_flags(_columns(rows, once), marks):
            read(_keys(twice))  # which says so
        guessed = _guess(rows, once, others, label, f"{block}.labels", marks)
        if guessed:
            return rows, guessed
    return read({"labels": label}), ()


def _marks(root: Path, settings: TableSettings) -> Marks:
    return marks_of(settings.unknown, f"prepare.{root.name}.unknown")


def _guess(
    rows: Rows, once: Sequence[str], others: Sequence[str], label: str, key: str, marks: Marks
) -> tuple[str, ...]:
    """The columns of 0 and 1, as `guess_columns`; none if one column has the misspelt name."""
    flags = _columns(rows, once)
    close = difflib.get_close_matches(label, others, n=2)
    if len(close) == 1 and (
        _stem(close[0]) == _stem(label) or close[0] not in columns_of_flags(flags, marks)
    ):
        return ()
    unlike = list(dict.fromkeys(name for name in others if name not in once))
    return guess_columns(rows, flags, unlike, label, key, marks)


def _hint_at_split(rows: Rows, columns: Sequence[str], block: str) -> str | None:
    """A sentence on the column that has the splits, if one of the columns is like that."""
    for name, column in _columns(rows, columns).items():
        words = {_split_word(word) for word in pc.unique(column).to_pylist()}
        if words <= set(_SPLITS) and {"train", "test"} <= words:
            return (
                f" The column {name!r} holds only {', '.join(sorted(words))}: set "
                f"`{block}.split: {yaml_list([name])[1:-1]}`."
            )
    return None


def _split_word(word: str | None) -> str:
    """The split that a word means; the word itself if it means none."""
    return _SPLIT_WORDS.get(plain_text(word or "").lower(), word or "")


def _stem(name: str) -> str:
    return name.casefold().removesuffix("s")


def _keys(columns: Sequence[str]) -> dict[str, str]:
    """The keys that columns of 0 and 1 have in `Rows.table`."""
    return {f"labels.{number}": name for number, name in enumerate(columns)}


def _columns(rows: Rows, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    return {name: rows.table.column(key) for key, name in _keys(names).items()}


def _others(header: Sequence[str], used: Sequence[str], label: str) -> tuple[str, ...]:
    """The columns that may be labels, where the column of labels is missing."""
    if label in header:
        return ()
    return tuple(name for name in header if name not in used and not _UNNAMED.fullmatch(name))


def _check_uses(columns: Mapping[str, str], block: str) -> None:
    """Check that no column is used for two purposes."""
    keys: dict[str, str] = {}
    for key, name in columns.items():
        setting = f"`{block}.{key.partition('.')[0]}`"
        if name in keys:
            both = f"{keys[name]} and {setting} both name the column {name!r}."
            if keys[name] == setting:
                both = f"{setting} names the column {name!r} twice."
            raise InputError(both, "Name each column once in params.yaml.")
        keys[name] = setting


# --- labels --------------------------------------------------------------------------------------


def _read_labels(
    rows: Rows, columns: tuple[str, ...], root: Path, settings: TableSettings
) -> _Labels:
    """Read the labels of each row; ``columns`` are those of 0 and 1, if there are any."""
    source = f"`prepare.{root.name}.vocabulary` of params.yaml"
    if columns or not isinstance(settings.labels, str):
        marks, notes = _marks(root, settings), []
        lists, unknown = read_flags(_columns(rows, columns), rows.where, marks)
        if isinstance(settings.labels, str):
            shown = ", ".join([*columns[:_SHOWN], *(["..."] if len(columns) > _SHOWN else [])])
            notes = [
                f"{rows.file} has no column {settings.labels!r}. All other columns hold 0 and 1, "
                f"and are read as one column per label: {shown}. To read others, set "
                f"`prepare.{root.name}.labels` to a list of columns, or to the column with names."
            ]
        names = settings.vocabulary or columns
        vocabulary, numbers = encode_labels(lists, names, rows.where, source)
        _, unknown_numbers = encode_labels(unknown, names, rows.where, source)
        return _Labels(vocabulary, numbers, True, notes, unknown=unknown_numbers)
    if settings.unknown:
        raise InputError(
            f"`prepare.{root.name}.unknown` in params.yaml marks cells of columns of 0 and 1, but "
            f"the labels of {rows.file} are in the column {settings.labels!r}.",
            "Remove `unknown`, or write a column for each label.",
        )
    cells, listed, notes = rows.table.column("labels"), None, []
    if pa.types.is_string(cells.type):
        block = f"prepare.{root.name}"
        split = split_cells(cells, settings.separator, settings.vocabulary, rows.where, block)
        cells, listed, notes = split.lists, split.listed, split.notes
    vocabulary, numbers = encode_labels(cells, settings.vocabulary, rows.where, source, listed)
    setting = f"prepare.{root.name}.labels: {yaml_list([settings.labels])}"
    notes += notes_on_names(vocabulary, numbers, rows.where, setting)
    return _Labels(vocabulary, numbers, False, notes, listed)


def _first_rows(labels: _Labels) -> dict[str, int]:
    """The first row with each label."""
    entries = np.repeat(np.arange(len(labels.numbers)), _lengths(labels.numbers))
    numbers, firsts = np.unique(np.asarray(labels.numbers.flatten()), return_index=True)
    return {
        labels.vocabulary[number]: int(entries[first])
        for number, first in zip(numbers, firsts, strict=True)
    }


def _note_packed(
    rows: Rows,
    images: pa.ChunkedArray,
    labels: _Labels,
    first_rows: Mapping[str, int],
    root: Path,
    settings: TableSettings,
) -> list[str]:
    """Note labels that may be several, with another separator than that of the settings."""
    if labels.flags or settings.vocabulary is not None:
        return []
    if names := names_with_entities(labels.vocabulary):
        return [
            f"{len(names)} of {len(labels.vocabulary)} labels have an HTML entity: {names[0]!r} "
            f"({rows.place(first_rows[names[0]])}). Write the characters instead, such as `&` for "
            "`&amp;`: the `;` of an entity may also separate labels."
        ]
    if names := names_with_scores(labels.vocabulary):
        return [
            f"{len(names)} of {len(labels.vocabulary)} labels end with a number: {names[0]!r} "
            f"({rows.place(first_rows[names[0]])}). If it is a score, remove it from the cells."
        ]
    one_each = not repeats(image_codes(images)).any() and bool(_lengths(labels.numbers).max() < 2)
    mark, names = packed_labels(labels.vocabulary, one_each=one_each) or (",", [])
    # Where no image has two labels, the separator of the settings may be the wrong one.
    if not names and one_each:
        names = [name for name in labels.vocabulary if re.search(r"[^\s,],\s*[^\s,]", name)]
    if not names:
        return []
    if lists := [name for name in names if is_list_like(name, mark)]:
        return [
            f"{len(lists)} of {len(labels.vocabulary)} labels have {mark!r} and brackets or quotes "
            f"as lists have them, but are no list that can be read: {lists[0]!r} "
            f"({rows.place(first_rows[lists[0]])}). If such a label is several, write their names "
            f"with {settings.separator!r} between them."
        ]
    row = first_rows[names[0]]
    if labels.listed is None or labels.listed[row]:
        remedy = "make each label an entry of its own in the list."
    else:
        shown = json.dumps(mark, ensure_ascii=False)
        remedy = f"set `prepare.{root.name}.separator: {shown}` in params.yaml."
    return [
        f"{len(names)} of {len(labels.vocabulary)} labels contain {mark!r}, and each may be "
        f"several labels: {names[0]!r} ({rows.place(row)}). If {mark!r} separates labels, {remedy}"
    ]


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return np.asarray(pc.list_value_length(lists))


# --- images --------------------------------------------------------------------------------------


def _note_blanks(rows: Rows) -> list[str]:
    """Note blanks around paths, which are not taken for a part of them."""
    paths = rows.table.column("image")
    blanks = np.flatnonzero(np.asarray(pc.not_equal(paths, pc.utf8_trim_whitespace(paths))))
    if not len(blanks):
        return []
    row = int(blanks[0])
    return [
        f"Blanks around paths are left out (rows: {len(blanks)}, first in {rows.where(row)}): "
        f"{paths[row].as_py()!r}."
    ]


def _joined(
    images: pa.ChunkedArray,
    splits: pa.ChunkedArray,
    labels: _Labels,
    rows: Rows,
    settings: TableSettings,
) -> tuple[pa.ListArray, str]:
    """The labels of images of which some have several rows, one for each label; and a note.

    Raises:
        InputError: the rows of an image are of another form, or differ in their split; names two.
    """
    codes = image_codes(images)
    firsts = np.flatnonzero(~repeats(codes))
    several = np.bincount(codes)[codes] > 1
    first = firsts[codes]  # the first row of each row's image
    words = np.asarray(splits)
    other_split = words != words[first]
    whole = several & ((_lengths(labels.numbers) != 1) | labels.flags)
    refused = repeats(codes) & (other_split | whole | whole[first])
    if refused.any():
        row = int(refused.argmax())
        again = f"the image {images[row].as_py()!r} is already in {rows.where(int(first[row]))}"
        if other_split[row]:
            raise InputError(
                f"{rows.where(row)}: {again}, but the split is {words[row]!r} here and "
                f"{words[first[row]]!r} there. Expected one split per image.",
                f"Write the same split in all rows of an image, in the column {settings.split!r}.",
            )
        raise InputError(
            f"{rows.where(row)}: {again}. Expected one row per image with all its labels, or one "
            "row per label with exactly one label in each.",
            "Remove one of the two rows, or join them to one"
            + (
                " with a 1 for each label."
                if labels.flags
                else f" with {settings.separator!r} between the labels."
            ),
        )
    entries = codes.astype(np.int64)  # each row of these images has one label, or its image one row
    lengths = _lengths(labels.numbers)
    count = len(labels.vocabulary)
    keys = np.unique(np.repeat(entries, lengths) * count + np.asarray(labels.numbers.flatten()))
    row = int(repeats(codes).argmax())
    note = (
        "Rows of the same image with one label each are joined (images: "
        f"{len(np.unique(codes[several]))}): {images[row].as_py()!r} stands in "
        f"{rows.where(int(first[row]))} and {rows.unit} "
        f"{rows.table.column('position')[row].as_py()}."
    )
    return label_lists(keys // count, keys % count, len(firsts)), note


def _splits(
    images: pa.ChunkedArray, rows: Rows, settings: TableSettings
) -> tuple[pa.ChunkedArray, list[str]]:
    """The split of each of N images: the table's, or by `split_by_share`; and notes."""
    if settings.test_share is None:
        column = rows.table.column("split")
        encoded = column.combine_chunks().dictionary_encode()
        words = encoded.dictionary.to_pylist()
        meant = [_split_word(word) for word in words]
        other = [f"{a!r} is read as {b!r}" for a, b in zip(words, meant, strict=True) if a != b]
        notes = []
        if other and set(meant) <= set(_SPLITS):
            notes = [f"In the column {settings.split!r}, {', '.join(other)}."]
            column = pa.chunked_array([pc.take(pa.array(meant, pa.string()), encoded.indices)])
        return parse_splits(column, _SPLITS, rows.where), notes
    remedy = f"add a column {settings.split!r} with `train` or `test` in each row."
    splits = split_by_share(images.to_pylist(), settings.test_share, rows.file, remedy)
    return pa.chunked_array([splits]), []
