"""`gmpipe runs list` and `gmpipe runs prune`: what is listed, what is removed, and what stays.

Most tests prune the same folders, of which params.yaml names full-s0 and max-pool-s0. `UNLISTED`
have variants that exist and the settings of params.yaml.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from flows import Flow, being_written, write_params
from small import no_run_is_made
from small import write_params as write_small_params

from pipeline.files import sha256_file
from pipeline.formats.sealed import write_sealed_json
from pipeline.learning.training import train_network

FILES = (
    "checkpoint.pt",
    "history.csv",
    "metrics.json",
    "predictions.parquet",
    "settings.yaml",
    "summary.json",
)
UNLISTED = ("full-s1", "without-label-graph-s12")
GONE = ("full-s0-0123abcd", "My_variant-s0")


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    write_params(tmp_path)
    flow = Flow(tmp_path)
    for name in ("full-s0", "max-pool-s0", *UNLISTED, *GONE):
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
    commit = {"commit": "0123456789abcdef", "uncommitted": name == "full-s0"}
    write_sealed_json(folder / "metrics.json", {"mAP": 41.26, **commit, **checkpoint})
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


def kept(flow: Flow) -> set[str]:
    return {name for name in names(flow) if name[0] != "."}


def test_runs_that_params_yaml_does_not_describe_are_removed(flow: Flow) -> None:
    """Those of other seeds stay: `compare` makes them."""
    stay = {"full-s0", "max-pool-s0", *UNLISTED}
    before = [flow.bytes(f"runs/tiny/{name}") for name in stay]
    said = flow.ok("runs", "prune", "--yes")
    assert names(flow) == stay | {f".{name}.lock" for name in stay}
    assert [flow.bytes(f"runs/tiny/{name}") for name in stay] == before
    for name in (*GONE, "sweeps/regions"):
        assert f"runs/tiny/{name}: " in said
    assert "runs/tiny/My_variant-s0: 1.1 MB\n" in said
    assert "2.21 MB removed from runs/tiny\n" in said
    assert re.search(r"\b2 runs .*--unlisted", said)
    assert flow.ok("runs", "prune", "--yes").startswith("0 bytes removed from runs/tiny\n")


def test_runs_that_params_yaml_does_not_list_are_removed_if_asked_for(flow: Flow) -> None:
    said = flow.ok("runs", "prune", "--unlisted", "--yes")
    assert names(flow) == {"full-s0", "max-pool-s0", ".full-s0.lock", ".max-pool-s0.lock"}
    assert said.endswith("4.41 MB removed from runs/tiny\n")
    assert "runs/tiny/full-s1: 1.1 MB\n" in said


def test_the_runs_of_compare_stay(small: Flow) -> None:
    small.ok("compare", "--seed", "0", "--seed", "4", "--variant", "max-pool", "--jobs", "1")
    small.ok("train", "--set", "train.voc2007.epochs=1")
    before = small.bytes("runs")
    small.ok("runs", "prune", "--yes")
    assert {path.name for path in (small / "runs/voc2007").glob("[!.]*")} == {
        "max-pool-s0",
        "max-pool-s4",
    }
    with no_run_is_made():
        small.ok("compare", "--seed", "0", "--seed", "4", "--variant", "max-pool")
    assert small.bytes("runs").items() <= before.items()


def test_variants_may_have_any_name(flow: Flow) -> None:
    own = ("My_variant-s1", "a_b-s0", "Full2-s3-0123abcd", "my-small-s0", "a-s1-s0", "a--s2")
    for name in own:
        make_run(flow, name)
    (flow / "runs/tiny/.A_b-s3.lock").touch()
    assert set(own) <= column(flow, 2).keys()
    flow.ok("runs", "prune", "--yes")
    assert kept(flow) == {"full-s0", "max-pool-s0", *UNLISTED}
    assert ".A_b-s3.lock" not in names(flow)


@pytest.mark.parametrize("options", [(), ("--unlisted",)])
def test_nothing_is_removed_without_yes(flow: Flow, options: tuple[str, ...]) -> None:
    before, before_names = flow.bytes("runs"), names(flow)
    listed = flow.ok("runs", "prune", *options)
    assert flow.bytes("runs") == before
    assert names(flow) == before_names
    command = " ".join(("gmpipe runs prune --dataset tiny", *options, "--yes"))
    assert f"`{command}`" in listed
    removed = flow.ok("runs", "prune", *options, "--yes")
    assert removed.replace(" removed", " would be removed").splitlines() == [
        line for line in listed.splitlines() if command not in line
    ]


def test_params_yaml_decides_which_runs_are_named(flow: Flow) -> None:
    write_params(flow.folder, variants=["full"], seeds=[1, 0])
    flow.ok("runs", "prune", "--unlisted", "--yes")
    assert kept(flow) == {"full-s0", "full-s1"}


def test_another_data_set_is_left_alone(flow: Flow) -> None:
    (flow / "runs/other/full-s7").mkdir(parents=True)
    flow.ok("runs", "prune", "--yes")
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
    flow.ok("runs", "prune", "--yes")
    assert [path for path in kept if not path.exists()] == []
    assert "full-s0-0123abcd" not in names(flow)


def test_a_run_in_progress_stays(flow: Flow) -> None:
    """With a folder, and without one, as a training begins."""
    with being_written(flow / "runs/tiny/full-s1"), being_written(flow / "runs/tiny/full-s9"):
        for options in ((), ("--yes",)):
            said = flow.ok("runs", "prune", "--unlisted", *options)
            assert "runs/tiny/full-s1: is being written, stays\n" in said
            assert "runs/tiny/full-s9: is being written, stays\n" in said
        assert names(flow) >= {"full-s1", ".full-s1.lock", ".full-s9.lock"}
        assert "full-s0-0123abcd" not in names(flow)
    flow.ok("runs", "prune", "--unlisted", "--yes")
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
    said = flow.ok("runs", "prune", "--unlisted", "--yes")
    left += [top / name for name in ("empty-s0", "diverged-s0", "full-s1")]
    assert [path for path in left if path.exists()] == []
    assert "runs/tiny/full-s1: 1.5 MB\n" in said
    assert "runs/tiny/full-s0/checkpoint.pt.0123abcd.tmp: 2 MB\n" in said
    assert sorted(path.name for path in (top / "full-s0").iterdir()) == sorted(FILES)


def test_a_run_in_the_cache_of_dvc_loses_only_its_links(flow: Flow) -> None:
    stored = flow / "stored"
    stored.write_bytes(b"x" * 5_000_000)
    path = flow / "runs/tiny/full-s1/checkpoint.pt"
    path.unlink()
    path.symlink_to(stored)
    assert re.search(
        r"runs/tiny/full-s1: [\d.]+ (bytes|kB)\n", flow.ok("runs", "prune", "--unlisted", "--yes")
    )
    assert stored.stat().st_size == 5_000_000


def test_a_folder_that_cannot_be_listed_or_removed_is_named(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("stages.commands.runs.removal.shutil.rmtree", refuse)
        assert flow.gmpipe("runs", "prune", "--yes").refused(
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
        ["run", "mAP", "epochs", "named by params.yaml", "made with", "commit"],
        ["runs/tiny/My_variant-s0", "damaged", "damaged", "no", "", ""],
        ["runs/tiny/full-s0", "41.3", "2", "yes", "", "0123456789ab, uncommitted changes"],
        ["runs/tiny/full-s0-0123abcd", "41.3", "2", "no", "", "0123456789ab"],
        ["runs/tiny/full-s1", "-", "-", "no", "", ""],
        ["runs/tiny/max-pool-s0", "41.3", "-", "yes", "-", "0123456789ab"],
        ["runs/tiny/without-label-graph-s12", "41.3", "2", "no", "", "0123456789ab"],
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
    sets = ("epochs=1", "network.modules=1", "loss.beta=0.4", "momentum=0.5", "clip_norm=2")
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
    write_small_params(small.folder, {"variants": {"max-pool": {"epochs": 2}}})
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
    assert Flow(tmp_path).ok("runs", "prune", "--yes") == "0 bytes removed from runs/tiny\n"
    assert not (tmp_path / "runs").exists()


# clean -------------------------------------------------------------------------------------------


OWN = (
    "data/tiny/photo.png",
    "data/tiny/labels.csv",
    "params.yaml",
    "data/other/prepared/manifest.parquet",
)
"""What a user put there, and what belongs to another data set."""


@pytest.fixture
def made_for(flow: Flow) -> Flow:
    """Something of each kind that gmpipe makes for `tiny`, and the user's own files beside it."""
    for path in (
        "data/tiny/prepared/manifest.parquet",
        "data/tiny/prepared/boxes.parquet",
        "data/tiny/prepared/missing.csv",
        "data/tiny/prepared/images/test-00000.png",
        "data/tiny/.prepared.lock",
        "data/tiny/settings/full.yaml",
        "data/tiny/detector/weights.pt",
        "data/tiny/detector/detector.json",
        "data/tiny/detector/metrics.json",
        "cache/tiny/regions-00000.h5",
        "cache/tiny/index.parquet",
        "cache/.tiny.lock",
        "cache/.tiny.workers.lock",
        "reports/tiny/index.html",
        ".state/train-tiny-0123456789abcdef.pt",
        ".state/detector-tiny-0123456789abcdef.pt.01234567.tmp",
        ".state/times/tiny.csv",
        *STAY,
    ):
        (flow / path).parent.mkdir(parents=True, exist_ok=True)
        if not (flow / path).exists():
            (flow / path).write_bytes(b"x" * 1000)
    return flow


