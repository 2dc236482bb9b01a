"""Labels in columns of their own: each is named after a label, and holds 0 or 1.

Letters: N rows, C labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.readers.rows import Where
from pipeline.errors import InputError

_FLAGS = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no"), 0),
}
_CODING = (
    "Write 1 where the image has the label, and 0 where it has not. (`true` and `false`, and `yes` "
    "and `no`, are read too.)"
)


def read_flags(columns: Mapping[str, pa.ChunkedArray], where: Where) -> pa.ChunkedArray:
    """Read columns of 0 and 1.

    Args:
        columns: label -> its column, N texts.

    Returns:
        N lists of the names of labels.

    Raises:
        InputError: a cell is neither; names its row, column and value.
    """
    matrix = np.stack([flags_of(column) for column in columns.values()], axis=1)
    names = list(columns)
    if (matrix < 0).any():
        row, number = (int(index) for index in np.argwhere(matrix < 0)[0])
        value = columns[names[number]][row].as_py()
        found = "empty" if value in (None, "") else repr(value)
        raise InputError(
            f"{where(row)}: the column {names[number]!r} is {found}, expected 0 or 1.", _CODING
        )
    numbers = np.nonzero(matrix)[1]
    offsets = np.concatenate([[0], np.cumsum(matrix.sum(axis=1))]).astype(np.int32)
    entries = pc.take(pa.array(names, pa.string()), pa.array(numbers))
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), entries)])


def yaml_list(names: Sequence[str]) -> str:
    """A list of texts as YAML, with quotes where a text needs them."""
    plain = re.compile(r"(?!(?:null|true|false|yes|no|on|off)$)[^\W\d][\w -]*", re.IGNORECASE)
    written = (n if plain.fullmatch(n) else json.dumps(n, ensure_ascii=False) for n in names)
    return f"[{', '.join(written)}]"


def flags_of(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int8: 1 or 0 for each cell, -1 where it is neither."""
    encoded = pc.fill_null(column, "").combine_chunks().dictionary_encode()
    known = [_FLAGS.get(text.strip().lower(), -1) for text in encoded.dictionary.to_pylist()]
    flags: np.ndarray = np.array(known, dtype=np.int8)[np.asarray(encoded.indices)]
    return flags


def guess_columns(
    columns: Mapping[str, pa.ChunkedArray], where: Where, key: str
) -> tuple[str, ...]:
    """Decide whether a table without a column of labels has one column per label.

    Args:
        columns: all columns but those with the path and the split.
        key: the setting that names the columns, for the message.

    Returns:
        the columns, if all of them hold only 0 and 1, and there are two or more; none if no column
        does.

    Raises:
        InputError: some do and others don't; names the first cell that does not.
    """
    flags = {name: flags_of(column) for name, column in columns.items()}
    good = tuple(name for name, found in flags.items() if (found >= 0).all())
    alike = [name for name, column in columns.items() if name in good or _is_alike(column)]
    if len(columns) > 1 and len(good) == len(columns):
        return good
    if not good and (len(alike) < len(columns) or len(columns) == 1):
        return ()
    shown = yaml_list(good or alike)
    missing = f"there is no column `{key.rpartition('.')[2]}`"
    if len(columns) == 1:
        name = good[0]
        raise InputError(
            f"{where(0)}: {missing}, and the only other column {name!r} holds 0 and 1.",
            f"If it says whether an image has the label {name!r}, set `{key}: {shown}`. If 0 and 1 "
            f"are names of labels, set `{key}: {shown[1:-1]}`.",
        )
    bad = next(name for name in flags if name not in (alike if len(alike) < len(columns) else good))
    row = int((flags[bad] < 0).argmax())
    problem = f"{where(row)}: the column {bad!r} is {columns[bad][row].as_py()!r}, but {missing}"
    if len(alike) == len(columns):
        raise InputError(
            f"{problem}, so all other columns are read as one column per label. Expected 0 or 1.",
            f"{_CODING} If only some of the columns are labels, set `{key}` to a list of them.",
        )
    raise InputError(
        f"{problem}, and others hold 0 and 1, as one column per label does.",
        f"If these are the labels, set `{key}: {shown}`. If {bad!r} is a label too, write 0 or 1 "
        f"in each row. If one column holds the names of labels, set `{key}` to its name.",
    )


def _is_alike(column: pa.ChunkedArray) -> bool:
    """Whether a column may stand for a label in another coding: numbers from -1 to 1, or blanks."""
    texts = {text.strip() for text in pc.unique(pc.fill_null(column, "")).to_pylist()}
    try:
        numbers = np.array([float(text) for text in texts - {""} if text.lower() not in _FLAGS])
    except ValueError:
        return False
    return texts != {""} and not (np.abs(numbers) > 1).any()  # nan is not over 1
