"""The names of settings: which exist, which is nearest to a misspelt one, and what is wrong."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import InputError
from pipeline.formats.text import first_few
from pipeline.settings import SECTIONS, Params

_CUTOFF = 0.5  # of difflib: how alike a suggestion must be at least
_CHANGE = "Change the value."
_ADD = "Add it."
_SEE_ALL = "Remove it. `gmpipe settings` lists all settings."


def settings_error(
    error: ValidationError, where: str, root: type[BaseModel] = Params
) -> InputError:
    """Turn pydantic's first finding into an error that names the setting.

    Args:
        error: of the validation of ``root``.
        where: begins the message, e.g. `params.yaml`.
        root: the class of the block that was validated; keys are relative to it.
    """
    # A misspelt key that is required gives two findings: one is missing, another is unknown.
    findings = error.errors()
    order = ("name", "extra_forbidden")
    finding = min(findings, key=lambda one: order.index(one["type"]) if one["type"] in order else 2)
    kind, value = finding["type"], finding["input"]
    # pydantic calls a tuple's index or a dict's key itself `[key]`: not part of a path.
    location = [part for part in finding["loc"] if part != "[key]"]
    source = ""
    if location[:1] == ["prepare"] and len(location) > 2:
        source = str(location.pop(2))  # pydantic's name for the kind of block
    key = ".".join(str(part) for part in location)

    if kind == "extra_forbidden":
        hint = _nearest_key(root, location, source)
        return InputError(f"{where}: unknown setting `{key}`.", hint or _SEE_ALL)
    if kind == "missing":
        return InputError(f"{where}: the setting `{key}` is missing.", _ADD)
    if kind == "union_tag_not_found":
        misspelt = difflib.get_close_matches("source", list(value), n=1)
        if misspelt:
            wrong = f"{where}: unknown setting `{key}.{misspelt[0]}`."
            return InputError(wrong, "Did you mean `source`?")
        return InputError(f"{where}: the setting `{key}.source` is missing.", _ADD)
    if kind == "union_tag_invalid":
        tag, expected = finding["ctx"]["tag"], finding["ctx"]["expected_tags"]
        hint = nearest(tag, re.findall(r"'([^']+)'", expected))
        wrong = f"{where}: `{key}.source` is {tag!r}. Expected one of {expected}."
        return InputError(wrong, hint or _CHANGE)

    if kind == "name":
        return name_error(value, f"{where}: {location[0]}", finding["ctx"])
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        hint = nearest(value, re.findall("'([^']+)'", finding["ctx"]["expected"]))
    if kind in ("list_type", "tuple_type") and isinstance(value, str | int | float):
        hint = f"Write a list: `[{value}]`."
    shown = f"`{key}`" if key else "the whole file"
    if isinstance(value, Mapping):
        return InputError(f"{where}: {shown}: {_expected(finding)}.", "Correct the block.")
    problem = f"{where}: {shown} is {shortened(value)}: {_expected(finding)}."
    return InputError(problem, hint or _CHANGE)


def name_error(name: object, where: str, context: Mapping[str, Any]) -> InputError:
    """Make the error for a name that no data set or variant can have.

    Args:
        name: as it was given.
        where: begins the message.
        context: of `check_name`'s error.
    """
    return InputError(
        f"{where}: {shortened(name)} can't be a name: expected {context['rule']}.",
        f"Use another name, for example `{context['nearest']}`.",
    )


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


def shortened(value: object) -> str:
    """`repr` of a value, cut: YAML's aliases can make a value of a few lines endless."""
    return _SHORT.repr(value)


def _expected(finding: ErrorDetails) -> str:
    """Say what pydantic expected, without its own names of things."""
    if finding["type"] in ("dict_type", "model_type"):
        return "expected a block of settings"
    if finding["type"] == "too_short":
        return f"expected at least {finding['ctx']['min_length']} entry"
    message = finding["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be (greater|less)", r"expected a value \1", message)
    return re.sub("^(Input|String) should ", "expected to ", message).replace("to be ", "", 1)


