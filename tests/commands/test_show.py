"""`gmpipe runs show`: what a run was made with and reached; and `runs list --times`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from flows import Flow, Outcome
from small import write_params

from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.learning.checkpoint import load_checkpoint

RUN = "runs/voc2007/full-s0"


@pytest.fixture
def run(small: Flow) -> Flow:
    small.ok("train")
    small.ok("evaluate")
    return small


def row(said: str, name: str) -> list[str]:
    """The cells of a row beside its name, which may hold single blanks."""
    [line] = [line for line in said.splitlines() if re.match(rf"{re.escape(name)}(  |$)", line)]
    return re.split("  +", line.strip())[1:]


def test_what_a_run_was_made_with_and_reached(run: Flow) -> None:
    said = run.ok("runs", "show", RUN)
    metrics = read_sealed_json(run / RUN / "metrics.json")
    checkpoint = load_checkpoint(run / RUN / "checkpoint.pt")
    for name, cell in {
        "data set": "voc2007 (imported)",
        "variant": "full",
        "seed": "0",
        "training images": "30",
        "test images": "18 of imported/test",
        "epoch of the weights": "2 of 2",
        "test mAP": f"{metrics['mAP']:.2f}",
        "test top-3 OF1": f"{metrics['top3']['OF1']:.2f}",
        "fingerprint of regions": metrics["fingerprint"],
        "label vectors": f"vectors.npz, {checkpoint.label_vectors_sha256}",
        "checkpoint": checkpoint.sha256,
        "network.latent_size": "4",
        "views": "1",
        "imported_from": "npz",
    }.items():
        assert row(said, name) == [cell]
    for name in ("trained", "evaluated"):
        assert re.match(r"20\d\d-\d\d-\d\dT.*, in [\d.]+ s", row(said, name)[0])
    assert "validation mAP" not in said
    assert said.endswith("sound and up to date.\n")


@pytest.mark.parametrize("named", [RUN, f"{RUN}/", "full-s0", "absolute"])
def test_a_run_is_named_by_its_folder_or_its_name(run: Flow, named: str) -> None:
    path = str(run / RUN) if named == "absolute" else named
    assert run.ok("runs", "show", path).startswith(f"{RUN}\n")


@pytest.mark.parametrize("command", ["show", "predict"])
def test_a_name_means_the_run_of_one_data_set(run: Flow, command: str) -> None:
    """That of `--dataset`, or else of the first in params.yaml, for every command."""
    shutil.copytree(run / "runs/voc2007", run / "runs/other")

    def run_of(named: str, *options: str) -> Outcome:
        if command == "show":
            return run.gmpipe("runs", "show", named, *options)
        return run.gmpipe("predict", "none.jpg", "--run", named, *options)

    of_first, of_path = run_of("full-s0"), run_of(RUN)
    assert (of_first.code, of_first.out, of_first.err) == (of_path.code, of_path.out, of_path.err)
    assert run_of("full-s0", "--dataset", "voc2007").out == of_path.out
    assert run_of("full-s0", "--dataset", "coco").refused("coco|data set")
    assert run_of(RUN, "--dataset", "voc2007").refused(f"voc2007.*{RUN} is a folder")


def test_settings_that_differ_from_params_yaml_are_marked(run: Flow) -> None:
    write_params(run.folder, {"network": {"latent_size": 8, "neighbors": 1}})
    said = run.ok("runs", "show", "full-s0")
    assert row(said, "network.latent_size") == ["4", "8"]
    assert row(said, "network.neighbors") == ["1"]
    assert re.search(
        rf"{RUN}/checkpoint.pt: out of date: .*`network\.latent_size` was 4, expected 8\).*"
        "`gmpipe train ",
        said,
    )


def test_a_run_with_a_validation_part_and_its_own_settings(small: Flow) -> None:
    parts = ("validation=0.3", "training_share=0.5")
    small.ok("train", *(word for part in parts for word in ("--set", f"train.voc2007.{part}")))
    [folder] = (small / "runs/voc2007").glob("full-s0-*")
    said = small.ok("runs", "show", folder.name)
    history = load_checkpoint(folder / "checkpoint.pt").history
    assert row(said, "validation mAP") == [f"{history[-1]['validation_mAP']:.2f}"]
    assert row(said, "validation") == ["0.3", "0.0"]
    assert row(said, "metrics") == ["not evaluated"]
    assert row(said, "training images") == ["10"]
    assert row(said, "validation images") == ["9 of the training split, by `validation: 0.3`"]


def test_uncommitted_changes_are_said(run: Flow) -> None:
    path = run / RUN / "metrics.json"
    metrics = {name: value for name, value in read_sealed_json(path).items() if name != "sha256"}
    write_sealed_json(path, {**metrics, "commit": "a" * 40, "uncommitted": True})
    assert row(run.ok("runs", "show", RUN), "commit") == [f"{'a' * 12}, uncommitted changes"]
    write_sealed_json(path, {**metrics, "commit": "a" * 40, "uncommitted": False})
    assert row(run.ok("runs", "show", RUN), "commit") == ["a" * 12]
    write_sealed_json(path, {**metrics, "checkpoint_sha256": "other"})
    assert "another" in row(run.ok("runs", "show", RUN), "metrics")[0]
    path.write_text("{}")
    assert "metrics.json" in row(run.ok("runs", "show", RUN), "metrics")[0]


def test_a_run_that_is_not_there_is_named(run: Flow, tmp_path: Path) -> None:
    def refused(named: str, pattern: str) -> None:
        assert run.gmpipe("runs", "show", named).refused(pattern)

    refused("full-s7", "voc2007 .*'full-s7'.*`gmpipe runs list --dataset voc2007`")
    refused("runs/voc207/full-s0", f"runs/voc207/full-s0.*{RUN}")
    refused("params.yaml", "params.yaml")
    refused(str(tmp_path), re.escape(str(tmp_path)))
    shutil.copytree(run / "runs/voc2007", run / "runs/other")
    (run / "runs/other/full-s0").rename(run / "runs/other/full-s8")
    refused("full-s8", r"voc2007 .*'full-s8'.*Did you mean runs/other/full-s8\?")
    (run / RUN / "checkpoint.pt").write_bytes(b"damaged")
    refused(RUN, f"{RUN}/checkpoint.pt.*gmpipe train")


def test_the_list_has_times_and_their_total(run: Flow) -> None:
    times = run / ".state/times/voc2007.csv"
    lines = [line.split(",") for line in times.read_text().splitlines()[1:]]
    seconds = {line[0]: float(line[2]) for line in lines}
    said = run.ok("runs", "list", "--times")
    [header, _, cells] = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[:3]
    ]
    assert header[-2:] == ["train (s)", "evaluate (s)"]
    assert cells[-2:] == [f"{seconds[stage]:.1f}" for stage in ("train", "evaluate")]
    assert f"train: {seconds['train']:.1f} s\n" in said
    assert said.endswith(f"in total: {sum(seconds.values()):.1f} s\n")
    times.unlink()
    assert run.ok("runs", "list", "--times").endswith("in total: 0.0 s\n")
    assert "(s)" not in run.ok("runs", "list")
