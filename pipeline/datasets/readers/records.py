"""The values in records of COCO's JSON.

Every function takes ``where``, the file and the record, and raises an InputError that names them.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pipeline.errors import InputError
from pipeline.formats.text import composed

FIX = "Correct the record, or export the file again."
NO_BOX = (math.nan,) * 4


def box_of(box: Any, where: str) -> tuple[float, float, float, float]:
    """x, y, width and height of a `bbox`; nan if there is none."""
    if box in (None, []) or box == [None] * 4:
        return NO_BOX
    try:
        x, y, width, height = map(_pixels, box if isinstance(box, list) else ())
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{where}: `bbox` is {box!r}, expected four numbers: x, y, width, height.",
            "Correct it, or remove it to keep the annotation as a label without a box.",
        ) from None
    return (x, y, width, height)


def _pixels(side: Any) -> float:
    value = math.nan if isinstance(side, bool) else float(side)
    if not abs(value) < 2**31:
        raise ValueError
    return value


def side_of(value: Any) -> int | None:
    """A width or height; None if it can't be one."""
    valid = type(value) in (int, float) and 1 <= value < 2**31 and value == int(value)
    return int(value) if valid else None


def values_of(record: Any, keys: tuple[str, ...], where: str) -> list[Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where} is {record!r}, expected an object.", FIX)
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise InputError(f"{where} has no `{lacking[0]}`.", FIX)
    return [record[key] for key in keys]


def name_of(value: Any, key: str, where: str) -> str:
    # JSON can spell half a character, which no other format can hold.
    whole = isinstance(value, str) and value == value.encode(errors="replace").decode()
    if not whole or not value.strip():
        raise InputError(
            f"{where}: `{key}` is {value!r}, expected a name, as a text in quotes.", FIX
        )
    return composed(value)


def key_of(value: Any, name: str, where: str) -> str:
    """An id as a text: the decimal form of a number, also of one that is written as a text."""
    if type(value) is int:
        return str(value)
    if type(value) is float and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,100}", value.strip()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return name_of(value, name, where).strip()
    raise InputError(f"{where}: `{name}` is {value!r}, expected a number or a text.", FIX)