def _nearest_key(root: type[BaseModel], location: Sequence[int | str], source: str) -> str:
    """Suggest the setting that an unknown one may stand for; an empty string if none is like it.

    A setting of the block or of a block in it is suggested as it is written there, and one of the
    same name in the data set's block as it is written in params.yaml.

    Args:
        root, source: as in `_class_at`.
        location: keys and indices down to the unknown setting.
    """
    *block, word = map(str, location)
    here = _class_at(root, block, source)
    own = list(here.model_fields) if here else []
    inner = [key for key in _dotted(here) if "." in key] if block or root is not Params else []
    named: dict[str, list[str]] = {name: [name] for name in own}
    for key in inner:
        name = key.rpartition(".")[2]
        if name not in own:
            named.setdefault(name, []).append(key)
    top = block[: 2 if root is Params else 0]
    if word not in named and block != top:
        above = [key for key in _dotted(_class_at(root, top, source)) if key.split(".")[-1] == word]
        if above:
            return f"Did you mean `{'.'.join([*top, above[0]])}`?"
    matches = difflib.get_close_matches(word, named, n=1, cutoff=_CUTOFF)
    return f"Did you mean `{'` or `'.join(named[matches[0]])}`?" if matches else ""


def _class_at(
    root: type[BaseModel], location: Sequence[int | str], source: str
) -> type[BaseModel] | None:
    """Return the class of a block of params.yaml; None if there is none.

    Args:
        root: the class that ``location`` begins in.
        location: keys and indices down to the block.
        source: which of the kinds of block that may stand there.
    """
    model: Any = root
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return None
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # the data set's name, below a section
        model = _block(field.annotation, source)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _block(annotation: Any, source: str) -> type[BaseModel] | None:
    """Return the class of the block that a setting holds; None if it holds a plain value."""
    blocks = [kind for kind in _classes(annotation) if issubclass(kind, BaseModel)]
    of_source = [
        kind
        for kind in blocks
        if "source" in kind.model_fields
        and source in get_args(kind.model_fields["source"].annotation)
    ]
    return next(iter(of_source or blocks), None)


def setting_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dotted key of every setting that `--set` takes, for the data sets of ``raw``."""
    for name, field in Params.model_fields.items():
        if name not in SECTIONS:
            yield name
            continue
        for dataset, given in raw[name].items():
            block = _block(field.annotation, given.get("source", ""))
            yield from (f"{name}.{dataset}.{key}" for key in _dotted(block))


def _dotted(block: type[BaseModel] | None) -> Iterator[str]:
    for name, field in block.model_fields.items() if block else ():
        inner = _block(field.annotation, "")
        yield from (f"{name}.{key}" for key in _dotted(inner)) if inner else (name,)


def flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of a block by their dotted keys, without those of variants."""
    settings: dict[str, Any] = {}
    for name, value in block.items():
        if isinstance(value, Mapping) and name != "variants":
            settings |= flat(value, f"{prefix}{name}.")
        elif name != "variants":
            settings[f"{prefix}{name}"] = value
    return settings


def differing(
    used: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Return the settings in which two blocks differ: dotted key -> both values.

    A setting that only one of the blocks has differs, and is None in the other one. The keys are in
    the order of ``described``.
    """
    one, other = flat(used), flat(described)
    return {
        key: (one.get(key), other.get(key))
        for key in {**other, **one}
        if (key in one) != (key in other) or one[key] != other[key]
    }


def shown_differences(differences: Mapping[str, tuple[object, object]]) -> str:
    """Say which settings differ, e.g. "`epochs` was 2, expected 3"; of many, the first ones."""
    words = [
        f"`{key}` was {shortened(used)}, expected {shortened(wanted)}"
        for key, (used, wanted) in differences.items()
    ]
    return first_few(words, "; ")


def _classes(annotation: Any) -> list[type]:
    """Return the classes in an annotation, at any depth."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _classes(part)]


def nearest(word: str, choices: Iterable[str]) -> str:
    """Suggest the choice that is most like ``word``; an empty string if none is."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=_CUTOFF)
    return f"Did you mean `{matches[0]}`?" if matches else ""
