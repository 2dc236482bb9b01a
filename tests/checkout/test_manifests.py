"""Files that a manifest was made from and that changed since are noted, wherever it is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
from flows import Flow, write_params
from trees import draw_image, make_voc

PREPARE = "`gmpipe prepare --dataset tiny`"
ROWS = [f"{number}.jpg,{('cat', 'dog')[number % 2]}" for number in range(10)]


def write_table(flow: Flow, rows: list[str]) -> None:
    (flow / "data/tiny/labels.csv").write_text("\n".join(["image,labels", *rows, ""]))


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    flow = Flow(tmp_path)
    write_params(tmp_path, prepare={"tiny": {"source": "table", "test_share": 0.4}})
    for number in range(10):
        draw_image(tmp_path / f"data/tiny/{number}.jpg", number)
    write_table(flow, ROWS)
    flow.ok("prepare")
    return flow


@pytest.mark.parametrize("command", ["labels", "detector", "extract", "train", "verify"])
def test_a_changed_table_is_noted(flow: Flow, command: str) -> None:
    assert "labels.csv" not in flow.gmpipe(command).err
    write_table(flow, [*ROWS[:-1], "9.jpg,cow"])
    noted = flow.gmpipe(command).err
    assert noted.count("Note: data/tiny/labels.csv") == 1
    assert PREPARE in noted
    flow.ok("prepare")
    assert "labels.csv" not in flow.gmpipe(command).err


def test_what_is_gone_or_too_large_is_not_noted(flow: Flow) -> None:
    write_table(flow, [*ROWS[:-1], "9.jpg,cow"])
    with mock.patch("stages.checkout.manifests._LARGEST", 10):
        assert "labels.csv" not in flow.gmpipe("labels").err
    assert "labels.csv" in flow.gmpipe("labels").err
    (flow / "data/tiny/labels.csv").unlink()
    assert "labels.csv" not in flow.gmpipe("labels").err


def test_folders_are_left_to_prepare(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    write_params(tmp_path, prepare={"tiny": {"source": "voc"}})
    made = tmp_path / "made"
    make_voc(made)
    shutil.move(made, tmp_path / "data/tiny")
    flow.ok("prepare")
    [first, *_] = sorted((tmp_path / "data/tiny").rglob("Annotations/*.xml"))
    first.write_text(first.read_text() + "\n")
    with mock.patch("stages.checkout.manifests.sha256_file") as hashed:
        flow.gmpipe("labels")
    assert not any("Annotations" in str(call.args[0]) for call in hashed.call_args_list)
