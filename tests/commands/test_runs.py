"""`gmpipe runs list` and `gmpipe runs prune`: what is listed, what is removed, and what stays.

Most tests prune the same folders, of which params.yaml names full-s0 and max-pool-s0.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from flows import Flow, being_written, write_params
from small import write_params as write_small_params

from pipeline.files import sha256_file
from pipeline.formats.sealed import write_sealed_json

FILES = (
    "checkpoint.pt",
    "history.csv",
    "metrics.json",
    "predictions.parquet",
    "settings.yaml",
    "summary.json",
)
GONE = ("full-s1", "full-s0-0123abcd", "My_variant-s0", "without-label-graph-s12")


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    write_params(tmp_path)
    flow = Flow(tmp_path)
    for name in ("full-s0", "max-pool-s0", *GONE):
        make_run(flow, name)
    sweep = flow / "runs/tiny/sweeps/regions"
    sweep.mkdir(parents=True)
    for name in ("results.csv", "figure.svg", "figure.png", "sweep.json"):
        (sweep / name).write_bytes(b"x" * 1000)
    (sweep.parent / ".regions.lock").touch()
    return flow


def make_run(flow: Flow, name: str) -> Path:
    """Make the folder of a run: mAP 41.26, two epochs, a checkpoint of 1.1 MB."""
    folder = flow / "runs/tiny" / name
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).touch()
    (folder / "checkpoint.pt").write_bytes(b"x" * 1_100_000)
    checkpoint = {"checkpoint_sha256": sha256_file(folder / "checkpoint.pt")}
    write_sealed_json(folder / "metrics.json", {"mAP": 41.26, **checkpoint})
    made_with = {
        "dataset": "tiny",
        "variant": name.partition("-s")[0],
        "seed": 0,
        "settings": {"epochs": 2},
        "views": 2,
        **checkpoint,
    }
    # JSON is YAML.
    write_sealed_json(folder / "settings.yaml", made_with)
    (folder.parent / f".{name}.lock").touch()
    return folder


def names(flow: Flow) -> set[str]:
    return {path.name for path in (flow / "runs/tiny").iterdir()}


def test_runs_that_params_yaml_does_not_name_are_removed(flow: Flow) -> None:
    before = flow.bytes("runs/tiny/full-s0") | flow.bytes("runs/tiny/max-pool-s0")
    said = flow.ok("runs", "prune")
    assert names(flow) == {"full-s0", "max-pool-s0", ".full-s0.lock", ".max-pool-s0.lock"}
    assert flow.bytes("runs/tiny/full-s0") | flow.bytes("runs/tiny/max-pool-s0") == before
    for name in (*GONE, "sweeps/regions"):
        assert f"runs/tiny/{name}: " in said
    assert "runs/tiny/full-s1: 1.1 MB\n" in said
    assert said.endswith("4.4 MB removed from runs/tiny\n")
    assert flow.ok("runs", "prune") == "0.0 MB removed from runs/tiny\n"


def test_variants_may_have_any_name(flow: Flow) -> None:
    own = ("My_variant-s1", "a_b-s0", "Full2-s3-0123abcd", "my-small-s0", "a-s1-s0", "a--s2")
    for name in own:
        make_run(flow, name)
    (flow / "runs/tiny/.A_b-s3.lock").touch()
    assert set(own) <= column(flow, 2).keys()
    flow.ok("runs", "prune")
    assert names(flow) == {"full-s0", "max-pool-s0", ".full-s0.lock", ".max-pool-s0.lock"}


def test_a_dry_run_prints_the_same_and_changes_nothing(flow: Flow) -> None:
    before, before_names = flow.bytes("runs"), names(flow)
    dry = flow.ok("runs", "prune", "--dry-run")
    assert flow.bytes("runs") == before
    assert names(flow) == before_names
    assert dry == flow.ok("runs", "prune").replace(" removed", " would be removed")


def test_params_yaml_decides_which_runs_are_named(flow: Flow) -> None:
    write_params(flow.folder, variants=["full"], seeds=[1, 0])
    flow.ok("runs", "prune")
    assert {name for name in names(flow) if name[0] != "."} == {"full-s0", "full-s1"}


def test_another_data_set_is_left_alone(flow: Flow) -> None:
    (flow / "runs/other/full-s7").mkdir(parents=True)
    flow.ok("runs", "prune")
    assert (flow / "runs/other/full-s7").is_dir()
    assert flow.gmpipe("runs", "prune", "--dataset", "other").refused("'other'")


def test_folders_that_are_no_runs_by_name_and_files_stay(flow: Flow) -> None:
    top = flow / "runs/tiny"
    (top / "full-s1" / "notes.txt").write_text("mine")
    (top / "My_variant-s0" / "more").mkdir()
    (top / "without-label-graph-s12" / "tensorboard").mkdir()
    (top / "without-label-graph-s12" / "tensorboard" / "notes.txt").touch()
    (top / "max-pool-s0" / "notes.tmp").touch()
    (top / "notes").mkdir()
    (top / "old").mkdir()
    (top / "full-s3").write_text("a file")
    (top / "full-s4").symlink_to(flow / "elsewhere")
    (flow / "elsewhere").mkdir()
    (top / "full-s5").symlink_to(top / "full-s0")
    (top / ".mine.lock").touch()
    (top / "mine.v2-s1").mkdir()
    (top / "sweeps" / "mine").mkdir()
    (top / "sweeps" / "mine" / "figure.pdf").touch()
    stay = {"full-s1", "My_variant-s0", "without-label-graph-s12", "max-pool-s0"}
    kept = [path for path in top.rglob("*") if set(path.parts) & stay]
    kept += [top / "notes", top / "old", top / "full-s3", top / "full-s4", top / "full-s5"]
    kept += [top / ".mine.lock", top / "mine.v2-s1", top / "sweeps/mine/figure.pdf"]
    flow.ok("runs", "prune")
    assert [path for path in kept if not path.exists()] == []
    assert "full-s0-0123abcd" not in names(flow)


def test_a_run_in_progress_stays(flow: Flow) -> None:
    """With a folder, and without one, as a training begins."""
    with being_written(flow / "runs/tiny/full-s1"), being_written(flow / "runs/tiny/full-s9"):
        for options in (("--dry-run",), ()):
            said = flow.ok("runs", "prune", *options)
            assert "runs/tiny/full-s1: is being written, stays\n" in said
            assert "runs/tiny/full-s9: is being written, stays\n" in said
        assert names(flow) >= {"full-s1", ".full-s1.lock", ".full-s9.lock"}
        assert "full-s0-0123abcd" not in names(flow)
    flow.ok("runs", "prune")
    assert not names(flow) & {"full-s1", ".full-s1.lock", ".full-s9.lock"}


def test_files_that_killed_runs_left_are_removed(flow: Flow) -> None:
    top = flow / "runs/tiny"
    left = [
        top / "full-s0" / "checkpoint.pt.0123abcd.tmp",  # of a run that stays
        top / "full-s1" / "metrics.json.0123abcd.tmp",  # of one that goes
        top / ".gone-s3.lock",
        top / "sweeps" / ".gone.lock",
        top / "sweeps" / "regions" / "figure.svg.0123abcd.tmp",
    ]
    for path in left:
        path.touch()
    left[0].write_bytes(b"x" * 2_000_000)
    (top / "empty-s0").mkdir()
    (top / "diverged-s0").mkdir()
    (top / "diverged-s0" / "checkpoint-last-good.pt").touch()
    (top / "full-s1" / "tensorboard").mkdir()
    (top / "full-s1" / "tensorboard" / "events.out.tfevents.17.here").write_bytes(b"x" * 400_000)
    said = flow.ok("runs", "prune")
    left += [top / name for name in ("empty-s0", "diverged-s0", "full-s1")]
    assert [path for path in left if path.exists()] == []
    assert "runs/tiny/full-s1: 1.5 MB\n" in said
    assert "runs/tiny/full-s0/checkpoint.pt.0123abcd.tmp: 2.0 MB\n" in said
    assert sorted(path.name for path in (top / "full-s0").iterdir()) == sorted(FILES)


def test_a_run_in_the_cache_of_dvc_loses_only_its_links(flow: Flow) -> None:
    stored = flow / "stored"
    stored.write_bytes(b"x" * 5_000_000)
    path = flow / "runs/tiny/full-s1/checkpoint.pt"
    path.unlink()
    path.symlink_to(stored)
    assert "runs/tiny/full-s1: 0.0 MB\n" in flow.ok("runs", "prune")
    assert stored.stat().st_size == 5_000_000


def test_a_folder_that_cannot_be_listed_or_removed_is_named(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("stages.commands.runs.shutil.rmtree", refuse)
        assert flow.gmpipe("runs", "prune").refused(
            r"runs/tiny/My_variant-s0: Permission denied.*right"
        )
    assert flow.gmpipe("runs", "list").code == 0
    (flow / "runs/tiny").rename(flow / "runs/old")
    (flow / "runs/tiny").touch()
    for command in ("list", "prune"):
        assert flow.gmpipe("runs", command).refused("runs/tiny: ")


def test_the_list_has_one_row_per_run(flow: Flow) -> None:
    (flow / "runs/tiny/full-s1/metrics.json").unlink()
    (flow / "runs/tiny/full-s1/checkpoint.pt").unlink()
    (flow / "runs/tiny/max-pool-s0/settings.yaml").unlink()
    (flow / "runs/tiny/My_variant-s0/metrics.json").write_text("{}")
    settings = flow / "runs/tiny/My_variant-s0/settings.yaml"
    settings.write_text(settings.read_text().replace('"epochs": 2', '"epochs": 3'))
    header, _, *lines = flow.ok("runs", "list").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, *lines)]
    assert cells == [
        ["run", "mAP", "epochs", "named by params.yaml", "made with"],
        ["runs/tiny/My_variant-s0", "damaged", "damaged", "no", ""],
        ["runs/tiny/full-s0", "41.3", "2", "yes", ""],
        ["runs/tiny/full-s0-0123abcd", "41.3", "2", "no", ""],
        ["runs/tiny/full-s1", "-", "-", "no", ""],
        ["runs/tiny/max-pool-s0", "41.3", "-", "yes", "-"],
        ["runs/tiny/without-label-graph-s12", "41.3", "2", "no", ""],
    ]


def test_the_list_shows_no_numbers_and_settings_of_another_checkpoint(flow: Flow) -> None:
    top = flow / "runs/tiny"
    (top / "full-s0" / "checkpoint.pt").write_bytes(b"y" * 1_100_000)  # a kill came right after it
    (top / "full-s1" / "checkpoint.pt").unlink()  # DVC removes outputs before it trains again
    listed = [line.split("|")[1:4] for line in flow.ok("runs", "list").splitlines()]
    cells = {name.strip(): (value.strip(), epochs.strip()) for name, value, epochs in listed}
    assert cells["runs/tiny/full-s0"] == ("out of date", "out of date")
    assert cells["runs/tiny/full-s1"] == ("out of date", "-")
    assert cells["runs/tiny/max-pool-s0"] == ("41.3", "2")


def test_the_list_has_the_settings_of_runs_with_a_hash(small: Flow) -> None:
    small.ok("train")
    sets = ("epochs=1", "network.modules=1", "beta=0.4", "momentum=0.5", "clip_norm=2")
    several = [word for one in sets for word in ("--set", f"train.voc2007.{one}")]
    small.ok("train", *several[:4])
    small.ok("train", *several)
    small.ok("train", "--set", "train.voc2007.variants.mine={}", "--variant", "mine")
    said = column(small, 5)
    assert sorted(said.values()) == [
        "",
        "a variant that params.yaml lacks",
        "network.modules=1, epochs=1",
        "network.modules=1, epochs=1, momentum=0.5, clip_norm=2.0, and 1 more",
    ]


def column(flow: Flow, number: int) -> dict[str, str]:
    """The cells of one column of the list, by run."""
    lines = [line.split("|") for line in flow.ok("runs", "list").splitlines()[2:]]
    return {Path(cells[1].strip()).name: cells[number].strip() for cells in lines}


def test_the_list_says_which_named_runs_have_other_settings_than_params_yaml(small: Flow) -> None:
    small.ok("train")
    small.ok("train", "--variant", "max-pool")
    assert column(small, 4) == {"full-s0": "yes", "max-pool-s0": "yes"}
    own = {"variants": {"max-pool": {"epochs": 3}}}
    write_small_params(small.folder, own)
    assert column(small, 4) == {
        "full-s0": "yes",
        "max-pool-s0": "yes, but other settings: epochs=2",
    }
    with mock.patch.dict(sys.modules, torch=None):  # it is not needed
        assert column(small, 4)["full-s0"] == "yes"
    write_small_params(small.folder, own, variants=["full"])
    assert column(small, 4) == {"full-s0": "yes", "max-pool-s0": "no"}


def test_a_data_set_without_runs_has_a_message(tmp_path: Path) -> None:
    write_params(tmp_path)
    said = Flow(tmp_path).ok("runs", "list")
    assert re.search("runs/tiny.*`gmpipe train --dataset tiny`", said)
    assert Flow(tmp_path).ok("runs", "prune") == "0.0 MB removed from runs/tiny\n"
    assert not (tmp_path / "runs").exists()
