"""`gmpipe doctor`: what it marks as missing, with what fix, and that it speaks everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import ROOT, Flow, write_params
from ruamel.yaml import YAML

from pipeline.shards.failures import Failure, write_failures

GLOVE = "data/glove/glove.6B.zip/glove.6B.300d.txt"


@pytest.fixture(autouse=True)
def _nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def sections(said: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Section -> thing -> (mark, all that is said of it)."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    title = thing = ""
    for line in said.splitlines()[:-1]:
        if re.match(r" +\S", line) and "to do: " not in line:
            title = line.strip()
            found[title] = {}
        elif matched := re.match(r"(ok|missing|note) +(\S.*?)  +(\S.*)", line):
            mark, thing, text = matched.groups()
            found[title][thing] = (mark, text)
        elif line:
            mark, text = found[title][thing]
            found[title][thing] = (mark, f"{text} | {line.strip()}")
    return found


def paper(flow: Flow, source: str = "voc", **lists: Any) -> None:
    """Beside `tiny` a data set as one of the paper's, of which nothing is there."""
    write_params(flow.folder)
    path = flow / "params.yaml"
    raw = YAML(typ="safe").load(path.read_text())
    raw["prepare"]["paper"] = {"source": source}
    raw["detector"]["paper"] = {"source": "torchvision"}
    raw["extract"]["paper"] = {}
    raw["train"]["paper"] = {"label_vectors": GLOVE}
    with path.open("w") as stream:
        YAML().dump({**raw, **lists}, stream)


def test_where_all_is_made_nothing_is_missing(made: Flow) -> None:
    before = made.bytes(".")
    said = made.ok("doctor")
    assert said.endswith("\nnothing is missing that `datasets` needs\n")
    found = sections(said)
    assert found["data set tiny"] == {
        "prepared": ("ok", f"24 train, 12 test, {found_labels(made)} labels"),
        "detector": ("ok", found["data set tiny"]["detector"][1]),
        "label vectors": ("ok", found["data set tiny"]["label vectors"][1]),
        "cache": ("ok", "60 rows of 4 regions in 6 shards"),
        "runs": ("ok", "2 trained, 2 of them evaluated"),
    }
    assert found["programs"]["torch"] == ("ok", torch.__version__)
    assert found["programs"]["DVC"][0] == "ok"
    assert found["programs"]["tensorboard"][0] in ("ok", "note")
    for place in ("data/", "cache/", "runs/"):
        assert re.search(r"^[0-9.]+ [kMGT]?B free", found["places"][place][1])
    assert made.bytes(".") == before


def found_labels(flow: Flow) -> int:
    return len(flow.metrics()["AP"])


def test_on_a_fresh_clone_all_is_still_to_be_made(tmp_path: Path) -> None:
    write_params(tmp_path)
    said = Flow(tmp_path).ok("doctor")
    assert said.endswith(
        "\nnothing is missing that `datasets` needs; not made yet: prepared, detector, cache, runs "
        "of tiny (`dvc repro` makes them)\n"
    )
    found = sections(said)["data set tiny"]
    for thing, command in (
        ("prepared", "prepare"),
        ("detector", "detector"),
        ("cache", "extract"),
        ("runs", "train"),
    ):
        assert found[thing][0] == "note"
        assert found[thing][1].endswith(f"| to do: `gmpipe {command} --dataset tiny`")


