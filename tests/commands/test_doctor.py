"""`gmpipe doctor`: what it marks as missing, with which fix, and that it works everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import ROOT, Flow, write_params
from ruamel.yaml import YAML

from pipeline.machine import sign_of_gpu
from pipeline.shards.failures import Failure, write_failures

GLOVE = "data/glove/glove.6B.zip/glove.6B.300d.txt"


@pytest.fixture(autouse=True)
def _nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def sections(output: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Section -> item -> (mark, state and fix)."""
    table: dict[str, dict[str, tuple[str, str]]] = {}
    title = item = ""
    for line in output.splitlines()[:-1]:
        if re.match(r" +\S", line) and "to do: " not in line:
            title = line.strip()
            table[title] = {}
        elif matched := re.match(r"(ok|missing|note) +(\S.*?)  +(\S.*)", line):
            mark, item, text = matched.groups()
            table[title][item] = (mark, text)
        elif line:
            mark, text = table[title][item]
            table[title][item] = (mark, f"{text} | {line.strip()}")
    return table


def paper(flow: Flow, source: str = "voc", **lists: Any) -> None:
    """Describe, beside `tiny`, one of the paper's data sets, without its files."""
    write_params(flow.folder)
    path = flow / "params.yaml"
    raw = YAML(typ="safe").load(path.read_text())
    raw["prepare"]["paper"] = {"source": source}
    raw["detector"]["paper"] = {"source": "torchvision"}
    raw["extract"]["paper"] = {}
    raw["train"]["paper"] = {"label_vectors": GLOVE}
    with path.open("w") as stream:
        YAML().dump({**raw, **lists}, stream)


def test_after_all_stages_nothing_is_missing(made: Flow) -> None:
    before = made.bytes(".")
    output = made.ok("doctor")
    assert "dvc repro" not in output.splitlines()[-1]
    table = sections(output)
    labels = len(made.metrics()["AP"])
    assert list(table["data set tiny"]) == [
        "prepared",
        "detector",
        "label vectors",
        "cache",
        "runs",
    ]
    for item, numbers in {
        "prepared": ["24", "12", str(labels)],
        "detector": [],
        "label vectors": [],
        "cache": ["60", "4", "6"],
        "runs": ["2", "2"],
    }.items():
        mark, state = table["data set tiny"][item]
        assert mark == "ok"
        assert not numbers or re.findall(r"\d+", state) == numbers
    assert table["programs"]["torch"] == ("ok", torch.__version__)
    assert table["programs"]["DVC"][0] == "ok"
    assert table["programs"]["tensorboard"][0] in ("ok", "note")
    for folder in ("data/", "cache/", "runs/"):
        assert re.search(r"^[0-9.]+ [kMGT]?B ", table["checkout"][folder][1])
    assert made.bytes(".") == before


def test_in_a_fresh_clone_everything_is_still_to_be_made(tmp_path: Path) -> None:
    write_params(tmp_path)
    output = Flow(tmp_path).ok("doctor")
    *_, end = output.splitlines()
    assert re.search("prepared, detector, cache, runs of tiny.*`dvc repro`", end)
    table = sections(output)["data set tiny"]
    for item, command in (
        ("prepared", "prepare"),
        ("detector", "detector"),
        ("cache", "extract"),
        ("runs", "train"),
    ):
        assert table[item][0] == "note"
        assert table[item][1].endswith(f"| to do: `gmpipe {command} --dataset tiny`")


def test_what_a_listed_data_set_lacks_is_missing_each_with_its_fix(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    paper(flow, datasets=["tiny", "paper"])
    done = flow.gmpipe("doctor")
    assert done.code == 1
    assert re.match(r"3\b", done.out.splitlines()[-1])
    table = sections(done.out)["data set paper"]
    weights = tmp_path / "torch/hub/checkpoints"
    for item, pattern in (
        (
            "files",
            r"data/paper/VOCdevkit/.*trainval\.txt.* \| to do: .*VOCtrainval_06.*data/paper/",
        ),
        ("detector", rf"{weights}/.*`gmpipe detector --dataset paper`.*160 MB"),
        ("label vectors", r"data/glove/glove\.6B\.zip.* \| to do: .*glove\.6B\.zip.*https://"),
    ):
        assert table[item][0] == "missing"
        assert re.search(pattern, table[item][1])
    # Follow each fix, as far as doctor checks it.
    for name in ("ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt", "JPEGImages/1.jpg"):
        path = flow / "data/paper/VOCdevkit/VOC2007" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    weights.mkdir(parents=True)
    (weights / re.findall(r"checkpoints/(\S+\.pth)", done.out)[0]).touch()
    (flow / "data/glove").mkdir()
    (flow / "data/glove/glove.6B.zip").touch()
    assert {mark for mark, _ in sections(flow.ok("doctor"))["data set paper"].values()} == {
        "ok",
        "note",
    }


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("voc", "trainval.txt"),
        ("coco", "annotations/instances_train2014.json"),
        ("nuswide", "Concepts81.txt"),
        ("table", "labels.csv"),
    ],
)
def test_what_other_data_sets_lack_is_a_note(tmp_path: Path, source: str, file: str) -> None:
    flow = Flow(tmp_path)
    paper(flow, source)
    table = sections(flow.ok("doctor"))["data set paper, not listed in `datasets`"]
    assert list(table) == ["files"]
    assert table["files"][0] == "note"
    assert file in table["files"][1]
    page = "own-data.md" if source == "table" else "datasets.md"
    assert table["files"][1].endswith(f"(docs/{page})")


