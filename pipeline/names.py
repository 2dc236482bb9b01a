"""What data sets, variants, columns and splits may be called."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

LONGEST_NAME = 64  # letters; what is added to a name stays far below the 255 bytes of a file's


def nearest_name(text: str) -> str:
    """The name of a data set or variant that is most like ``text``; see `Name`."""
    return re.sub("[^A-Za-z0-9_]+", "-", text).strip("-_")[:LONGEST_NAME] or "data"


def check_name(name: Any) -> Any:
    """Check the name of a data set or variant by the rule of `Name`.

    Raises:
        PydanticCustomError: of the type `name`, with the nearest name as a YAML text.
    """
    if not isinstance(name, str):  # `2024` and `true` are a number and a truth value in YAML
        scalar = isinstance(name, int | float | None)
        text = f'"{nearest_name(str(name).lower())}"' if scalar else "data"
        rule = "a text, in quotes if YAML would not take it for one"
    elif re.fullmatch(f"[A-Za-z0-9][A-Za-z0-9_-]{{0,{LONGEST_NAME - 1}}}", name):
        return name
    else:
        text = nearest_name(name)
        rule = (
            "a name that begins with a letter or digit, has only the letters a-z and A-Z, digits, "
            f"`-` and `_`, and has at most {LONGEST_NAME} of them"
        )
    raise PydanticCustomError("name", "expected {rule}", {"rule": rule, "nearest": text})


Name = Annotated[str, BeforeValidator(check_name)]
"""What a data set or a variant may be called: a letter or digit, then letters, digits, `-` and `_`,
at most 64 in all. Names become folders, files, words of commands, parts of DVC's stage names, and
parts of the dotted keys of its parameters. So dots, blanks and slashes are impossible."""


def check_splits(train: str, val: str | None, test: str, shared: bool, test_named: bool) -> None:
    """Check the names of splits in a data set's files.

    Args:
        shared: whether the test images are a share of those of ``train``.
        test_named: whether ``test`` is more than a default.

    Raises:
        ValueError: a split appears twice, or another one is named beside a share.
    """
    names = [name for name in (train, val, test) if name is not None]
    if shared and (val is not None or test_named):
        raise ValueError(
            "`test_share` takes the test images from those of `train`, but another split is "
            "named: remove `test` and `val`, or remove `test_share`"
        )
    if not shared and len(set(names)) < len(names):
        raise ValueError(
            f"expected different splits for `train`, `val` and `test`, but one is named twice "
            f"({', '.join(names)}): to divide the images of one split, set `train: {train}` and "
            "`test_share: 0.2`, and remove `test`"
        )


def check_columns(value: Any) -> Any:
    """Check that a setting names one column, or several in a list.

    Raises:
        ValueError: it does not.
    """
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected the name of a column, or a list of names, in quotes if needed")
    if len(set(names)) < len(names):
        raise ValueError("expected each column once")
    return value
