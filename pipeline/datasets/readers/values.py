"""The labels in a list or object, in the notation of JSON, Python, numpy or R.

An object is read only if its meaning is plain. Labelling tools write one for a photograph, or a
list with one for each box:

- labels in a list, under `choices` or a key that ends with `labels`: `{"labels": ["cat", "sofa"]}`.
  If there is none that has labels in it,
- a label or a list of labels under one of `_LABEL_KEYS`: `{"class": "cat", "score": 0.5}`. If there
  are several, they must agree. Texts go before numbers, as in `{"class": 3, "class_name": "cat"}`.
  If there is none,
- an object or list under `value`; or else a `name` or `title`, which may also name a box;
- `{"cat": true, "sofa": false}`, or the same with 1 and 0: a truth value for each name.

Empty texts, null and empty lists are skipped. All that is not one of these is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TypeGuard

_LABEL_KEYS = (
    "label",
    "class",
    "class_name",
    "category",
    "category_name",
    "tag",
    "choice",
    "tags",
    "classes",
    "class_names",
    "categories",
    "names",
)
_NAME_KEYS = ("name", "title")

_QUOTED = r"""(?:'[^'\\]*'|"[^"\\]*")"""
_PLAIN_LIST = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*\]")
_PRINTED_ARRAY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})*\s*\]")
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_PRINTED_NUMBERS = re.compile(rf"\[\s*{_NUMBER}(?:\s+{_NUMBER})+\s*\]")
_WRAPPED = re.compile(
    r"(?:frozenset|set|array|Index|list|tuple|c|character)\((.*?)(?:,\s*dtype=[\w.<>'\"]+)?\)",
    re.DOTALL,
)
_SCALAR = re.compile(rf"\bnp\.\w+\(({_QUOTED}|{_NUMBER})\)")
"""As numpy 2 prints what is in a list: `np.str_('cat')`."""

BRACKETED = re.compile(rf"\[.*\]|\{{.*\}}|\(.*\)|{_WRAPPED.pattern}", re.DOTALL)
"""Texts that may be a list or JSON."""


class UnclearError(ValueError):
    """A value is not a list of names; says what it is."""


def parsed(text: str) -> object:
    """The value of a list or object in the notation of JSON, Python, numpy or R.

    Raises:
        ValueError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError: it is none.
    """
    if _PLAIN_LIST.fullmatch(text) or _PRINTED_ARRAY.fullmatch(text):
        return [quoted[1:-1] for quoted in re.findall(_QUOTED, text)]
    if _PRINTED_NUMBERS.fullmatch(text):
        return [float(number) for number in text[1:-1].split()]
    if text == "character(0)":  # R's empty list
        return []
    text = _SCALAR.sub(r"\1", text)
    try:
        return json.loads(text)
    except ValueError:
        pass
    if wrapped := _WRAPPED.fullmatch(text):
        return parsed(wrapped[1]) if wrapped[1].strip() else []
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


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def names_in(value: object) -> list[str]:
    """The labels in a value that was read from a cell, by the module's docstring.

    Raises:
        UnclearError: it has something else, or its meaning is not plain.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _names_of_object(value) if _has_names(value) else _true_names(value)
    if isinstance(value, list | tuple | set):
        items = sorted(value, key=str) if isinstance(value, set) else list(value)
        if nested := [item for item in items if isinstance(item, list | tuple | set)]:
            raise UnclearError(f"the list has the list {nested[0]!r} in it")
        if any(map(is_number, items)) and not all(map(is_number, items)):
            raise UnclearError("the list has both numbers and names in it")
        return [
            name
            for item in items
            for name in (_names_of_object(item) if isinstance(item, dict) else names_in(item))
        ]
    if is_number(value) and float(value).is_integer():
        return [str(int(value))]
    raise UnclearError(f"{value!r} is not a name")


def names_under_one_key(texts: Iterable[str]) -> dict[str, list[str]]:
    """The labels in objects that all have one and the same key, of any name, as VIA writes them.

    Under it is a truth value for each name (`{"animals": {"cat": true}}`), or a name.

    Returns:
        text -> its labels; nothing if a text is something else.
    """
    found: dict[str, list[str]] = {}
    keys: set[str] = set()
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        if not isinstance(value, dict) or len(value) > 1:
            return {}
        keys.update(value)
        [inner] = value.values() or [""]
        if isinstance(inner, str):
            found[text] = [inner] if inner.strip() else []
        elif isinstance(inner, dict) and all(isinstance(flag, bool) for flag in inner.values()):
            found[text] = [name for name, flag in inner.items() if flag]
        else:
            return {}
    return found if len(keys) == 1 else {}


def _has_names(value: Mapping[object, object]) -> bool:
    """Whether an object has keys that say what is in it, and is no list of truth values.

    Raises:
        UnclearError: it can be either.
    """
    keys = (*_label_keys(value), *_NAME_KEYS, "value", "id")
    if not any(key in value for key in keys):
        return False
    flags = value.values()
    if len(value) > 1 and all(isinstance(flag, bool) for flag in flags):
        return False
    if len(value) > 1 and all(_is_flag(flag) for flag in flags):
        raise UnclearError("its 0 and 1 may be truth values, or the numbers of labels")
    return True


def _true_names(value: Mapping[object, object]) -> list[str]:
    """The names that are true, in an object with a truth value for each name."""
    flags = value.values()
    if all(isinstance(flag, bool) for flag in flags) or (
        len(value) > 1 and all(_is_flag(flag) for flag in flags)
    ):
        return [str(name) for name, flag in value.items() if flag]
    raise _no_key(value)


def _is_flag(value: object) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _names_of_object(value: Mapping[object, object]) -> list[str]:
    label_keys = _label_keys(value)
    nested = [key for key in value if isinstance(value[key], list | tuple | set | dict)]
    groups: tuple[Iterable[object], ...] = (
        [key for key in nested if _is_list_key(key)],
        [key for key in label_keys if key in nested or isinstance(value[key], str)],
        label_keys,
        [key for key in nested if key == "value"],
        [key for key in value if key in _NAME_KEYS],
        [key for key in value if key == "value"],
    )
    for group in groups:
        filled = {str(key): value[key] for key in group if not _is_empty(value[key])}
        if filled:
            return _agreeing(filled)
    if not any(groups):
        raise _no_key(value)
    return []


def _label_keys(value: Iterable[object]) -> list[object]:
    return [key for key in value if key in _LABEL_KEYS or _is_list_key(key)]


def _is_list_key(key: object) -> bool:
    return isinstance(key, str) and (key == "choices" or key.endswith("labels"))


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def _agreeing(values: Mapping[str, object]) -> list[str]:
    """The names in values of which each may be the labels of one object."""
    (first, names), *others = ((key, names_in(value)) for key, value in values.items())
    for key, differing in others:
        if set(differing) != set(names):
            raise UnclearError(
                f"the object has {', '.join(names)} under {first!r} and {', '.join(differing)} "
                f"under {key!r}"
            )
    return names


def _no_key(value: Mapping[object, object]) -> UnclearError:
    expected = ", ".join(("choices", "labels", *_LABEL_KEYS, *_NAME_KEYS))
    return UnclearError(
        f"the object has the keys {[str(key) for key in value]}, and none of {expected}"
    )