def test_own_weights_and_vectors_are_looked_for_at_their_paths(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.params(
        detector__tiny={"source": "file", "weights": "own.pt"},
        train__tiny={"label_vectors": "own.npz"},
    )
    table = sections(flow.gmpipe("doctor").out)["data set tiny"]
    assert re.search(r"own\.pt.*`detector\.tiny\.weights`", table["detector"][1])
    assert re.search(r"own\.npz.* \| to do: .*own\.npz", table["label vectors"][1])
    for name in ("own.pt", "own.npz"):
        (flow / name).touch()
    assert "gmpipe detector" in sections(flow.ok("doctor"))["data set tiny"]["detector"][1]


def test_an_imported_data_set_needs_no_detector(small: Flow, tmp_path: Path) -> None:
    table = sections(small.ok("doctor"))["data set voc2007"]
    assert list(table) == ["prepared", "label vectors", "cache", "runs"]
    (small / "data/voc2007/prepared/manifest.parquet").unlink()
    done = small.gmpipe("doctor")
    assert done.code == 1
    assert "gmpipe import-regions FILE --dataset voc2007" in done.out
    assert "gmpipe train" not in done.out


def test_damage_is_a_finding(flow: Flow) -> None:
    for path in ("data/tiny/prepared/manifest.parquet", "data/tiny/detector/weights.pt"):
        (flow / path).write_bytes(b"damaged")
    (flow / "cache/tiny/regions-00001.h5").unlink()
    done = flow.gmpipe("doctor")
    assert done.code == 1
    table = sections(done.out)["data set tiny"]
    for item, command in (("prepared", "prepare"), ("detector", "detector"), ("cache", "extract")):
        assert table[item][0] == "missing"
        assert f"gmpipe {command} --dataset tiny" in table[item][1]


def test_images_without_regions_are_counted(flow: Flow) -> None:
    failures = [Failure(f"test-0000{n}", "a.png", "it is empty") for n in range(3)]
    write_failures(flow / "cache/tiny", failures)
    mark, state = sections(flow.ok("doctor"))["data set tiny"]["cache"]
    assert mark == "ok"
    assert re.search(r"60 .* 3\b.*cache/tiny/failures\.parquet", state)


def test_a_missing_or_wrong_params_yaml(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    done = flow.gmpipe("doctor")
    assert done.code == 1
    mark, text = sections(done.out)["checkout"]["params.yaml"]
    assert mark == "missing"
    assert list(sections(done.out)["checkout"]) == ["params.yaml"]
    assert re.search(rf"{re.escape(str(tmp_path))}.*to do: .*checkout", text)
    assert sections(done.out)["programs"]["torch"][0] == "ok"
    flow.params(train__tiny__epocs=3)
    done = flow.gmpipe("doctor")
    assert done.code == 1
    assert "to do: Did you mean `epochs`?" in sections(done.out)["checkout"]["params.yaml"][1]
    assert list(sections(done.out)) == ["programs", "checkout"]
    assert list(sections(done.out)["checkout"]) == ["params.yaml", "data/", "cache/", "runs/"]


def test_a_link_to_nowhere_is_missing(tmp_path: Path) -> None:
    write_params(tmp_path)
    (tmp_path / "cache").symlink_to(tmp_path / "unmounted" / "cache")
    done = Flow(tmp_path).gmpipe("doctor")
    assert done.code == 1
    [row] = [row for name, row in sections(done.out)["checkout"].items() if "cache/" in name]
    assert row[0] == "missing"
    assert re.search("link.* to do: ", row[1])
    (tmp_path / "unmounted" / "cache").mkdir(parents=True)
    Flow(tmp_path).ok("doctor")


def test_a_disk_that_is_nearly_full_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(tmp_path)
    monkeypatch.setattr("stages.commands.doctor.free_bytes", lambda folder: 1.5e9)
    mark, text = sections(Flow(tmp_path).ok("doctor"))["checkout"]["runs/"]
    assert mark == "note"
    assert re.search(r"^1\.5 GB .*to do: ", text)


def test_gmpipe_must_be_where_dvc_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PATH, or in .venv, so that `.venv/bin/dvc repro` works without an active environment."""
    write_params(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    mark, text = sections(Flow(tmp_path).ok("doctor"))["programs"]["PATH"]
    assert mark == "note"
    assert re.search(r"\.venv/bin.*to do: .*make install", text)
    command = tmp_path / ".venv/bin/gmpipe"
    command.parent.mkdir(parents=True)
    command.touch(0o755)
    assert "PATH" not in sections(Flow(tmp_path).ok("doctor"))["programs"]


def test_gpus_are_named_and_several_need_dask_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def programs(count: int) -> dict[str, tuple[str, str]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
        return sections(Flow(tmp_path).gmpipe("doctor").out)["programs"]

    write_params(tmp_path)
    monkeypatch.setattr("stages.commands.doctor._installed", lambda package: None)
    monkeypatch.setattr("stages.commands.doctor.sign_of_gpu", lambda: None)
    assert programs(0)["CUDA"][0] == "note"
    assert "docs/scale.md" in programs(0)["CUDA"][1]
    assert programs(1)["CUDA"][0] == "ok"
    assert programs(1)["CUDA"][1].endswith(": card 0")
    assert programs(1)["dask-cuda"][0] == "note"
    assert programs(2)["CUDA"][1].endswith(": card 0, card 1")
    assert programs(2)["dask-cuda for several GPUs"][0] == "missing"


@pytest.mark.parametrize(
    ("release", "hidden", "warning", "named", "fix"),
    [
        (None, None, "", torch.__version__, "pytorch.org"),
        ("13.0", "", "", "CUDA_VISIBLE_DEVICES", "`unset CUDA_VISIBLE_DEVICES`"),
        ("13.0", "-1", "", "CUDA_VISIBLE_DEVICES='-1'", "`unset CUDA_VISIBLE_DEVICES`"),
        ("13.0", "0", "the driver is of 11040", "is of 11040", "driver"),
        ("13.0", None, "", "13.0", "`nvidia-smi`"),
    ],
    ids=["a build for the CPU", "hidden", "hidden by -1", "an old driver", "no reason is known"],
)
def test_a_gpu_that_is_not_used_is_noted_with_its_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: str | None,
    hidden: str | None,
    warning: str,
    named: str,
    fix: str,
) -> None:
    def is_available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return False

    write_params(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", release)
    monkeypatch.setattr("stages.commands.doctor.sign_of_gpu", lambda: "/dev/nvidia0")
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    mark, text = sections(Flow(tmp_path).gmpipe("doctor").out)["programs"]["CUDA"]
    state, _, todo = text.partition(" | to do: ")
    assert mark == "note"
    assert "/dev/nvidia0" in state
    assert named in state
    assert fix in todo


@pytest.mark.parametrize(
    ("lists", "expected"), [("GPU 0: A card (UUID: GPU-1)", True), ("No devices were found", False)]
)
def test_what_shows_that_a_machine_has_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: str, expected: bool
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert sign_of_gpu(tmp_path) is None
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{lists}'\n")
    program.chmod(0o755)
    sign = sign_of_gpu(tmp_path)
    assert sign is not None if expected else sign is None
    if sign is not None:
        assert lists in sign
    program.unlink()
    cards = tmp_path / "proc/driver/nvidia/gpus"
    cards.mkdir(parents=True)
    assert sign_of_gpu(tmp_path) is None
    (cards / "0000:17:00.0").mkdir()
    assert sign_of_gpu(tmp_path) == str(cards)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert sign_of_gpu(tmp_path) == str(tmp_path / "dev/nvidia0")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ModuleNotFoundError('No module named torch', name='torch')", "No module named"),
        ("raise OSError('libcudart.so.99: cannot open')", "libcudart.so.99"),
    ],
)
def test_a_missing_or_broken_torch_is_reported(tmp_path: Path, body: str, reason: str) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/torch.py").write_text(body)
    write_params(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"(look at the checkout: \S+\n)?", done.stderr)  # on a busy machine
    table = sections(done.stdout)
    assert table["programs"]["torch"][0] == "missing"
    assert re.search(rf"{reason}.*pip install --editable", table["programs"]["torch"][1])
    assert table["programs"]["torchvision"][0] == "missing"
    assert table["programs"]["DVC"][0] == "ok"
    assert table["data set tiny"]["prepared"][0] == "note"
    assert table["data set tiny"]["detector"][0] == "missing"
