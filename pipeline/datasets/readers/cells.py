"""What a cell with labels holds: names with a separator between them, a list, or JSON.

Programs write several labels into one cell in many ways. These are read, each for itself:

- a list, set or tuple in Python's notation, `['cat', 'sofa']`, also as numpy prints an array,
  `['cat' 'sofa']`, or within `array(...)`, `frozenset(...)` and the like;
- JSON: a list of names, or what labelling tools write. That is an object, or a list of objects,
  with the names under certain keys (`values`: `{"choices": ["cat", "sofa"]}`), or an object
  with a truth value for each name;
- R's `c("cat", "sofa")`;
- anything else: names with the separator of the settings between them.

If most cells are in brackets, but without quotes, they are lists too (`[cat, sofa]`). If only few
cells are, the brackets belong to the name. The same holds for a column in which all cells are in
braces, as PostgreSQL writes arrays (`{cat,"traffic light"}`), in parentheses, or quoted names.

Letters: N rows, C labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from tokenize import TokenError

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.manifest import repeats
from pipeline.datasets.readers.rows import Where, did_you_mean, label_lists
from pipeline.datasets.readers.text import FIX_FILE
from pipeline.datasets.readers.values import (
    BRACKETED,
    UnclearError,
    is_number,
    names_in,
    names_under_one_key,
    parsed,
)
from pipeline.datasets.spelling import separator_of
from pipeline.errors import InputError
from pipeline.formats.encodings import plain_text

_EMPTY_WORDS = frozenset({"nan", "<na>", "nat", "null", "#n/a"})
"""What programs write for an empty cell, in lower case; upper and lower case don't matter."""

_PYTHONS_NONE = "None"
"""Also an empty cell, but only in this case: `none` may be a label."""

_UNCLEAR_WORDS = _EMPTY_WORDS | {"none", "n/a", "na", "-", "--", "?", "nil", "unlabelled"}
"""What people write for no label, in lower case."""

_PAIRS = (
    ("1", "0", "1.0", "0.0"),
    ("true", "false"),
    ("yes", "no"),
    ("1", "-1", "1.0", "-1.0"),
    ("y", "n"),
    ("t", "f"),
)
"""What says in one column whether an image has a label: yes, and no."""

_READ_AS_ONE = frozenset({"1", "true", "yes"})
_MOST_LABELS = np.iinfo(np.int16).max + 1

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_BEGINS_LIST = re.compile(r"""[\[({]\s*['"{\[]""")
_BARE = re.compile(r"\[[^\[\]{}'\"]*\]")
_QUOTED = r"""(?:"[^"]*"|'[^']*')"""
_ALL_BARE = (
    re.compile(r"""\{(?:"[^"]*"|[^{}\[\]"':])*\}"""),
    re.compile(r"""\([^()\[\]{}'"]*\)"""),
    re.compile(rf"{_QUOTED}(?:\s*[,;|]\s*{_QUOTED})*"),
)
"""Lists in a notation that only a whole column shows."""

_UNQUOTED = re.compile(r"""[{(,]\s*[^\s"{},)]|^['"]""")
_VECTOR = re.compile(r"[\[({]?\s*[01](?:\.0*)?(?:[\s,;|]+[01](?:\.0*)?)+\s*[\])}]?")
_HOLDS_NOTHING = re.compile(
    r"""[\[({]\s*(['"]?)(?P<word>[^'"\[\](){}]*)\1\s*[\])}]|(?P<none>""|'')""", re.DOTALL
)


@dataclass(frozen=True)
class _Cell:
    """A text that stands in the column, with the first of the rows that have it, and their number.

    Attributes:
        names: its labels, if the text is a list or JSON, or blank; else None.
        numeric: whether the text is a list of numbers.
        blank: whether the text stands for an empty cell, as `nan` does.
    """

    text: str
    row: int
    rows: int
    names: list[str] | None
    numeric: bool
    blank: bool


@dataclass(frozen=True)
class CellLabels:
    """The labels in N cells.

    Attributes:
        lists: N lists of names, null where the cell is.
        listed: (N,) bool: the cell is a list or JSON, so that a separator means nothing in it.
        notes: on what was read in a special way.
    """

    lists: pa.ChunkedArray
    listed: npt.NDArray[np.bool_]
    notes: list[str]


