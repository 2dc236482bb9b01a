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
    "runs/tiny/max-pool-s0/history.csv": "gmpipe train .*--variant max-pool --seed 0",
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
