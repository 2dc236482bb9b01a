"""Command `verify`: a line for each thing in a checkout, and what each damage is called."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flows import Flow
from PIL import Image
from ruamel.yaml import YAML
from small import write_params as write_small_params

from pipeline.datasets.manifest import read_manifest
from pipeline.evaluation.tables import as_csv
from pipeline.report.sweeps import SweepResults, SweepRun, write_sweep
from pipeline.shards.index import read_index
from pipeline.shards.schema import without_images
from pipeline.shards.shard import map_shard, write_shard


def lines_of(text: str) -> dict[str, str]:
    """What `verify` says, by thing."""
    *things, _ = text.splitlines()
    return dict(line.split(": ", 1) for line in things)


def statuses(text: str) -> dict[str, str]:
    return {thing: about.split(":")[0] for thing, about in lines_of(text).items()}


RUN_FILES = (
    "settings.yaml",
    "checkpoint.pt",
    "history.csv",
    "metrics.json",
    "summary.json",
    "predictions.parquet",
)


def test_a_finished_data_set_is_sound_and_stays_as_it_is(made: Flow) -> None:
    before = {name: made.bytes(name) for name in ("data", "cache", "runs", "reports")}
    found = statuses(made.ok("verify", "--images"))
    assert set(found.values()) == {"sound"}
    expected = {
        *(f"data/tiny/{name}" for name in ("prepared/manifest.parquet", "prepared/boxes.parquet")),
        *("data/tiny/settings", "data/tiny/detector", "data/tiny", "cache/tiny"),
        *(f"runs/tiny/{run}-s0/{name}" for run in ("full", "max-pool") for name in RUN_FILES),
        *(".state/times/tiny.csv", "reports/tiny"),
    }
    assert found.keys() == expected
    assert {name: made.bytes(name) for name in before} == before


def test_where_nothing_is_made_yet_nothing_is_damaged(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.params()
    text = flow.ok("verify", "--images")
    assert set(statuses(text).values()) == {"missing"}
    assert "gmpipe prepare --dataset tiny" in lines_of(text)["data/tiny/prepared/manifest.parquet"]


def test_imported_regions_are_verified_too(small: Flow) -> None:
    small.ok("train")
    small.ok("evaluate")
    assert set(statuses(small.ok("verify", "--images")).values()) == {"sound"}


def flip(path: Path) -> None:
    """Change a bit in the middle; in Parquet the last byte, since some others hold nothing."""
    stored = bytearray(path.read_bytes())
    stored[-1 if path.suffix == ".parquet" else len(stored) // 2] ^= 4
    path.write_bytes(stored)


AGAIN = {
    "data/tiny/prepared/manifest.parquet": "gmpipe prepare --dataset tiny",
    "data/tiny/prepared/boxes.parquet": "gmpipe prepare --dataset tiny",
    "data/tiny/detector/weights.pt": "gmpipe detector --dataset tiny",
    "cache/tiny/regions-00001.h5": "gmpipe cache verify .*--repair",
    "runs/tiny/full-s0/settings.yaml": "gmpipe train .*--variant full --seed 0",
    "runs/tiny/full-s0/checkpoint.pt": "gmpipe train .*--variant full --seed 0",
    "runs/tiny/max-pool-s0/metrics.json": "gmpipe evaluate .*--variant max-pool --seed 0",
    "runs/tiny/max-pool-s0/predictions.parquet": "gmpipe evaluate .*--variant max-pool --seed 0",
    ".state/times/tiny.csv": "Delete",
}


def test_damaged_files_are_named_with_the_commands_that_make_them_again(flow: Flow) -> None:
    for path in AGAIN:
        flip(flow / path)
    before = flow.bytes(".")
    done = flow.gmpipe("verify")
    assert done.code == 1
    assert "Traceback" not in done.err
    said = lines_of(done.out)
    for path, command in AGAIN.items():
        thing = next(name for name in (path, *map(str, Path(path).parents)) if name in said)
        assert re.match(f"damaged: .*{command}", said[thing]), said[thing]
    assert flow.bytes(".") == before


@pytest.fixture
def trained(small: Flow) -> Flow:
    """A data set of imported regions with a run that is trained and evaluated."""
    small.ok("train")
    small.ok("evaluate")
    return small


def not_sound(flow: Flow, *options: str) -> dict[str, str]:
    """What is not sound, by thing."""
    done = flow.gmpipe("verify", *options)
    assert done.out, done.err
    found = statuses(done.out)
    assert done.code == int("damaged" in found.values() or "unreadable" in found.values())
    return {thing: status for thing, status in found.items() if status != "sound"}


def test_a_damage_is_said_of_the_damaged_file_only(trained: Flow) -> None:
    own = "data/voc2007/prepared/manifest.parquet"
    for path in (*(f"runs/voc2007/full-s0/{name}" for name in RUN_FILES), own):
        stored = (trained / path).read_bytes()
        for content in (b"", stored[: len(stored) // 2], b"\xff" * 9):
            (trained / path).write_bytes(content)
            assert not_sound(trained) == {path: "damaged"}
        (trained / path).unlink()
        about = {} if path.startswith("runs") and "checkpoint" not in path else {path: "missing"}
        assert not_sound(trained) == about
        (trained / path).symlink_to(trained / path)  # which root can't read either
        assert not_sound(trained) == {path: "unreadable"}
        (trained / path).unlink()
        (trained / path).write_bytes(stored)


def test_damages_are_said_without_a_checkpoint_too(trained: Flow) -> None:
    run = "runs/voc2007/full-s0"
    (trained / run / "checkpoint.pt").unlink()
    for name in RUN_FILES[2:]:
        stored = (trained / run / name).read_bytes()
        (trained / run / name).write_bytes(stored[: len(stored) // 2])
    files = {f"{run}/{name}": "damaged" for name in RUN_FILES[2:]}
    assert not_sound(trained) == {f"{run}/checkpoint.pt": "missing", **files}


def test_files_of_an_earlier_training_are_out_of_date(trained: Flow) -> None:
    """As a kill leaves them between the checkpoint and each of the files."""
    run = "runs/voc2007/full-s0"
    former = {name: (trained / run / name).read_bytes() for name in RUN_FILES}
    write_small_params(trained.folder, {"epochs": 1})
    trained.ok("train")
    trained.ok("evaluate")
    assert not_sound(trained) == {}
    for name in set(RUN_FILES) - {"checkpoint.pt"}:
        stored = (trained / run / name).read_bytes()
        (trained / run / name).write_bytes(former[name])
        things = {f"{run}/{name}": "out of date"}
        if name == "metrics.json":
            things[f"{run}/summary.json"] = "out of date"
        assert not_sound(trained) == things
        if name == "settings.yaml":
            assert "out of date" in trained.ok("runs", "list")
        (trained / run / name).write_bytes(stored)


def test_a_run_in_the_folder_of_another_is_out_of_date(trained: Flow) -> None:
    top = trained / "runs/voc2007"
    for name in ("full-s1", "max-pool-s0", "Full-s0", "full-s0-0123abcd", "full-s0-backup"):
        shutil.copytree(top / "full-s0", top / name)
    wrong = ("full-s1", "max-pool-s0", "Full-s0")
    assert not_sound(trained) == {
        f"runs/voc2007/{name}/checkpoint.pt": "out of date" for name in wrong
    }


@pytest.mark.parametrize("variant", ["my-small", "a-s1", "My_variant", "full-s0-0123abcd"])
def test_variants_may_have_any_name(small: Flow, variant: str) -> None:
    own = {"variants": {variant: {"loss": {"beta": 0.3}}}}
    write_small_params(small.folder, own, variants=["full", variant])
    small.ok("train", "--variant", variant)
    small.ok("train", "--variant", variant, "--set", "train.voc2007.epochs=1")
    assert not_sound(small) == {}
    write_small_params(small.folder, own | {"epochs": 3}, variants=["full", variant])
    checkpoint = f"runs/voc2007/{variant}-s0/checkpoint.pt"
    text = small.ok("verify")
    assert not_sound(small)[checkpoint] == "out of date"
    assert f"--variant {variant} --seed 0`" in lines_of(text)[checkpoint]
    [hashed] = (small / "runs/voc2007").glob(f"{variant}-s0-*")
    (hashed / "checkpoint.pt").write_bytes(b"")
    about = lines_of(small.gmpipe("verify").out)[f"runs/voc2007/{hashed.name}/checkpoint.pt"]
    assert re.match(f"damaged: .*--variant {variant} --seed 0` .*--set", about), about


def test_the_table_of_another_sweep_is_out_of_date(small: Flow) -> None:
    folder = small / "runs/voc2007/sweeps/beta"
    runs = [SweepRun(value=value, seed=0, mAP=5.5, CF1=1.0, OF1=2.0) for value in ("0.1", "0.2")]
    same = {"dataset": "voc2007", "split": "x/test", "variant": "full", "setting": "beta"}
    manifest = read_manifest(small / "data/voc2007/prepared/manifest.parquet")
    same["fingerprint"] = read_index(small / "cache/voc2007").fingerprint
    same |= {"train_sha256": manifest.train_sha256, "test_sha256": manifest.test_sha256}
    sweep = SweepResults(**same, numeric=True, runs=runs)
    write_sweep(folder / "sweep.json", sweep)
    thing = "runs/voc2007/sweeps/beta"
    for text, expected in (
        (as_csv(sweep.rows()), {}),
        (as_csv(sweep.rows()[1:]), {thing: "out of date"}),
        (as_csv(sweep.rows())[:-9], {thing: "damaged"}),
        ("", {thing: "damaged"}),
    ):
        (folder / "results.csv").write_text(text)
        found = not_sound(small)
        assert found == expected, text
    assert "gmpipe sweep" in lines_of(small.gmpipe("verify").out)[thing]


def test_states_of_killed_runs_are_looked_at(flow: Flow) -> None:
    shutil.copyfile(flow / "runs/tiny/full-s0/checkpoint.pt", flow / ".state/train-0.pt")
    assert lines_of(flow.ok("verify"))[".state/train-0.pt"].startswith("sound")
    flip(flow / ".state/train-0.pt")
    done = flow.gmpipe("verify")
    assert done.code == 1
    assert lines_of(done.out)[".state/train-0.pt"].startswith("damaged")


def other_metrics(flow: Flow) -> None:
    for name in ("metrics.json", "summary.json", "predictions.parquet"):
        shutil.copyfile(flow / f"runs/tiny/max-pool-s0/{name}", flow / f"runs/tiny/full-s0/{name}")


def other_labels(flow: Flow) -> None:
    flow.params(prepare__tiny={"source": "scenes", "train": 24, "test": 12, "size": 64, "seed": 1})
    flow.ok("prepare")


@pytest.mark.parametrize(
    ("change", "things"),
    [
        (
            other_metrics,
            ["runs/tiny/full-s0/metrics.json", "runs/tiny/full-s0/predictions.parquet"],
        ),
        (other_labels, ["runs/tiny/full-s0/checkpoint.pt", "runs/tiny/max-pool-s0/metrics.json"]),
        (lambda flow: flow.params(train__tiny__epochs=3), ["runs/tiny/full-s0/checkpoint.pt"]),
        (lambda flow: flow.params(train__tiny__epochs=3), ["data/tiny/settings"]),
    ],
)
def test_what_is_out_of_date_is_no_damage(
    flow: Flow, change: Callable[[Flow], None], things: list[str]
) -> None:
    change(flow)
    found = statuses(flow.ok("verify"))
    assert "damaged" not in found.values()
    assert {thing: found[thing] for thing in things} == dict.fromkeys(things, "out of date")


def test_a_photograph_that_changed_is_found_by_its_hash(flow: Flow) -> None:
    photograph = next(iter(sorted((flow / "data/tiny/prepared").rglob("*.png"))))
    pixels = np.asarray(Image.open(photograph)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(photograph)
    assert "data/tiny" not in lines_of(flow.ok("verify"))
    about = lines_of(flow.ok("verify", "--images"))["data/tiny"]
    assert about.startswith("out of date")
    assert "gmpipe extract --dataset tiny --replace" in about
    assert flow.gmpipe("extract").refused(r"--replace")


def test_a_missing_photograph_is_advised_on_as_by_extract(flow: Flow) -> None:
    next((flow / "data/tiny/prepared").rglob("*.png")).unlink()
    about = lines_of(flow.ok("verify", "--images"))["data/tiny"]
    assert re.match("missing: .*gmpipe prepare --dataset tiny", about), about
    assert flow.gmpipe("extract").refused("gmpipe prepare --dataset tiny")


def test_photographs_are_compared_with_what_is_sound_only(flow: Flow) -> None:
    flip(flow / "cache/tiny/regions-00001.h5")
    (flow / "cache/tiny/regions-00002.h5").write_bytes(b"no shard")
    assert not_sound(flow, "--images") == {"cache/tiny": "damaged"}
    for thing in ("data/tiny/prepared/manifest.parquet", "cache/tiny/index.parquet"):
        flip(flow / thing)
        assert "data/tiny" not in lines_of(flow.gmpipe("verify", "--images").out)


def test_a_shard_that_names_no_photographs_is_out_of_date(flow: Flow) -> None:
    """One that was written with the library, for instance."""
    path = flow / "cache/tiny/regions-00001.h5"
    header, rows, _ = map_shard(path)
    write_shard(path, rows, dataset="tiny", recipe=without_images(header.recipe))
    assert not_sound(flow, "--images")["data/tiny"] == "out of date"


def test_what_can_t_be_read_is_said(flow: Flow) -> None:
    """Links that lead to themselves, which root can't read either."""
    things = ("runs/tiny/full-s0/metrics.json", "data/tiny/prepared/manifest.parquet")
    for thing in things:
        (flow / thing).unlink()
        (flow / thing).symlink_to(flow / thing)
    done = flow.gmpipe("verify")
    assert "Traceback" not in done.err
    found = statuses(done.out)
    assert found[things[1]] == "unreadable"
    assert done.code == 1


def test_a_run_without_a_checkpoint_is_missing_one(flow: Flow) -> None:
    (flow / "runs/tiny/full-s0/checkpoint.pt").unlink()
    found = statuses(flow.gmpipe("verify").out)
    assert found["runs/tiny/full-s0/checkpoint.pt"] == "missing"


def test_verify_works_for_a_data_set_that_is_not_listed(flow: Flow) -> None:
    raw = YAML(typ="safe").load((flow / "params.yaml").read_text())
    for section in ("prepare", "detector", "extract", "train"):
        raw[section]["other"] = raw[section]["tiny"]
    with (flow / "params.yaml").open("w") as stream:
        YAML().dump(raw, stream)
    assert "damaged" not in statuses(flow.ok("verify", "--dataset", "other")).values()