def split_cells(
    cells: pa.ChunkedArray,
    separator: str,
    vocabulary: Sequence[str] | None,
    where: Where,
    block: str,
) -> CellLabels:
    """Read the labels of N cells; a null has none.

    Args:
        cells: N texts.
        separator: what lies between two names, where a cell is not a list.
        vocabulary: the labels, where the user named them; `nan` can be one.
        block: the block of params.yaml with the settings, for messages.

    Raises:
        InputError: a cell begins like a list and is none, or is of another form than the others, or
            its meaning is not plain; names its row.
    """
    encoded = cells.combine_chunks().dictionary_encode()
    found = _different_cells(encoded, frozenset(vocabulary or ()), where)
    listed = [cell for cell in found if cell.names]
    bare: dict[str, list[str]] = {}
    notes = []
    if listed:
        _check_forms(found, max(listed, key=lambda cell: cell.rows), where)
        _check_numbers(listed, where, block)
        notes.append(_note_lists(found, listed, where))
    else:
        _check_vectors(found, where, block)
    if in_brackets := [] if listed else _bare_lists(found):
        mark = _mark_in(in_brackets, separator)
        bare = {cell.text: _bare_names(cell.text, mark) for cell in in_brackets}
        example = max(in_brackets, key=lambda cell: len(bare[cell.text]))
        kind = "Quotes" if example.text[0] in "'\"" else "Brackets"
        notes.append(
            f"{kind} in the column of labels ({_number(in_brackets)}) are read as lists with "
            f"{mark!r} between the labels: {_example(example, bare[example.text], where)}."
        )
    names: list[list[str]] = []
    for cell in found:
        if cell.names is not None:
            names.append(cell.names)
        elif cell.text in bare:
            names.append(bare[cell.text])
        elif cell.blank:
            names.append([])
            notes.append(_note_word(cell, where, block))
        else:
            names.append(_split(cell.text, separator))
    lists = pa.array(names, pa.list_(pa.string()))
    of_lists = pa.array([bool(cell.names) for cell in found], pa.bool_())
    return CellLabels(
        lists=pa.chunked_array([pc.take(lists, encoded.indices)]),
        listed=np.asarray(pc.fill_null(pc.take(of_lists, encoded.indices), False)),
        notes=notes,
    )


def _split(text: str, separator: str) -> list[str]:
    parts = text.split(separator)
    return [part for part in parts if part] if separator.isspace() else parts


def _different_cells(
    encoded: pa.DictionaryArray, vocabulary: Set[str], where: Where
) -> list[_Cell]:
    """The different texts in a column, in order of appearance."""
    codes = np.asarray(pc.fill_null(encoded.indices, -1))
    filled = np.flatnonzero(codes >= 0)
    rows = filled[~repeats(codes[filled])]
    counts = np.bincount(codes[filled])
    texts = [plain_text(text) for text in encoded.dictionary.to_pylist()]
    blank = {text for text in texts if _is_blank(text, vocabulary)}
    written = [text for text in texts if text and text not in blank]
    all_bare = _all_bare(written)
    known = names_under_one_key(written)
    return [
        _Cell(
            text,
            int(row),
            int(count),
            *(
                (known.get(text), False)
                if all_bare or known or text in blank
                else _listed(text, int(row), where)
            ),
            blank=text in blank,
        )
        if text
        else _Cell(text, int(row), int(count), [], numeric=False, blank=False)
        for text, row, count in zip(texts, rows, counts, strict=True)
    ]


def _all_bare(filled: Sequence[str]) -> bool:
    """Whether all texts are lists in one of `_ALL_BARE`, and some in no other notation."""
    return any(map(_UNQUOTED.search, filled)) and any(
        all(map(kind.fullmatch, filled)) for kind in _ALL_BARE
    )


def _bare_lists(found: Iterable[_Cell]) -> list[_Cell]:
    """The cells in brackets without quotes, if most cells that are not empty are like that.

    All cells that are not empty, if they are lists in another notation.
    """
    filled = [cell for cell in found if cell.names is None and not cell.blank]
    if _all_bare([cell.text for cell in filled]):
        return filled
    bare = [cell for cell in filled if _BARE.fullmatch(cell.text)]
    many = 2 * sum(cell.rows for cell in bare) > sum(cell.rows for cell in filled)
    return bare if many else []


def _note_word(cell: _Cell, where: Where, block: str) -> str:
    return (
        f"{cell.text!r} in the column of labels ({_number([cell])}, first in {where(cell.row)}) is "
        f"read as no label. Leave such cells empty. If {cell.text!r} is a label, list all labels "
        f"in `{block}.vocabulary`."
    )


def _is_blank(text: str, vocabulary: Set[str]) -> bool:
    """Whether a text stands for an empty cell: a word, alone or as all that is in a list."""
    word = text
    if nothing := _HOLDS_NOTHING.fullmatch(text):
        word = (nothing["word"] or "").strip()
        if not word:
            return bool(nothing["none"] or nothing[1])  # `[]` is an empty list
    empty = word == _PYTHONS_NONE or word.lower() in _EMPTY_WORDS
    return empty and word not in vocabulary


