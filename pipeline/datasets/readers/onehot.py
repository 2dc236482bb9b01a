"""Labels in columns of their own: each is named after a label, and holds 0 or 1.

Marks of the settings may also stand there, where it is not known whether an image has the label.

Letters: N rows, C labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.readers.rows import Rows, Where
from pipeline.errors import InputError

_FLAGS = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no"), 0),
}
_UNKNOWN = 2
_SHOWN = 8  # columns that a message names
_CODING = (
    "Write 1 where the image has the label, and 0 where it has not. (`true` and `false`, and `yes` "
    "and `no`, are read too.)"
)


Marks = frozenset[str]
"""Texts of cells that mean unknown, as `marks_of` returns them."""


def marks_of(texts: Sequence[str], setting: str) -> Marks:
    """The marks of the settings in the form in which cells are compared.

    Raises:
        InputError: one of them is read as 0 or 1; names the ``setting``.
    """
    if known := [text for text in texts if _plain(text) in _FLAGS]:
        raise InputError(
            f"`{setting}` in params.yaml has {known[0]!r}, which is read as "
            f"{_FLAGS[_plain(known[0])]}. Expected marks that are neither 0 nor 1.",
            "Remove it there.",
        )
    return frozenset(map(_plain, texts))


def _plain(text: str) -> str:
    """A cell as it is compared. A table program writes -1 as -1.0 beside an empty cell."""
    plain = text.strip().lower()
    return plain.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", plain) else plain


def read_flags(
    columns: Mapping[str, pa.ChunkedArray], where: Where, marks: Marks
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Read columns of 0 and 1.

    Args:
        columns: label -> its column, N texts.
        marks: that mean unknown.

    Returns:
        N lists of the names of labels; and N lists of those that are unknown.

    Raises:
        InputError: a cell is neither; names its row, column and value.
    """
    matrix = np.stack([flags_of(column, marks) for column in columns.values()], axis=1)
    names = list(columns)
    if (matrix < 0).any():
        row, number = (int(index) for index in np.argwhere(matrix < 0)[0])
        value = columns[names[number]][row].as_py()
        found = "empty" if value in (None, "") else repr(value)
        raise InputError(
            f"{where(row)}: the column {names[number]!r} is {found}, expected 0 or 1.",
            f"{_CODING} If such a cell means that it is unknown, set "
            f"{_as_setting(value or '', marks)} in the same block of params.yaml.",
        )
    return _names_where(matrix == 1, names), _names_where(matrix == _UNKNOWN, names)


def _names_where(matrix: np.ndarray, names: Sequence[str]) -> pa.ChunkedArray:
    """N lists of the names (C) of the columns of (N, C) bool that are true."""
    offsets = np.concatenate([[0], np.cumsum(matrix.sum(axis=1))]).astype(np.int32)
    entries = pc.take(pa.array(names, pa.string()), pa.array(np.nonzero(matrix)[1]))
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), entries)])


def _as_setting(mark: str, marks: Marks) -> str:
    """The setting with one more mark."""
    return f"`unknown: {json.dumps([*sorted(marks), mark], ensure_ascii=False)}`"


def yaml_list(names: Sequence[str]) -> str:
    """A list of texts as YAML, with quotes where a text needs them."""
    plain = re.compile(r"(?!(?:null|true|false|yes|no|on|off)$)[^\W\d][\w -]*", re.IGNORECASE)
    written = (n if plain.fullmatch(n) else json.dumps(n, ensure_ascii=False) for n in names)
    return f"[{', '.join(written)}]"


def flags_of(column: pa.ChunkedArray, marks: Marks) -> np.ndarray:
    """(N,) int8: 1 or 0 for each cell, `_UNKNOWN` for one of the marks, -1 for anything else."""
    encoded = pc.fill_null(column, "").combine_chunks().dictionary_encode()
    texts = map(_plain, encoded.dictionary.to_pylist())
    known = [_UNKNOWN if text in marks else _FLAGS.get(text, -1) for text in texts]
    flags: np.ndarray = np.array(known, dtype=np.int8)[np.asarray(encoded.indices)]
    return flags


def columns_of_flags(columns: Mapping[str, pa.ChunkedArray], marks: Marks) -> tuple[str, ...]:
    """The columns that hold only 0 and 1, and perhaps marks."""
    flags = {name: flags_of(column, marks) for name, column in columns.items()}
    return tuple(
        name for name, own in flags.items() if (own >= 0).all() and (own != _UNKNOWN).any()
    )


