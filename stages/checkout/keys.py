"""The names of settings: which exist, which is nearest to a misspelt one, and what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.settings import SECTIONS, Params


def describe(
    error: ValidationError, file: Path, origin: str, root: type[BaseModel] = Params
) -> str:
    """The first of pydantic's findings, in the words of this project."""
    # A misspelt key that is required is found twice: first as missing, then as unknown.
    findings = error.errors()
    finding = next((one for one in findings if one["type"] == "extra_forbidden"), findings[0])
    # pydantic names a tuple's place or a dict's key itself `[key]`: not part of a path.
    location = [part for part in finding["loc"] if part != "[key]"]
    source = ""
    if location[:1] == ["prepare"] and len(location) > 2:
        source = str(location.pop(2))  # pydantic's name for the kind of block
    key = ".".join(str(part) for part in location) or "the whole"
    where = f"{file}{' or --set' if origin == 'set' else ''}: `{key}`"
    if finding["type"] == "extra_forbidden":
        known = _keys(root, location[:-1], source)
        return f"{where} is no setting.{nearest(str(location[-1]), known)}"
    if finding["type"] == "missing":
        return f"{where} is missing. Add it."
    value = finding["input"]
    if finding["type"] == "union_tag_not_found":
        misspelt = difflib.get_close_matches("source", list(value), n=1)
        if misspelt:
            return f"{where[:-1]}.{misspelt[0]}` is no setting. Did you mean `source`?"
        return f"{where[:-1]}.source` is missing. Add it."
    if finding["type"] == "union_tag_invalid":
        value, expected = finding["ctx"]["tag"], finding["ctx"]["expected_tags"]
        hint = nearest(value, re.findall(r"'([^']+)'", expected))
        return f"{where[:-1]}.source` is {value!r}: expected one of {expected}. Change it.{hint}"
    hint = ""
    if isinstance(value, str) and finding["type"] == "literal_error":
        hint = nearest(value, re.findall("'([^']+)'", finding["ctx"]["expected"]))
    shown = "" if isinstance(value, Mapping) else f" is {value!r}"
    return f"{where}{shown}: {finding['msg'].removeprefix('Value error, ')}. Change it.{hint}"


def _keys(root: type[BaseModel], location: Sequence[int | str], source: str) -> Iterable[str]:
    """The settings that a block of params.yaml may hold; ``source`` tells blocks of one place."""
    model: Any = root
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ()
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # the data set's name, below a section
        model = _block(field.annotation, source)
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _block(annotation: Any, source: str) -> type[BaseModel] | None:
    """The kind of block that a setting holds; None where it holds a plain value."""
    blocks = [kind for kind in _classes(annotation) if issubclass(kind, BaseModel)]
    of_source = [
        kind
        for kind in blocks
        if "source" in kind.model_fields
        and source in get_args(kind.model_fields["source"].annotation)
    ]
    return next(iter(of_source or blocks), None)


def setting_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """The dotted key of every setting that `--set` takes, for the data sets of ``raw``."""
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


def _classes(annotation: Any) -> list[type]:
    """The classes in an annotation, however deep they stand."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _classes(part)]


def nearest(word: str, choices: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean `{found[0]}`?" if found else ""