def _listed(text: str, row: int, where: Where) -> tuple[list[str] | None, bool]:
    """The names in a list or JSON, none in a blank text; and whether it is a list of numbers.

    The names are None if the text is something else.

    Raises:
        InputError: it begins like one, but can't be read.
    """
    try:
        if BRACKETED.fullmatch(text):
            value = parsed(text)
            numeric = isinstance(value, list | tuple | set) and any(map(is_number, value))
            return names_in(value), numeric
    except UnclearError as error:
        raise InputError(
            f"{where(row)}: the labels are {text!r}: {error}. Expected a list of names, such as "
            '["cat", "sofa"].',
            "Correct the cell, or write the names with the separator of the settings between "
            f"them. {FIX_FILE}",
        ) from None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError):
        pass
    if _BEGINS_LIST.match(text):
        raise InputError(
            f"{where(row)}: the labels are {text!r}, which begin like a list, but are not one. "
            'Expected quotes around each name and commas between them, such as ["cat", "sofa"].',
            FIX_FILE,
        )
    return None, False


def _mark_in(in_brackets: Iterable[_Cell], separator: str) -> str:
    """What separates labels in brackets: the separator of the settings if it occurs, or a comma."""
    texts = [cell.text[1:-1].strip() for cell in in_brackets]
    if separator.isspace() and any("," in text for text in texts):
        return ","
    return separator if any(separator in text for text in texts) else ","


def _bare_names(text: str, mark: str) -> list[str]:
    inner = (text if text[0] in "'\"" else text[1:-1]).strip()
    if re.search(_QUOTED, inner):
        other = rf"[^\s{re.escape(mark)}\"'][^{re.escape(mark)}]*"
        parts = re.findall(rf"{_QUOTED}|{other}", inner)
        return [part[1:-1] if part[0] in "'\"" else part for part in parts]
    return _split(inner, mark) if inner else []


def _check_numbers(listed: Sequence[_Cell], where: Where, block: str) -> None:
    """Refuse lists of numbers that are not the numbers of classes.

    They are 0 and 1 for each label if that is all they hold, and all have the same length.
    """
    numeric = [cell for cell in listed if cell.numeric]
    if not numeric:
        return
    first, names = numeric[0], next((cell for cell in listed if not cell.numeric), None)
    if names:
        raise InputError(
            f"{where(first.row)}: the labels are {first.text!r}, expected a list of names such as "
            f"{names.text!r} in {where(names.row)}.",
            f"Write names in each row, or numbers in each row. {FIX_FILE}",
        )
    lengths = {len(cell.names or ()) for cell in numeric}
    values = {name for cell in numeric for name in cell.names or ()}
    if len(lengths) == 1 and max(lengths) > 1 and values <= {"0", "1"}:
        raise _zeros_and_ones(first, where, block)


def _check_vectors(found: Iterable[_Cell], where: Where, block: str) -> None:
    """Refuse a column in which all cells have as many 0 and 1, with any mark between them."""
    filled = [cell for cell in found if cell.names is None and not cell.blank]
    lengths = {
        len(re.findall(r"[01](?:\.0*)?", cell.text)) if _VECTOR.fullmatch(cell.text) else 0
        for cell in filled
    }
    if len(lengths) == 1 and lengths != {0}:
        raise _zeros_and_ones(filled[0], where, block)


def _zeros_and_ones(cell: _Cell, where: Where, block: str) -> InputError:
    return InputError(
        f"{where(cell.row)}: the labels are {cell.text!r}: as in all rows, 0 and 1 in place "
        "of names. Expected a list of names, or of the numbers of the labels.",
        "Write one column per label instead, with its name in the header, and set "
        f"`{block}.labels` to the list of these columns.",
    )


def _check_forms(found: Iterable[_Cell], listed: _Cell, where: Where) -> None:
    """Refuse a cell that looks like a damaged list, where others are lists."""
    for cell in found:
        text = cell.text
        if cell.names is None and not cell.blank and (text[0] in "[{'\"" or text[-1] in "]}"):
            raise InputError(
                f"{where(cell.row)}: the labels are {text!r}, expected a list such as "
                f"{listed.text!r} in {where(listed.row)}, or one name.",
                FIX_FILE,
            )


def _note_lists(found: Sequence[_Cell], listed: Sequence[_Cell], where: Where) -> str:
    """Say that cells are lists, with an example that has several names, if there is one."""
    example = next((cell for cell in listed if len(cell.names or ()) > 1), listed[0])
    plain = [cell for cell in found if cell.names is None and not cell.blank]
    others = (
        f" Other cells ({_number(plain)}, first in {where(min(cell.row for cell in plain))}) are "
        "plain text."
        if plain
        else ""
    )
    return (
        f"Lists or JSON in the column of labels ({_number(listed)}) are read as such: "
        f"{_example(example, example.names or [], where)}.{others}"
    )


def _number(found: Iterable[_Cell]) -> str:
    """How many rows have one of these texts, in words."""
    rows = sum(cell.rows for cell in found)
    return f"{rows} cell{'s' if rows > 1 else ''}"