def guess_columns(
    rows: Rows,
    columns: Mapping[str, pa.ChunkedArray],
    unlike: Sequence[str],
    label: str,
    key: str,
    marks: Marks,
) -> tuple[str, ...]:
    """Decide whether a table without a column of labels has one column per label.

    Args:
        rows: of the table, for their positions.
        columns: all columns but those with the path and the split, and but ``unlike``.
        unlike: columns that can't hold 0 and 1.
        label: the column of labels that is missing.
        key: the setting that names it.
        marks: that mean unknown.

    Returns:
        the columns, if all of them hold only 0 and 1, and there are two or more; none if no column
        does.

    Raises:
        InputError: some do and others don't, or only one does; or all are in another coding.
    """
    good = columns_of_flags(columns, marks)
    others = [name for name in columns if name not in good]
    alike = [name for name in others if _is_alike(columns[name])]
    if len(good) > 1 and not others and not unlike:
        return good
    if good:
        _refuse_mixed(rows, columns, (good, [*others, *unlike], alike), label, key, marks)
    if len(alike) == len(columns) > 1 and not unlike:
        row, found = _first_other(columns[alike[0]], marks)
        raise InputError(
            f"{rows.where(row)}: the column {alike[0]!r} is {found!r}. Since the column {label!r} "
            "is missing, expected 0 or 1, in one column per label.",
            f"{_CODING} If only some of the columns are labels, set `{key}` to a list of them. If "
            f"one column holds the names of labels, set `{key}` to its name.",
        )
    return ()


def _refuse_mixed(
    rows: Rows,
    columns: Mapping[str, pa.ChunkedArray],
    kinds: tuple[Sequence[str], Sequence[str], Sequence[str]],
    label: str,
    key: str,
    marks: Marks,
) -> NoReturn:
    """Say which columns hold only 0 and 1, as the setting that reads these.

    Args:
        kinds: the columns that do, those that don't, and those of the latter that are closest.
    """
    good, others, alike = kinds
    setting = f"set `{key}: {yaml_list(good)}`"
    if len(good) == 1:
        problem = f"{_shown(good)} holds only 0 and 1"
        remedy = f"If {good[0]!r} says whether an image has this label, {setting}."
    else:
        problem = f"{_shown(good)} hold only 0 and 1"
        remedy = f"If these are the labels, {setting}. Leave out what is not a label."
    if others:
        problem += f", and {_shown(others)} {'do' if len(others) > 1 else 'does'} not"
    bad = next((name for name in (*alike, *others) if name in columns), None)
    if bad and (flags_of(columns[bad], marks) == _UNKNOWN).all():
        problem += f" ({bad!r} holds only marks of `unknown`)"
    elif bad:
        row, found = _first_other(columns[bad], marks)
        problem += f" ({rows.where(row)}: {bad!r} is {found!r})"
        remedy += (
            f" If {bad!r} is a label too, write 0 or 1 in each row, or set "
            f"{_as_setting(found, marks)} in the same block if such a cell means that it is "
            "unknown."
        )
    if others:
        remedy += f" If one column holds the names of labels, set `{key}` to its name."
    else:
        remedy += f" If 0 and 1 are names of labels, set `{key}: {yaml_list(good)[1:-1]}`."
    raise InputError(f"{rows.file}: the column {label!r} is missing. {problem}.", remedy)


def _first_other(column: pa.ChunkedArray, marks: Marks) -> tuple[int, str]:
    """The first cell that is neither 0 nor 1 nor a mark, with its row."""
    row = int((flags_of(column, marks) < 0).argmax())
    return row, column[row].as_py() or ""


def _shown(names: Sequence[str]) -> str:
    """Names for a message, of which no more than some are shown."""
    listed = ", ".join(map(repr, names[:_SHOWN]))
    return f"{listed} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else listed


def _is_alike(column: pa.ChunkedArray) -> bool:
    """Whether a column may stand for a label in another coding: numbers from -1 to 1, or blanks."""
    texts = {text.strip() for text in pc.unique(pc.fill_null(column, "")).to_pylist()}
    try:
        numbers = np.array([float(text) for text in texts - {""} if text.lower() not in _FLAGS])
    except ValueError:
        return False
    return texts != {""} and not (np.abs(numbers) > 1).any()  # nan is not over 1
