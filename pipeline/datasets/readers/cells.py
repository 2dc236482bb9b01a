"""What a cell with labels holds: names with a separator between them, a list, or JSON.

Programs write several labels into one cell in many ways. These are read, each for itself:

- a list, set or tuple in Python's notation, `['cat', 'sofa']`, also as numpy prints an array,
  `['cat' 'sofa']`, or within `array(...)`, `frozenset(...)` and the like;
- JSON: a list of names, or what labelling tools write. That is an object, or a list of objects,
  with the names under one of `LABEL_KEYS` or a key that ends with `labels`
  (`{"choices": ["cat", "sofa"]}`), or an object with a truth value for each name;
- anything else: names with the separator of the settings between them.

Where most cells are in brackets, but without quotes (`[cat, sofa]`), they are lists too; of few,
the brackets belong to the name.

Letters: N rows, C labels.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from tokenize import TokenError

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.readers.rows import Where, did_you_mean, label_lists, repeats
from pipeline.datasets.readers.text import FIX_FILE
from pipeline.datasets.spelling import separator_of
from pipeline.errors import InputError
from pipeline.formats.encodings import plain_text

LABEL_KEYS = ("choices", "label", "class", "class_name", "category", "tag", "tags", "name", "title")
"""Keys of an object that hold its label or labels; the first that it has counts."""

EMPTY_WORDS = frozenset({"nan", "<na>", "nat", "null", "#n/a"}) | {"None"}
"""What programs write for an empty cell; those in lower case in any case."""

_UNCLEAR_WORDS = EMPTY_WORDS | {"none", "n/a", "na", "-", "--", "?", "nil", "unlabelled"}
"""What people write for no label, in lower case."""

_MOST_LABELS = np.iinfo(np.int16).max + 1

_QUOTED = r"""(?:'[^'\\]*'|"[^"\\]*")"""
_PLAIN_LIST = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*\]")
_PRINTED_ARRAY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})*\s*\]")
_WRAPPED = re.compile(
    r"(?:frozenset|set|array|Index|list|tuple)\((.*?)(?:,\s*dtype=[\w.<>'\"]+)?\)", re.DOTALL
)
_BRACKETED = re.compile(rf"\[.*\]|\{{.*\}}|\(.*\)|{_WRAPPED.pattern}", re.DOTALL)
_BEGINS_LIST = re.compile(r"""[\[({]\s*['"{\[]""")
_BARE = re.compile(r"\[([^\[\]{}'\"]*)\]")


class _UnclearError(ValueError):
    """A value is not a list of names; says what it is."""


@dataclass(frozen=True)
class _Cell:
    """A text that stands in the column, with the first of the rows that have it, and their number.

    Attributes:
        names: its labels, if the text is a list or JSON, or blank; else None.
    """

    text: str
    row: int
    rows: int
    names: list[str] | None


def split_cells(
    cells: pa.ChunkedArray,
    separator: str,
    vocabulary: Sequence[str] | None,
    where: Where,
    block: str,
) -> tuple[pa.ChunkedArray, list[str]]:
    """Read the labels of N cells; a null has none.

    Args:
        cells: N texts.
        separator: what lies between two names, where a cell is not a list.
        vocabulary: the labels, where the user named them; `nan` can be one.
        block: the block of params.yaml with the settings, for messages.

    Returns:
        N lists of names, null where the cell is; and notes on what was read in a special way.

    Raises:
        InputError: a cell begins like a list and is none, or is of another form than the others;
            names its row.
    """
    encoded = cells.combine_chunks().dictionary_encode()
    found = _different_cells(encoded, where)
    listed = [cell for cell in found if cell.names]
    bare: set[str] = set()
    notes = []
    if listed:
        _check_forms(found, max(listed, key=lambda cell: cell.rows), where)
        notes.append(_note_lists(found, listed, where))
    elif in_brackets := _bare_lists(found):
        bare = {cell.text for cell in in_brackets}
        notes.append(
            f"Brackets in the column of labels ({_number(in_brackets)}) are read as lists with "
            f"commas: {_example(in_brackets[0], _bare_names(in_brackets[0].text), where)}."
        )
    names: list[list[str]] = []
    for cell in found:
        if cell.names is not None:
            names.append(cell.names)
        elif cell.text in bare:
            names.append(_bare_names(cell.text))
        elif _is_empty_word(cell.text) and cell.text not in (vocabulary or ()):
            names.append([])
            notes.append(_note_word(cell, where, block))
        else:
            parts = cell.text.split(separator)
            names.append([part for part in parts if part] if separator.isspace() else parts)
    lists = pa.array(names, pa.list_(pa.string()))
    return pa.chunked_array([pc.take(lists, encoded.indices)]), notes


def _different_cells(encoded: pa.DictionaryArray, where: Where) -> list[_Cell]:
    """The different texts in a column, in order of appearance."""
    codes = np.asarray(pc.fill_null(encoded.indices, -1))
    filled = np.flatnonzero(codes >= 0)
    rows = filled[~repeats(codes[filled])]
    counts = np.bincount(codes[filled])
    texts = (plain_text(text) for text in encoded.dictionary.to_pylist())
    return [
        _Cell(text, int(row), int(count), _listed(text, int(row), where))
        for text, row, count in zip(texts, rows, counts, strict=True)
    ]