STAY = (
    *OWN,
    "runs/other/full-s0/checkpoint.pt",
    ".state/train-tiny-b-0123456789abcdef.pt",
    ".state/train-other-0123456789abcdef.pt",
    ".state/times/other.csv",
)


def test_all_that_was_made_for_a_data_set_is_removed_and_nothing_else(made_for: Flow) -> None:
    before = {name: made_for.bytes(name)[name] for name in STAY}
    everything = made_for.bytes(".")
    listed = made_for.ok("clean", "tiny")
    assert made_for.bytes(".") == everything
    assert "`gmpipe clean tiny --yes`" in listed
    said = made_for.ok("clean", "tiny", "--yes")
    for path in (
        "data/tiny/prepared",
        "data/tiny/settings",
        "data/tiny/detector",
        "cache/tiny",
        "reports/tiny",
        "runs/tiny/full-s1",
        "runs/tiny/sweeps/regions",
        ".state/train-tiny-0123456789abcdef.pt",
        ".state/times/tiny.csv",
    ):
        assert f"\n{path}: " in f"\n{said}"
        assert f"\n{path}: " in f"\n{listed}"
    assert made_for.bytes(".") == before
    assert not (made_for / "runs/tiny").exists()
    assert made_for.gmpipe("clean", "tiny").refused("'tiny', so there is nothing to remove.*other")