def test_what_a_listed_data_set_lacks_is_missing_each_with_its_fix(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    paper(flow, datasets=["tiny", "paper"])
    done = flow.gmpipe("doctor")
    assert done.code == 1
    assert done.out.endswith("\n3 missing\n")
    found = sections(done.out)["data set paper"]
    weights = tmp_path / "torch/hub/checkpoints"
    for thing, pattern in (
        ("files", r"no data/paper/VOCdevkit/.*trainval\.txt \| to do: unpack VOCtrainval_06"),
        ("detector", rf"not at {weights}/.*`gmpipe detector --dataset paper` downloads.*160 MB"),
        ("label vectors", r"no data/glove/glove\.6B\.zip \| to do: fetch glove\.6B\.zip from http"),
    ):
        assert found[thing][0] == "missing"
        assert re.search(pattern, found[thing][1])
    # Each fix is followed, as far as doctor looks.
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
    found = sections(flow.ok("doctor"))["data set paper, not listed in `datasets`"]
    assert list(found) == ["files"]
    assert found["files"][0] == "note"
    assert file in found["files"][1]
    page = "own-data.md" if source == "table" else "datasets.md"
    assert found["files"][1].endswith(f"(docs/{page})")


def test_weights_of_one_s_own_and_vectors_by_path(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.params(
        detector__tiny={"source": "file", "weights": "own.pt"},
        train__tiny={"label_vectors": "own.npz"},
    )
    found = sections(flow.gmpipe("doctor").out)["data set tiny"]
    assert re.search(r"no weights at own\.pt.*`detector\.tiny\.weights`", found["detector"][1])
    assert re.search(r"no own\.npz.*put own\.npz there", found["label vectors"][1])
    for name in ("own.pt", "own.npz"):
        (flow / name).touch()
    assert "gmpipe detector" in sections(flow.ok("doctor"))["data set tiny"]["detector"][1]


def test_an_imported_data_set_needs_no_detector(small: Flow, tmp_path: Path) -> None:
    found = sections(small.ok("doctor"))["data set voc2007"]
    assert list(found) == ["prepared", "label vectors", "cache", "runs"]
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
    found = sections(done.out)["data set tiny"]
    for thing, fix in (("prepared", "prepare"), ("detector", "detector"), ("cache", "extract")):
        assert found[thing][0] == "missing"
        assert re.search(rf"can't be looked at: .*gmpipe {fix} --dataset tiny", found[thing][1])


def test_images_without_regions_are_counted(flow: Flow) -> None:
    failures = [Failure(f"test-0000{n}", "a.png", "it is empty") for n in range(3)]
    write_failures(flow / "cache/tiny", failures)
    said = flow.ok("doctor")
    assert sections(said)["data set tiny"]["cache"] == (
        "ok",
        "60 rows of 4 regions in 6 shards; images without regions: 3, see "
        "cache/tiny/failures.parquet",
    )


def test_params_yaml_that_is_broken_or_not_there(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    done = flow.gmpipe("doctor")
    assert done.code == 1
    mark, text = sections(done.out)["places"]["params.yaml"]
    assert mark == "missing"
    assert list(sections(done.out)["places"]) == ["params.yaml"]
    assert re.search(r"no params\.yaml in .*to do: change to the checkout", text)
    assert sections(done.out)["programs"]["torch"][0] == "ok"
    flow.params(train__tiny__epocs=3)
    done = flow.gmpipe("doctor")
    assert done.code == 1
    assert "Did you mean `epochs`?" in sections(done.out)["places"]["params.yaml"][1]
    assert list(sections(done.out)) == ["programs", "places"]
    assert list(sections(done.out)["places"]) == ["params.yaml", "data/", "cache/", "runs/"]


def test_a_link_to_nowhere_is_missing(tmp_path: Path) -> None:
    write_params(tmp_path)
    (tmp_path / "cache").symlink_to(tmp_path / "unmounted" / "cache")
    done = Flow(tmp_path).gmpipe("doctor")
    assert done.code == 1
    [row] = [said for name, said in sections(done.out)["places"].items() if "cache/" in name]
    assert row == (
        "missing",
        "the link leads nowhere | to do: make that folder, mount its disk, or remove the link",
    )
    (tmp_path / "unmounted" / "cache").mkdir(parents=True)
    Flow(tmp_path).ok("doctor")


def test_a_disk_that_is_nearly_full_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(tmp_path)
    monkeypatch.setattr("stages.commands.doctor.free_bytes", lambda folder: 1.5e9)
    found = sections(Flow(tmp_path).ok("doctor"))["places"]
    assert found["runs/"] == (
        "note",
        "1.5 GB free | to do: make space, or make it a link to another disk",
    )


def test_gpus_are_named_and_several_need_dask_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(count: int) -> dict[str, tuple[str, str]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
        return sections(Flow(tmp_path).gmpipe("doctor").out)["programs"]

    write_params(tmp_path)
    monkeypatch.setattr("stages.commands.doctor._installed", lambda package: None)
    assert found(0)["CUDA"][0] == "note"
    assert "stage one is slow" in found(0)["CUDA"][1]
    assert found(1)["CUDA"][0] == "ok"
    assert found(1)["CUDA"][1].endswith(": card 0")
    assert found(1)["dask-cuda"][0] == "note"
    assert found(2)["CUDA"][1].endswith(": card 0, card 1")
    assert found(2)["dask-cuda, for several"][0] == "missing"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ModuleNotFoundError('No module named torch', name='torch')", "is not installed"),
        ("raise OSError('libcudart.so.99: cannot open')", "is broken: .*libcudart.so.99"),
    ],
)
def test_torch_that_is_missing_or_broken_is_said(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/torch.py").write_text(body)
    write_params(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from stages.cli.main import main; main()", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    found = sections(done.stdout)
    assert found["programs"]["torch"][0] == "missing"
    assert re.search(rf"{said}.*pip install --editable", found["programs"]["torch"][1])
    assert found["programs"]["torchvision"][0] == "missing"
    assert found["programs"]["DVC"][0] == "ok"
    assert found["data set tiny"]["prepared"][0] == "note"
    assert "can't be looked at" in found["data set tiny"]["detector"][1]