def _bare_lists(found: Iterable[_Cell]) -> list[_Cell]:
    """The cells in brackets without quotes, if most cells that are not empty are like that."""
    filled = [cell for cell in found if cell.names is None]
    bare = [cell for cell in filled if _BARE.fullmatch(cell.text)]
    many = 2 * sum(cell.rows for cell in bare) > sum(cell.rows for cell in filled)
    return bare if many else []


def _note_word(cell: _Cell, where: Where, block: str) -> str:
    return (
        f"{cell.text!r} in the column of labels ({_number([cell])}, first in {where(cell.row)}) is "
        f"read as no label. Leave such cells empty. If {cell.text!r} is a label, list all labels "
        f"in `{block}.vocabulary`."
    )


def _is_empty_word(text: str) -> bool:
    return text in EMPTY_WORDS or text.lower() in EMPTY_WORDS


def _listed(text: str, row: int, where: Where) -> list[str] | None:
    """The names in a list or JSON, none in a blank text; None if the text is something else.

    Raises:
        InputError: it begins like one, but can't be read.
    """
    if not text:
        return []
    try:
        if _BRACKETED.fullmatch(text):
            return _names(_value(text))
    except _UnclearError as error:
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
    return None


def _value(text: str) -> object:
    """The value of a list or object in the notation of JSON, Python or numpy.

    Raises:
        ValueError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError: it is none.
    """
    if _PLAIN_LIST.fullmatch(text) or _PRINTED_ARRAY.fullmatch(text):
        return [quoted[1:-1] for quoted in re.findall(_QUOTED, text)]
    try:
        return json.loads(text)
    except ValueError:
        pass
    if wrapped := _WRAPPED.fullmatch(text):
        return _value(wrapped[1]) if wrapped[1].strip() else []
    kinds = [
        token.type
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.NL, tokenize.NEWLINE)
    ]
    strings = (tokenize.STRING, tokenize.STRING)
    if strings in pairwise(kinds):  # Python would make one text of the two
        raise ValueError(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # about backslashes
        value = ast.literal_eval(text)
    if not isinstance(value, str | list | tuple | set | dict):
        raise ValueError(text)  # a number in brackets
    return value


def _names(value: object) -> list[str]:
    """The names in a value that was read from a cell.

    Raises:
        _UnclearError: it has something else.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _names_of_object(value)
    if isinstance(value, list | tuple | set):
        items = sorted(value, key=str) if isinstance(value, set) else list(value)
        if len(items) > 1 and all(item in (0, 1) for item in items):
            raise _UnclearError(
                "it has 0 and 1 in place of names. Write one column per label instead, with its "
                "name in the header"
            )
        if nested := [item for item in items if isinstance(item, list | tuple | set)]:
            raise _UnclearError(f"the list has the list {nested[0]!r} in it")
        return [name for item in items for name in _names(item)]
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    raise _UnclearError(f"{value!r} is not a name")


def _names_of_object(value: dict[object, object]) -> list[str]:
    keys = [str(key) for key in value]
    key = next((key for key in LABEL_KEYS if key in value), None)
    if key is None:
        key = next((key for key in keys if key.endswith("labels")), None)
    if key is not None:
        return _names(value[key])
    if all(flag in (0, 1) for flag in value.values()):
        return [str(name) for name, flag in value.items() if flag]
    if "value" in value:  # Label Studio's JSON
        return _names(value["value"])
    raise _UnclearError(f"the object has the keys {keys}, and none of {', '.join(LABEL_KEYS)}")


def _bare_names(text: str) -> list[str]:
    inner = text[1:-1].strip()
    return inner.split(",") if inner else []


def _check_forms(found: Iterable[_Cell], listed: _Cell, where: Where) -> None:
    """Refuse a cell that looks like a damaged list, where others are lists."""
    for cell in found:
        text = cell.text
        if cell.names is None and text and (text[0] in "[{'\"" or text[-1] in "]}"):
            raise InputError(
                f"{where(cell.row)}: the labels are {text!r}, expected a list such as "
                f"{listed.text!r} in {where(listed.row)}, or one name.",
                FIX_FILE,
            )


def _note_lists(found: Sequence[_Cell], listed: Sequence[_Cell], where: Where) -> str:
    """Say that cells are lists, with an example that has several names, if there is one."""
    example = next((cell for cell in listed if len(cell.names or ()) > 1), listed[0])
    plain = [cell for cell in found if cell.names is None and cell.text]
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
    labels: pa.ChunkedArray, vocabulary: Sequence[str] | None, where: Where, source: str
) -> tuple[tuple[str, ...], pa.ListArray]:
    """Encode label names as numbers. Names that look alike are one (`plain_text`).

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
            remedy = (
                f"It has several labels of it. If {mark!r} separates them, set `separator: "
                f"{json.dumps(mark)}` in the same block of params.yaml."
            )
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
    """Note labels that may mean that there is none, and labels that are 0 and 1.

    Args:
        vocabulary: their names.
        labels: N lists of label numbers.
        where: the position of a row.
        setting: what to set if the column holds 0 and 1.
    """
    if set(vocabulary) <= {"0", "1", "0.0", "1.0"}:
        return [
            f"The labels are {' and '.join(map(repr, vocabulary))}. If 1 says that an image has "
            "the label that the column is named after, and 0 that it does not, set "
            f"`{setting}`."
        ]
    rows = np.repeat(np.arange(len(labels)), np.asarray(pc.list_value_length(labels)))
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
