"""`pipeline.settings`: what its classes say agrees with params.yaml, help texts and docs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from click.testing import CliRunner
from flows import ROOT, Flow
from pydantic import BaseModel
from ruamel.yaml import YAML
from shipped import SHIPPED

from pipeline import settings as settings_module
from pipeline.settings import (
    SECTIONS,
    FeatureSettings,
    HeadSettings,
    Loss,
    Params,
    settings_class,
    variant_names,
)
from pipeline.settings.heads import HEADS
from stages.checkout.keys import _classes, setting_keys
from stages.checkout.params import load_params, read_params, variant_settings
from stages.cli.main import cli
from stages.commands import settings_page as page_module
from stages.commands.settings_page import settings_page


def blocks() -> list[type[BaseModel]]:
    """Return every class of block that params.yaml may hold, and what most heads share."""
    classes = inspect.getmembers(settings_module, inspect.isclass)
    found = [kind for name, kind in classes if name.endswith("Settings") and name[0] != "_"]
    found += [*get_args(Loss), *map(settings_class, HEADS)]
    return [kind for kind in dict.fromkeys(found) if kind not in (HeadSettings, FeatureSettings)]


def commands(group: click.Group = cli) -> Iterator[click.Command]:
    """Yield the group, its commands and theirs."""
    yield group
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from commands(command)
        else:
            yield command


# --- the classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Params, *blocks()])
def test_every_setting_is_described(block: type[BaseModel]) -> None:
    assert block.__doc__
    for name, field in block.model_fields.items():
        is_block = any(issubclass(kind, BaseModel) for kind in _classes(field.annotation))
        # A block is described by its class, and so is its kind.
        described = (
            is_block
            or name == "head"
            or (len(get_args(field.annotation)) == 1 and name in ("source", "name"))
        )
        assert described or len(field.description or "") > 5, name


@pytest.mark.parametrize("block", blocks())
def test_defaults_are_within_their_own_bounds(block: type[BaseModel]) -> None:
    tags = {
        name: get_args(field.annotation)[0] if name != "head" else "any"
        for name, field in block.model_fields.items()
        if name in ("source", "name", "head") and field.is_required()
    }
    defaults = block.model_validate(tags)
    written = json.loads(defaults.model_dump_json())
    assert block.model_validate(written) == defaults
    with pytest.raises(ValueError, match="frozen"):
        setattr(defaults, next(iter(block.model_fields)), 1)


def choices(annotation: Any) -> Iterator[str]:
    """Yield the texts that an annotation allows, at any depth."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from choices(part)


@pytest.mark.parametrize("block", [Params, *blocks()])
def test_a_description_names_only_what_exists(block: type[BaseModel]) -> None:
    """A word in backticks is a setting, one of its values, or a column or array of a file."""
    fields = [field for kind in (Params, *blocks()) for field in kind.model_fields.items()]
    known = {name for name, _ in fields}
    known |= {choice for _, field in fields for choice in choices(field.annotation)}
    known |= {"wordllama", "train", "val", "test", "filepath", "label", "vectors"}
    for name, field in block.model_fields.items():
        words = re.findall(r"`([a-z][a-z_-]*)`", field.description or "")
        assert [word for word in words if word not in known] == [], name


# --- params.yaml ---------------------------------------------------------------------------------


def test_the_shipped_file_is_sound() -> None:
    params = load_params(file=SHIPPED)
    assert params.datasets == ["demo"]
    assert set(params.variants) <= set(variant_names())
    for settings in params.train.values():
        for variant in variant_names():
            assert variant_settings(settings, variant).variants == {}


def test_the_default_variant_is_one_that_dvc_repro_trains() -> None:
    params = load_params(file=SHIPPED)
    for command in commands():
        for option in command.params:
            if option.name == "variant":
                assert option.default in params.variants


def test_the_stages_are_those_of_dvc_yaml() -> None:
    stages = list(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"])
    listed = CliRunner().invoke(cli, ["--help"]).output.split("Stages, in order:\n")[1]
    assert re.findall(r"^  (\S+) ", listed.split("\n\n")[0], re.MULTILINE) == stages


# --- help texts ----------------------------------------------------------------------------------


def test_the_top_help_lists_every_command_and_variant() -> None:
    output = CliRunner().invoke(cli, ["--help"]).output
    for name in cli.commands:
        assert f"\n  {name} " in output
    *_, variants = output.split("\nVariants:\n")
    assert re.sub(r"-\n\s+", "-", variants).replace(",", " ").split() == variant_names()


def texts() -> Iterator[str]:
    """Yield each text of the command line's help, and the comments of params.yaml."""
    for command in commands():
        yield inspect.cleandoc(command.help or "")
        for option in command.params:
            yield getattr(option, "help", None) or ""
    yield "\n".join(re.findall("#.*", SHIPPED.read_text()))


def test_settings_that_texts_name_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    keys = set(setting_keys(read_params()))
    text = "\n".join(texts())
    assignments = re.findall(r"\b((?:train|extract|prepare|detector)\.\w+\.\S+=[\w.]+)", text)
    assert len(assignments) > 1
    load_params(assignments)
    swept = re.findall(r"\b([\w.]+)=\d+(?:,\d+)+", text)
    assert len(swept) > 1
    assert [key for key in swept if f"train.demo.{key}" not in keys] == []
    named = re.findall(r"`(\w+)`(?: in params\.yaml|\])", text)
    assert len(named) > 2
    assert [key for key in named if key not in {one.split(".")[-1] for one in keys}] == []


# --- the page of settings ------------------------------------------------------------------------


def test_the_page_in_docs_is_what_the_command_prints(tmp_path: Path) -> None:
    printed = Flow(tmp_path).ok("settings")
    assert printed == (ROOT / "docs/settings.md").read_text(), "gmpipe settings > docs/settings.md"
    for section in SECTIONS:
        assert Flow(tmp_path).ok("settings", section).strip() in printed
    assert Flow(tmp_path).gmpipe("settings", "trian").code == 2


def rows_below(heading: str) -> dict[str, list[str]]:
    """Return the settings of a table in the page, each with value, default and meaning."""
    part = settings_page().split(f"{heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` +\| (.*) \|$", part, re.MULTILINE)
    return {name: [cell.strip() for cell in row.split(" | ")] for name, row in rows}


def test_every_setting_has_a_row_with_a_value_a_default_and_a_meaning() -> None:
    lists = [name for name in Params.model_fields if name not in SECTIONS]
    tables = [("## At the top", Params, lists)]
    for section in SECTIONS:
        tables += [
            (
                f"### {key}",
                block,
                [
                    name
                    for name in block.model_fields
                    if block.model_fields[name].annotation is not str or name != "head"
                ],
            )
            for key, block in page_module.blocks(section).items()
        ]
    assert {block for _, block, _ in tables} == {Params, *blocks()}
    for heading, block, names in tables:
        rows = rows_below(heading)
        assert list(rows) == names
        for name, (value, default, meaning) in rows.items():
            assert value
            assert meaning
            assert (default == "required") == block.model_fields[name].is_required()
    page = settings_page()
    assert re.findall(r"\b(Field|Optional|Literal|int|str|bool|None|pydantic)\b", page) == []
