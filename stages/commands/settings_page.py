"""Command `settings`: describe the settings of params.yaml, from the classes that check them.

`gmpipe settings > docs/settings.md` writes the page in docs/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from tabulate import tabulate

from pipeline.files import canonical_json
from pipeline.settings import (
    SECTIONS,
    ArchitectureSettings,
    DetectorSettings,
    ExtractSettings,
    FitSettings,
    GmMlicSettings,
    Params,
    PrepareSettings,
    TrainSettings,
)

_HEAD = """\
# Settings

Every setting that params.yaml may hold. At the top of the file are three lists. Below them are four
sections, `prepare`, `detector`, `extract` and `train`, and each holds one block per data set, under
the data set's name. A setting that is left out takes its default; a setting without a default is
required. For a single command, `--set SECTION.DATASET.KEY=VALUE` overrides any of them, e.g.
`--set train.demo.network.modules=3`.

This page is printed by `gmpipe settings`."""

BLOCKS: dict[str, dict[str, type[BaseModel]]] = {
    "prepare": {
        f"prepare.DATASET with source: {get_args(kind.model_fields['source'].annotation)[0]}": kind
        for kind in get_args(PrepareSettings)
    },
    "detector": {
        "detector.DATASET": DetectorSettings,
        "detector.DATASET.architecture": ArchitectureSettings,
        "detector.DATASET.fit": FitSettings,
    },
    "extract": {"extract.DATASET": ExtractSettings},
    "train": {"train.DATASET": TrainSettings, "train.DATASET.network": GmMlicSettings},
}
"""Section -> dotted key of each block in it -> the class that checks the block."""


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
    for key, block in BLOCKS[section].items():
        yield f"### {key}"
        yield _escaped((block.__doc__ or "").strip())
        yield _table(block, block.model_fields)


def _table(block: type[BaseModel], names: Iterable[str]) -> str:
    """One row for each of some settings of a block."""
    schema = block.model_json_schema()
    headers = ["setting", "value", "default", "meaning"]
    rows = [
        [f"`{name}`", _kind(about), _default(name, about, schema), _meaning(about)]
        for name, about in schema["properties"].items()
        if name in names
    ]
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
    if "$ref" in about:
        return "its defaults"
    value = about.get("default", {})  # a factory's default is not in the schema; it is empty
    return f"`{value if isinstance(value, str) else canonical_json(value)}`"


def _kind(about: Mapping[str, Any]) -> str:
    """Describe the type of a JSON schema in the words of somebody who writes YAML."""
    if "anyOf" in about:
        return ", or ".join(_kind(one) for one in about["anyOf"])
    if "const" in about or "enum" in about:
        return ", ".join(f"`{value}`" for value in about.get("enum", [about.get("const")]))
    if "$ref" in about:
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