def _example(cell: _Cell, names: Sequence[str], where: Where) -> str:
    read = ", ".join(repr(plain_text(name)) for name in names)
    return f"{where(cell.row)}, {cell.text[:200]!r} has the labels {read}"


# --- names -> numbers ----------------------------------------------------------------------------


def encode_labels(
    labels: pa.ChunkedArray,
    vocabulary: Sequence[str] | None,
    where: Where,
    source: str,
    listed: npt.NDArray[np.bool_] | None = None,
) -> tuple[tuple[str, ...], pa.ListArray]:
    """Encode label names as numbers. Names that look alike are one (`plain_text`).

    Args:
        labels: N lists of names; null is a row without labels.
        vocabulary: all names in their order; None for the names in ``labels``, sorted by code
            point.
        source: where the vocabulary is from, for the message.
        listed: as in `CellLabels`, for the message; None if no row is a text with a separator.

    Returns:
        the vocabulary; and the label numbers of each row, ascending and without repetition.

    Raises:
        InputError: a name is empty or unknown, with its row; or there is no name at all.
    """
    lists = labels.combine_chunks()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    rows = np.repeat(np.arange(len(lists)), lengths)
    encoded = pc.fill_null(lists.flatten(), "").dictionary_encode()
    spellings = [plain_text(name) for name in encoded.dictionary.to_pylist()]
    codes = np.asarray(encoded.indices)
    if "" in spellings:
        empty = np.array([name == "" for name in spellings])
        row = int(rows[empty[codes].argmax()])
        raise InputError(
            f"{where(row)}: one of the labels {lists[row].as_py()} is empty.", FIX_FILE
        )
    known = tuple(sorted(set(spellings)) if vocabulary is None else map(plain_text, vocabulary))
    index = {name: number for number, name in enumerate(known)}
    numbers = np.array([index.get(name, -1) for name in spellings], dtype=np.int64)[codes]
    if (numbers < 0).any():
        entry = int((numbers < 0).argmax())
        name = spellings[codes[entry]]
        remedy = f"Fix the file, or add the label there.{did_you_mean(name, known)}"
        if mark := separator_of(name, known):
            remedy = f"It is made of labels that are. If {mark!r} separates them, "
            if listed is None or listed[rows[entry]]:
                remedy += f"make each an entry of the list. {FIX_FILE}"
            else:
                shown = json.dumps(mark, ensure_ascii=False)
                remedy += f"set `separator: {shown}` in the same block of params.yaml."
        raise InputError(
            f"{where(int(rows[entry]))}: the label {name!r} is not in {source}.", remedy
        )
    if not 1 <= len(known) <= _MOST_LABELS:
        raise InputError(
            f"From {where(0)} on, there are {len(known)} different labels, expected 1 to "
            f"{_MOST_LABELS}.",
            "Set the column of the labels and their separator in params.yaml.",
        )
    keys = np.unique(rows * len(known) + numbers)
    return known, label_lists(keys // len(known), keys % len(known), len(lists))


def notes_on_names(
    vocabulary: Sequence[str], labels: pa.ListArray, where: Where, setting: str
) -> list[str]:
    """Note labels that may mean that there is none, and labels that are numbers.

    Args:
        vocabulary: their names.
        labels: N lists of label numbers.
        where: the position of a row.
        setting: what to set if the column holds 0 and 1.
    """
    lengths = np.asarray(pc.list_value_length(labels))
    words = {name.lower() for name in vocabulary}
    if lengths.max() <= 1 and (yes := next((p[0] for p in _PAIRS if words <= {*p}), None)):
        readable = yes in _READ_AS_ONE and "-1" not in words and "-1.0" not in words
        return [
            f"The labels are {' and '.join(map(repr, vocabulary))}. If {yes} says that an image "
            "has the label that the column is named after, "
            + ("" if readable else "write 1 in place of it, and 0 in all other cells, and ")
            + f"set `{setting}`."
        ]
    if all(_NUMBER.fullmatch(name) for name in vocabulary):
        shown = ", ".join(map(repr, vocabulary[:3])) + (", ..." if len(vocabulary) > 3 else "")
        return [
            f"All labels are numbers ({shown}), which are used as their names. If they stand for "
            "names, write the names: the labels' vectors are made of them."
        ]
    rows = np.repeat(np.arange(len(labels)), lengths)
    numbers = np.asarray(labels.flatten())
    notes = []
    for number, name in enumerate(vocabulary):
        having = rows[numbers == number] if name.lower() in _UNCLEAR_WORDS else []
        if len(having):
            notes.append(
                f"{name!r} is a label (rows: {len(having)}, first in {where(int(having[0]))}). If "
                "it means that an image has no label, leave the cell empty."
            )
    return notes
