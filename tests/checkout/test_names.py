"""Names of data sets and variants follow one rule, wherever they are given.

They become folders, files, words of commands, DVC's stage names, and keys of its parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from ruamel.yaml import YAML

from pipeline.errors import InputError
from pipeline.names import LONGEST_NAME
from pipeline.settings import SECTIONS
from stages.checkout.params import load_params, read_request
from stages.commands.import_regions import check_described

GOOD = ["pets", "Pets", "p", "2024", "2024-pets", "1e3", "no", "a_b", "a--b", "a-", "x" * 64]
BAD = {
    "../../x": "x",
    "..": "data",
    ".": "data",
    "": "data",
    "/etc": "etc",
    "pets/": "pets",
    "a/../b": "a-b",
    "a\\b": "a-b",
    "pets-1.0": "pets-1-0",
    "my pets": "my-pets",
    ".hidden": "hidden",
    "-pets": "pets",
    "_pets": "pets",
    "--help": "help",
    "~": "data",
    "p*": "p",
    "a@b": "a-b",
    "a:b": "a-b",
    "a=b": "a-b",
    "a;rm -rf b": "a-rm-rf-b",
    "$HOME": "HOME",
    "${item.x}": "item-x",
    "a'b": "a-b",
    'a"b': "a-b",
    "a\nb": "a-b",
    "pets\n": "pets",
    "hündchen": "h-ndchen",
    "x" * 65: "x" * 64,
    "y" * 100_000: "y" * 64,
}


SMALL: dict[str, Any] = {
    "datasets": ["demo"],
    "variants": ["full"],
    "seeds": [0],
    "prepare": {"demo": {"source": "imported"}},
    "detector": {"demo": {"source": "imported"}},
    "extract": {"demo": {}},
    "train": {"demo": {}},
}


def write(folder: Path, **changes: Any) -> Path:
    """Write SMALL with other sections as params.yaml."""
    file = folder / "params.yaml"
    with file.open("w") as stream:
        YAML(typ="safe").dump({**SMALL, **changes}, stream)
    return file


def with_dataset(folder: Path, name: Any) -> Path:
    """Write params.yaml with a data set of this name beside the demo."""
    return write(
        folder,
        **{section: {**SMALL[section], name: SMALL[section]["demo"]} for section in SECTIONS},
    )


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = with_dataset(tmp_path, name)
    changes = [f'datasets=["{name}"]', f'variants=["full", "{name}"]']
    params = load_params([*changes, f"train.{name}.variants.{name}={{epochs: 1}}"], file)
    assert (params.datasets, params.variants) == ([name], ["full", name])
    assert name in params.train
    assert read_request(name).dataset == name


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused_everywhere(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = (repr(name) if len(name) < 99 else "yyy", "a-z", str(LONGEST_NAME), f"`{BAD[name]}`")
    with refused(InputError, "prepare", *parts):
        load_params(file=with_dataset(tmp_path, name))
    for changes in (
        {"datasets": ["demo", name]},
        {"variants": ["full", name]},
        {"train": {"demo": {"variants": {name: {"epochs": 1}}}}},
    ):
        write(tmp_path, **changes)
        with refused(InputError, next(iter(changes)), *parts):
            load_params()
    write(tmp_path)
    with refused(InputError, "--dataset", *parts):
        read_request(name)
    with refused(InputError, "--dataset", *parts):
        check_described(name, (), [Path("x.npz")], None)
    assert load_params(file=with_dataset(tmp_path, BAD[name]))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", ["a/b", "my pets", "~", "x" * 65])
def test_a_bad_name_in_an_override(tmp_path: Path, section: str, name: str) -> None:
    with refused(InputError, section, repr(name), "a-z"):
        load_params([f"{section}.{name}={{source: imported}}"], write(tmp_path))


@pytest.mark.parametrize("name", [2024, 1.5, True, None])
def test_a_name_that_yaml_takes_for_something_else_needs_quotes(tmp_path: Path, name: Any) -> None:
    with refused(InputError, "prepare", repr(name), "quotes", '`"'):
        load_params(file=with_dataset(tmp_path, name))
    with refused(InputError, "datasets", repr(name), "quotes"):
        load_params(file=write(tmp_path, datasets=[name]))


def test_two_runs_are_not_one_stage_of_dvc(tmp_path: Path) -> None:
    """DVC calls them both train@demo-x-full-0, and would train one of the two."""
    with_dataset(tmp_path, "demo-x")
    file = tmp_path / "params.yaml"
    overrides = ["datasets=[demo, demo-x]", "variants=[full, x-full]"]
    overrides += [f"train.{name}.variants.x-full={{epochs: 1}}" for name in ("demo", "demo-x")]
    with refused(InputError, "'demo'", "'demo-x'", "'full'", "'x-full'", "train@demo-x-full-SEED"):
        load_params(overrides, file)
    assert load_params([*overrides, "variants=[x-full]"], file)