FOREIGN = (
    "data/tiny/prepared/notes.txt",
    "data/tiny/prepared/images/mine.png",
    "data/tiny/settings/notes.txt",
    "data/tiny/detector/my-weights.pt",
    "cache/tiny/notes.txt",
    "runs/tiny/full-s1/notes.txt",
    "reports/tiny/notes.txt",
    "reports/tiny/figures/mine.png",
    "reports/tiny/mine/index.html",
)


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_file_that_gmpipe_did_not_write_stays_and_is_listed(made_for: Flow, foreign: str) -> None:
    path = made_for / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    stays = "runs/tiny/full-s1" if foreign.startswith("runs") else foreign
    for options in ((), ("--yes",)):
        assert f"\n{stays}: stays" in "\n" + made_for.ok("clean", "tiny", *options)
    assert path.read_text() == "mine"
    folder = Path(*Path(foreign).parts[: 2 if foreign.startswith("reports") else -1])
    if not foreign.startswith("runs"):
        left = [found for found in (made_for / folder).rglob("*") if found.is_file()]
        assert left == [path]
    assert not (made_for / "cache/tiny/index.parquet").exists()


def test_every_file_that_gmpipe_writes_is_known_as_its_own(made: Flow) -> None:
    """Scenes with a fitted detector, a cache, runs and a page."""
    listed = made.ok("clean", "tiny").splitlines()
    assert not [line for line in listed if "gmpipe did not write" in line]
    folders = ("data/tiny/prepared", "data/tiny/detector", "cache/tiny", "reports/tiny")
    assert set(folders) <= {line.partition(":")[0] for line in listed}


def test_what_others_put_there_is_not_taken_for_something_made(made_for: Flow) -> None:
    (made_for / "data/tiny/prepared/notes.txt").write_text("mine")
    made_for.ok("clean", "tiny", "--yes")
    refused = made_for.gmpipe("clean", "tiny")
    assert refused.refused("'tiny'.*made for other")
    assert (made_for / "data/tiny/prepared/notes.txt").exists()


def test_a_run_with_other_files_is_listed_as_staying(flow: Flow) -> None:
    (flow / "runs/tiny/full-s0-0123abcd/notes.txt").write_text("mine")
    assert "runs/tiny/full-s0-0123abcd: stays" in flow.ok("runs", "prune", "--yes")
    assert (flow / "runs/tiny/full-s0-0123abcd/checkpoint.pt").exists()


def test_a_cache_on_another_disk_stays(made_for: Flow) -> None:
    (made_for / "cache/tiny").rename(made_for / "big")
    (made_for / "cache/tiny").symlink_to(made_for / "big")
    assert re.search(r"cache/tiny: .*/big\b.*stays", made_for.ok("clean", "tiny", "--yes"))
    assert (made_for / "cache/tiny/index.parquet").exists()


def test_what_is_being_written_is_not_cleaned(made_for: Flow) -> None:
    with being_written(made_for / "runs/tiny/full-s1"):
        said = made_for.ok("clean", "tiny", "--yes")
        assert "runs/tiny/full-s1: is being written, stays\n" in said
        assert (made_for / ".state/train-tiny-0123456789abcdef.pt").exists()
    made_for.ok("clean", "tiny", "--yes")
    assert not (made_for / ".state/train-tiny-0123456789abcdef.pt").exists()


def test_a_data_set_that_params_yaml_lacks_can_be_cleaned(made_for: Flow) -> None:
    made_for.ok("clean", "other", "--yes")
    assert not (made_for / "data/other").exists()
    assert made_for.gmpipe("clean", "../tiny").refused(r"\.\./tiny")


def test_what_a_killed_training_resumes_from_is_cleaned(small: Flow) -> None:
    eager = mock.patch("stages.train.train_network", partial(train_network, save_every=0))
    with eager, mock.patch("stages.train.save_checkpoint", side_effect=OSError(28, "full")):
        assert small.gmpipe("train").code == 1
    [state] = (small / ".state").glob("*.pt")
    assert f"{state.relative_to(small.folder)}: " in small.ok("clean", "voc2007", "--yes")
    assert not state.exists()
    assert sorted(path.name for path in small.folder.glob("*.npz")) == [
        "regions.npz",
        "vectors.npz",
    ]
