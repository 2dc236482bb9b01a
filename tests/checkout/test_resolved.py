"""Resolved settings: the files that training depends on in DVC, and the one in a run's folder."""

from __future__ import annotations

import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from flows import ROOT, Flow
from ruamel.yaml import YAML
from small import PARAMS, write_params

from pipeline.errors import DamagedError, MissingError
from pipeline.settings import TrainSettings, variant_changes
from stages.checkout.resolved import read_run_settings

FOLDER = "data/voc2007/settings"


@pytest.fixture
def prepared(small: Flow) -> Flow:
    small.ok("prepare")
    return small


def rewritten(flow: Flow, **changes: Any) -> set[str]:
    """The variants whose file is written when params.yaml has changed."""
    write_params(flow.folder, **changes)
    return written(flow)


def written(flow: Flow) -> set[str]:
    """The variants whose file the next `prepare` writes."""
    before = {path.stem: path.stat().st_ino for path in (flow / FOLDER).iterdir()}
    flow.ok("prepare")
    after = {path.stem: path.stat().st_ino for path in (flow / FOLDER).iterdir()}
    return {name for name, inode in after.items() if before.get(name) != inode}


def content(flow: Flow, variant: str) -> Any:
    return YAML(typ="safe").load(flow / FOLDER / f"{variant}.yaml")


def test_every_listed_variant_has_its_resolved_settings(prepared: Flow) -> None:
    train = PARAMS["train"]["voc2007"]
    full = TrainSettings.model_validate(train)
    of_head = {**train, **variant_changes("max-pool")}
    for variant, settings in (("full", full), ("max-pool", TrainSettings.model_validate(of_head))):
        written = content(prepared, variant)
        assert re.fullmatch("[0-9a-f]{64}", written.pop("head_sha256"))
        assert written == {
            "settings": settings.model_dump(mode="json", exclude={"variants"}),
            "views": 1,
        }
    assert sorted(path.name for path in (prepared / FOLDER).iterdir()) == [
        "full.yaml",
        "max-pool.yaml",
    ]


def test_only_changed_settings_are_written(prepared: Flow) -> None:
    assert written(prepared) == set()
    with (prepared / "params.yaml").open("a") as stream:
        stream.write("# a comment\n")
    assert written(prepared) == set()
    own = {"variants": {"max-pool": {"epochs": 3}}}
    assert rewritten(prepared, train=own) == {"max-pool"}
    assert rewritten(prepared, train={**own, "epochs": 4}) == {"full"}
    clipped = {**own, "epochs": 4, "clip_norm": 4.0}
    assert rewritten(prepared, train=clipped) == {"full", "max-pool"}
    views = {"voc2007": {**PARAMS["extract"]["voc2007"], "views": 2}}
    assert rewritten(prepared, extract=views) == {"full", "max-pool"}
    assert content(prepared, "full")["views"] == 2


def test_a_variant_is_written_again_when_the_code_of_its_head_changes(
    prepared: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several heads are made of, DVC compares file by file."""
    heads = copytree(ROOT / "pipeline/heads", tmp_path / "code/pipeline/heads")
    monkeypatch.setattr("stages.checkout.resolved._CHECKOUT", tmp_path / "code")

    def digests() -> dict[str, str]:
        return {name: content(prepared, name)["head_sha256"] for name in ("full", "max-pool")}

    assert written(prepared) == set()
    before = digests()
    assert before["full"] != before["max-pool"]
    for file, variants in (
        ("pooling/max_pool.py", {"max-pool"}),
        ("matching/network.py", {"full"}),
        ("matching/grids.py", {"full"}),
        ("layers.py", set()),
    ):
        with (heads / file).open("a") as stream:
            stream.write("# edited\n")
        assert written(prepared) == variants, file
        after = digests()
        assert {name for name in after if after[name] != before[name]} == variants, file
        before = after
    (heads / "matching/other.py").write_text("")
    assert written(prepared) == {"full"}
    assert written(prepared) == set()


def test_variants_come_and_go(prepared: Flow) -> None:
    train = {"variants": {"mine_V2": {"epochs": 3}}}
    assert rewritten(prepared, train=train, variants=["full", "mine_V2"]) == {"mine_V2"}
    assert content(prepared, "mine_V2")["settings"]["epochs"] == 3
    assert not (prepared / FOLDER / "max-pool.yaml").exists()
    assert rewritten(prepared, variants=["full"]) == set()
    assert [path.name for path in (prepared / FOLDER).iterdir()] == ["full.yaml"]


def test_options_do_not_change_what_dvc_sees(prepared: Flow) -> None:
    before = prepared.bytes(FOLDER)
    prepared.ok("prepare", "--set", "train.voc2007.epochs=7", "--set", "variants=[full]")
    prepared.ok("prepare", "--check", "--set", "train.voc2007.epochs=7")
    assert prepared.bytes(FOLDER) == before


def test_dvc_depends_on_the_settings_of_a_variant_alone() -> None:
    train = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["train"]
    assert "params" not in train
    assert "data/${item.dataset}/settings/${item.variant}.yaml" in train["deps"]


ODD = ["", "[1]", "{", "dataset: toy\n", b"\xff", 'views: !!int ""\n', "[" * 10_000, "a: !!bool x"]


@pytest.mark.parametrize("text", ODD)
def test_damaged_settings_of_a_run_are_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedError) as caught:
        read_run_settings(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_settings_of_a_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        read_run_settings(tmp_path)
    assert str(tmp_path / "settings.yaml") in str(caught.value)
