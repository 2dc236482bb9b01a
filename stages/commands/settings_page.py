"""Command `settings`: describe the settings of params.yaml, from the classes that check them.

`gmpipe settings > docs/settings.md` writes the page in docs/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from typing import Any, get_args

from pydantic import BaseModel
from tabulate import tabulate

from pipeline.files import canonical_json
from pipeline.settings import (
    SECTIONS,
    ArchitectureSettings,
    DecisionSettings,
    DetectorSettings,
    DifficultSettings,
    ExtractSettings,
    FitSettings,
    Loss,
    Params,
    PrepareSettings,
    RegionSettings,
    TrainSettings,
    settings_class,
)
from pipeline.settings.heads import DEFAULT_HEAD, HEADS

_HEAD = """\
# Settings

Every setting that params.yaml may hold. At the top of the file are three lists. Below them are four
sections, `prepare`, `detector`, `extract` and `train`, and each holds one block per data set, under
the data set's name. A setting that is left out takes its default; a setting without a default is
required. For a single command, `--set SECTION.DATASET.KEY=VALUE` overrides any of them, e.g.
`--set train.demo.network.modules=3`.

This page is printed by `gmpipe settings`."""

_NETWORK = "train.DATASET.network"

_OF_HEADS = f"""\
The head, which turns regions into scores for labels. `head` says which one it is, by default
`{DEFAULT_HEAD}`, and the block has only the settings of that head. Nearly all heads have these:"""


def blocks(section: str) -> dict[str, type[BaseModel]]:
    """Dotted key of each block in a section -> the class that checks the block."""
    if section == "prepare":
        kinds = {
            f"prepare.DATASET with source: {_chosen_by(kind, 'source')}": kind
            for kind in get_args(PrepareSettings)
        }
        return {**kinds, "prepare.DATASET.difficult": DifficultSettings}
    if section == "detector":
        return {
            "detector.DATASET": DetectorSettings,
            "detector.DATASET.architecture": ArchitectureSettings,
            "detector.DATASET.fit": FitSettings,
        }
    if section == "extract":
        return {"extract.DATASET": ExtractSettings}
    losses = {f"train.DATASET.loss with name: {_chosen_by(kind, 'name')}": kind for kind in _LOSSES}
    heads = {f"{_NETWORK} with head: {head}": settings_class(head) for head in HEADS}
    decisions = {"train.DATASET.decisions": DecisionSettings}
    return {
        "train.DATASET": TrainSettings,
        **losses,
        **decisions,
        _NETWORK: RegionSettings,
        **heads,
    }


_LOSSES: tuple[type[BaseModel], ...] = get_args(Loss)


def _chosen_by(kind: type[BaseModel], tag: str) -> str:
    """The value of the setting that chooses this kind of block."""
    value: str = get_args(kind.model_fields[tag].annotation)[0]
    return value


def settings_page(section: str | None = None) -> str:
    """Return the whole page as Markdown, or the tables of one of `pipeline.settings.SECTIONS`."""
    if section is not None:
        return "\n\n".join(_tables(section))
    lists = [name for name in Params.model_fields if name not in SECTIONS]
    parts = [_HEAD, "## At the top", _table(Params, lists)]
    for name in SECTIONS:
        parts += [f"## {name}", *_tables(name)]
    return "\n\n".join(parts)


def _tables(section: str) -> Iterator[str]:
    for key, block in blocks(section).items():
        names = list(block.model_fields)
        about, shared = cleandoc(block.__doc__ or ""), {}
        if key == _NETWORK:
            names.remove("head")  # each head's table has it
            about = _OF_HEADS
        elif key.startswith(_NETWORK):
            shared = _descriptions(RegionSettings)
        yield f"### {key}"
        yield _escaped(about)
        yield _table(block, names, shared)


def _descriptions(block: type[BaseModel]) -> dict[str, str | None]:
    return {name: field.description for name, field in block.model_fields.items()}


def _table(
    block: type[BaseModel], names: Iterable[str], shared: Mapping[str, str | None] | None = None
) -> str:
    """One row for each of some settings of a block.

    Args:
        shared: name of a setting -> its description, in a table above.
    """
    schema = block.model_json_schema()
    headers = ["setting", "value", "default", "meaning"]
    rows = []
    for name in names:
        about = schema["properties"][name]
        is_above = "description" in about and (shared or {}).get(name) == about["description"]
        meaning = f"As in `{_NETWORK}`." if is_above else _meaning(about)
        rows.append([f"`{name}`", _kind(about), _default(name, about, schema), meaning])
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def _meaning(about: Mapping[str, Any]) -> str:
    if "const" in about:
        return "Selects this kind of block."
    return _escaped(about.get("description", "A block, described below."))


def _escaped(text: str) -> str:
    """Escape what Markdown would take for a tag, such as `<split>`."""
    return text.replace("<", r"\<")


def _default(name: str, about: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "required"
    if "$ref" in about or "oneOf" in about:
        return "its defaults"
    value = about.get("default", {})  # a factory's default is not in the schema; it is empty
    return f"`{value if isinstance(value, str) else canonical_json(value)}`"


def _kind(about: Mapping[str, Any]) -> str:
    """Describe the type of a JSON schema in the words of somebody who writes YAML."""
    if "anyOf" in about:
        return ", or ".join(_kind(one) for one in about["anyOf"])
    if "const" in about or "enum" in about:
        return ", ".join(f"`{value}`" for value in about.get("enum", [about.get("const")]))
    if "$ref" in about or "oneOf" in about:
        return "block"
    if "prefixItems" in about:
        return f"list of {len(about['prefixItems'])}: {_kind(about['prefixItems'][0])}"
    if about["type"] == "array":
        return f"list: {_kind(about['items'])}"
    names = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` or `false`",
        "string": "text",
        "null": "`null`",
        "object": "block",
    }
    return ", ".join([names[about["type"]], *_bounds(about)])


def _bounds(about: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (
        ("minimum", "{:g} or more"),
        ("exclusiveMinimum", "above {:g}"),
        ("maximum", "{:g} or less"),
        ("exclusiveMaximum", "below {:g}"),
        ("multipleOf", "a multiple of {:g}"),
    ):
        if key in about:
            yield words.format(about[key])
