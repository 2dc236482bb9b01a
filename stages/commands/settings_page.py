"""Command `settings`: the settings of params.yaml as Markdown, from the classes that check them.

`gmpipe settings > docs/settings.md` writes the page in docs/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from tabulate import tabulate

from pipeline.files import canonical_json
from pipeline.settings import (
    ArchitectureSettings,
    DetectorSettings,
    ExtractSettings,
    FitSettings,
    NetworkSettings,
    PrepareSettings,
    TrainSettings,
)

_HEAD = """\
# Settings

Every setting that params.yaml may hold. The file has four sections, `prepare`, `detector`,
`extract` and `train`, and in each a block for every data set, by its name; at its top stand three
lists. A setting that is left out has its default; one without a default must be there. For one
command, `--set SECTION.DATASET.KEY=VALUE` sets any of them, e.g.
`--set train.demo.network.modules=3`.

This page is printed by `gmpipe settings`."""

_TOP = [
    [
        "datasets",
        "list of names",
        "",
        "the data sets that `dvc repro` runs; the first is the default of `--dataset`",
    ],
    ["variants", "list of names", "", "the variants that it trains on each"],
    [
        "seeds",
        "list of whole numbers, 0 or more",
        "",
        "the seeds it trains each with; the first is the default of `--seed`",
    ],
]

SECTIONS: dict[str, dict[str, type[BaseModel]]] = {
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
    "train": {"train.DATASET": TrainSettings, "train.DATASET.network": NetworkSettings},
}
"""Section -> its blocks, by the place where each stands."""


def settings_page(section: str | None = None) -> str:
    """The whole page, or the tables of one of `SECTIONS`."""
    if section is not None:
        return "\n\n".join(_tables(section))
    parts = [_HEAD, "## At the top", _table(_TOP)]
    for name in SECTIONS:
        parts += [f"## {name}", *_tables(name)]
    return "\n\n".join(parts)


def _tables(section: str) -> Iterator[str]:
    for place, block in SECTIONS[section].items():
        yield f"### {place}"
        yield _escaped((block.__doc__ or "").strip())
        schema = block.model_json_schema()
        yield _table(
            [
                [name, _kind(about), _default(name, about, schema), _meaning(about)]
                for name, about in schema["properties"].items()
            ]
        )


def _table(rows: list[list[str]]) -> str:
    headers = ["setting", "value", "default", "meaning"]
    cells = [[f"`{name}`", *rest] for name, *rest in rows]
    return str(tabulate(cells, headers, tablefmt="github", disable_numparse=True))


def _meaning(about: Mapping[str, Any]) -> str:
    if "const" in about:
        return "tells this kind of block from others"
    return _escaped(about.get("description", "a block of its own, below"))


def _escaped(text: str) -> str:
    """Markdown would take `<split>` for a tag."""
    return text.replace("<", r"\<")


def _default(name: str, about: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "none: must be given"
    if "$ref" in about:
        return "its defaults"
    value = about.get("default", {})  # an object's is made anew each time, and empty
    return f"`{value if isinstance(value, str) else canonical_json(value)}`"


def _kind(about: Mapping[str, Any]) -> str:
    """A JSON schema's type in the words of somebody who writes YAML."""
    if "anyOf" in about:
        return " or ".join(_kind(one) for one in about["anyOf"])
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
        ("exclusiveMinimum", "over {:g}"),
        ("maximum", "at most {:g}"),
        ("exclusiveMaximum", "under {:g}"),
        ("multipleOf", "a multiple of {:g}"),
    ):
        if key in about:
            yield words.format(about[key])
