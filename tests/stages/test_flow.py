"""The whole flow through the command line, on a data set that takes seconds, and its failures.

All tests read one finished flow; a test that changes anything works in a copy of it. Commands run
in this process, unless the process itself matters. 24 training scenes in two views and 12 test
scenes are 60 rows, in 6 shards of 10.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clusters import worker_in_this_process
from flows import ROOT, VARIANTS, Flow, being_written, full_disk, run_all
from ruamel.yaml import YAML
from small import no_run_is_made

from pipeline.datasets.manifest import COLUMNS, full_counts, read_manifest, write_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.evaluation.metrics import evaluate
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.settings import variant_changes
from pipeline.shards.reader import RegionCache

TIMES = "reports/tiny/data/times.js"  # the one file of a page that holds wall-clock times
FIGURES = (
    "average-precision",
    "calibration",
    "co-occurrence",
    "gains-and-losses",
    "label-map",
    "learning-curves",
    "precision-recall",
)
PAGE = sorted(
    [
        "assets",
        *(
            f"assets/{name}"
            for name in ("core.js", "doubts.js", "gallery.js", "page.css", "page.js", "tables.js")
        ),
        "data",
        *(f"data/{name}.js" for name in ("curves", "images", "overview", "times")),
        *(f"data/{kind}-{number}.js" for kind in ("regions", "scores") for number in (0, 1)),
        "figures",
        *(f"figures/{name}.svg" for name in FIGURES),  # and .png
        "index.html",
        "pictures",
        *(f"pictures/{number}.jpg" for number in range(12)),
        "tables",
        *(f"tables/{name}.csv" for name in (*FIGURES[1:], "labels", "results")),
        "tables/results.md",
    ]
)


@pytest.fixture(autouse=True, scope="module")
def _extracting_in_this_process() -> Iterator[None]:
    with worker_in_this_process():
        yield


# Outputs -----------------------------------------------------------------------------------------


def test_every_stage_leaves_its_outputs_and_nothing_else(made: Flow) -> None:
    def names(path: str) -> list[str]:
        paths = (made / path).rglob("*")
        return sorted(str(p.relative_to(made / path)) for p in paths if p.suffix != ".png")

    assert names("data/tiny/prepared") == ["boxes.parquet", "images", "manifest.parquet"]
    assert names("data/tiny/settings") == [f"{variant}.yaml" for variant in VARIANTS]
    assert names("data/tiny/detector") == ["detector.json", "metrics.json", "weights.pt"]
    assert names("cache/tiny") == ["index.parquet", *(f"regions-{n:05d}.h5" for n in range(6))]
    files = [
        "checkpoint.pt",
        "history.csv",
        "metrics.json",
        "predictions.parquet",
        "settings.yaml",
        "summary.json",
    ]
    for variant in VARIANTS:
        assert names(f"runs/tiny/{variant}-s0") == files
    assert names("reports/tiny") == PAGE
    assert names(".state") == ["times", "times/tiny.csv"]
    assert list(made.folder.rglob("*.tmp*")) == []


def test_metrics_hold_all_numbers_and_what_they_are_of(made: Flow) -> None:
    six = {"CP", "CR", "CF1", "OP", "OR", "OF1"}
    for variant in VARIANTS:
        metrics = made.metrics(f"{variant}-s0")
        assert metrics.keys() >= {"mAP", *six, "top3", "top3_forced", "AP"}
        assert metrics["top3"].keys() == metrics["top3_forced"].keys() == six
        assert list(metrics["AP"]) == list(VOCABULARY)
        about = {key: metrics[key] for key in ("dataset", "split", "variant", "seed", "images")}
        assert about == {
            "dataset": "tiny",
            "split": "drawn/test",
            "variant": variant,
            "seed": 0,
            "images": 12,
        }
        cache = RegionCache.open(made / "cache/tiny")
        assert metrics["fingerprint"] == cache.fingerprint
        assert metrics["commit"] is None  # no git around it
        summary = json.loads((made / f"runs/tiny/{variant}-s0/summary.json").read_text())
        assert summary["mAP"] == metrics["mAP"]
        assert summary["top3"]["OF1"] == metrics["top3"]["OF1"]


def test_metrics_are_those_of_the_predictions(made: Flow) -> None:
    manifest = read_manifest(made / "data/tiny/prepared/manifest.parquet")
    table = pq.read_table(made / "runs/tiny/full-s0/predictions.parquet")
    assert table.column("image_id").to_pylist() == manifest.image_ids("test")
    logits = np.array(table.column("logits").to_pylist(), dtype=np.float32)
    regions = np.array(table.column("regions").to_pylist())
    assert logits.shape == regions.shape == (12, len(VOCABULARY))
    metrics = evaluate(logits, manifest.truth("test"), manifest.vocabulary)
    assert metrics.mAP == pytest.approx(made.metrics()["mAP"])
    assert pytest.approx(made.metrics()["AP"]) == metrics.AP
    cache = RegionCache.open(made / "cache/tiny")
    count = cache.gather(cache.lookup(manifest.image_ids("test"))).count
    assert ((regions >= 0) & (regions < count[:, None])).all()


def test_a_checkpoint_holds_everything_that_its_use_needs(made: Flow) -> None:
    path = made / "runs/tiny/full-s0/checkpoint.pt"
    assert isinstance(torch.load(path, weights_only=True), dict)
    checkpoint = load_checkpoint(path)
    assert checkpoint.vocabulary == VOCABULARY
    assert checkpoint.settings.epochs == 2
    assert checkpoint.recipe == RegionCache.open(made / "cache/tiny").recipe
    assert (checkpoint.state["inputs.feature_scale"] != 1).any()
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.label_vectors_sha256)
    for folder in ("runs/tiny/full-s0/settings.yaml", "data/tiny/settings/full.yaml"):
        written = YAML(typ="safe").load(made / folder)
        assert written["settings"] == checkpoint.settings.model_dump(
            mode="json", exclude={"variants"}
        )
        assert written["views"] == 2
    with (made / "runs/tiny/full-s0/history.csv").open() as stream:
        history = list(csv.DictReader(stream))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert list(history[0]) == ["epoch", "learning_rate", "train_loss", "gradient_norm"]


def test_the_report_has_one_row_per_variant_and_one_per_label(made: Flow) -> None:
    text = (made / "reports/tiny/tables/results.md").read_text()
    assert re.search(r"\btiny\b.* drawn/test\b.* 12 images\b.* seed 0\b", text)
    for variant in VARIANTS:
        value = made.metrics(f"{variant}-s0")["mAP"]
        assert re.search(rf"^\| {variant} +\| {value:.1f} +\|", text, re.MULTILINE)
    for label in VOCABULARY:
        assert re.search(rf"^\| \w+ +\| {label} +\|", text, re.MULTILINE)


def test_the_same_seeds_give_the_same_bytes_everywhere(made: Flow, tmp_path: Path) -> None:
    again = Flow(tmp_path / "somewhere" / "else")
    again.folder.mkdir(parents=True)
    again.params()
    run_all(again)
    for path in ("data", "cache/tiny", "runs", "reports"):
        before, after = (
            {name: content for name, content in flow.bytes(path).items() if name != TIMES}
            for flow in (made, again)
        )
        assert after.keys() == before.keys()
        assert [name for name in before if after[name] != before[name]] == []


# Outputs that are up to date ---------------------------------------------------------------------


def test_a_second_prepare_changes_nothing(flow: Flow) -> None:
    before = flow.bytes("data/tiny/prepared")
    assert "unchanged" in flow.ok("prepare")
    assert flow.bytes("data/tiny/prepared") == before
    assert "25 train" in flow.ok("prepare", "--set", "prepare.tiny.train=25")


def test_a_second_extract_changes_nothing(flow: Flow) -> None:
    before = {p: p.stat().st_mtime_ns for p in (flow / "cache/tiny").iterdir()}
    with mock.patch("stages.workers.tasks.load_detector", side_effect=AssertionError):
        assert "60 rows, 0 of them extracted now" in flow.ok("extract")
        flow.ok("extract", "--replace")
    assert {p: p.stat().st_mtime_ns for p in (flow / "cache/tiny").iterdir()} == before


def test_a_corrected_label_does_not_extract_again(flow: Flow) -> None:
    path = flow / "data/tiny/prepared/manifest.parquet"
    manifest = read_manifest(path)
    rows = manifest.table.to_pylist()
    rows[0]["labels"] = [n for n in range(5) if n not in rows[0]["labels"]]
    corrected = pa.Table.from_pylist(rows, schema=COLUMNS)
    write_manifest(
        path,
        type(manifest)(
            manifest.dataset,
            manifest.split_name,
            manifest.vocabulary,
            manifest.sources,
            full_counts(corrected),
            corrected,
        ),
    )
    before = flow.bytes("cache/tiny")
    assert "0 of them extracted now" in flow.ok("extract")
    assert flow.bytes("cache/tiny") == before


def test_a_deleted_shard_is_extracted_again(flow: Flow, made: Flow) -> None:
    (flow / "cache/tiny/regions-00002.h5").unlink()
    assert flow.gmpipe("train").refused(r"regions-00002\.h5.*`gmpipe extract --dataset tiny`")
    said = flow.ok("extract")
    assert said.startswith("extract: resumed at view 50 of 60\n")
    assert "60 rows, 10 of them extracted now" in said
    assert (flow / ".state/times/tiny.csv").read_text().splitlines()[-1].split(",")[-2] == "10"
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


def test_a_killed_fit_says_where_it_resumed(flow: Flow) -> None:
    """The weights of an earlier detector stay until another one has been fitted."""
    before = flow.bytes("data/tiny/detector")

    class Killed(Exception):
        pass

    with (
        mock.patch("pipeline.regions.fitting._SAVE_EVERY", 1),
        mock.patch("stages.detector.measure_detector", side_effect=Killed),
        pytest.raises(Killed),
    ):
        flow.gmpipe("detector")
    assert flow.bytes("data/tiny/detector") == before
    assert flow.ok("detector").startswith("fit detector: resumed at step 2 of 3\n")
    assert "resumed" not in flow.ok("detector")


def test_a_damaged_shard_is_named_and_extracted_again(flow: Flow, made: Flow) -> None:
    path = flow / "cache/tiny/regions-00001.h5"
    path.write_bytes(path.read_bytes()[:3000])
    assert flow.gmpipe("extract").refused(r"regions-00001\.h5.*--replace")
    path.unlink()
    assert "10 of them extracted now" in flow.ok("extract")
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


def test_an_index_older_than_its_shards_is_written_again(flow: Flow, made: Flow) -> None:
    """A run that was killed after its last shard and before the index leaves it."""
    index = flow / "cache/tiny/index.parquet"
    older = index.read_bytes()
    (flow / "cache/tiny/regions-00002.h5").unlink()
    flow.ok("extract")
    index.write_bytes(older)
    assert "0 of them extracted now" in flow.ok("extract")
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()
    index.write_bytes(b"damaged")
    flow.ok("extract")
    assert len(RegionCache.open(flow / "cache/tiny")) == 60


# Other settings ----------------------------------------------------------------------------------


def test_regions_of_other_settings_are_only_dropped_when_told_to(flow: Flow, made: Flow) -> None:
    other = ("--set", "extract.tiny.regions=3")
    assert flow.gmpipe("extract", *other).refused(r"regions is 4\b.*\b3\b.*--replace`")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")
    said = flow.ok("extract", *other, "--replace")
    assert re.search(r"\b6 shards \(60 rows\b.*\n.*regions-00000\.h5", said)
    assert "60 rows, 60 of them extracted now" in said
    cache = RegionCache.open(flow / "cache/tiny")
    assert cache.regions == 3
    # A run that was trained on the other regions is not evaluated on these.
    assert flow.gmpipe("evaluate").refused(
        r"full-s0/checkpoint\.pt.*regions is 4\b.*\b3\b.*gmpipe train"
    )
    flow.ok("train")
    flow.ok("evaluate")
    assert flow.metrics()["fingerprint"] == cache.fingerprint != made.metrics()["fingerprint"]


def test_a_run_with_other_settings_has_a_folder_of_its_own(flow: Flow, made: Flow) -> None:
    other = ("--set", "train.tiny.epochs=1")
    flow.ok("train", *other)
    flow.ok("evaluate", *other)
    [own] = [p for p in (flow / "runs/tiny").iterdir() if re.search("-s0-[0-9a-f]{8}$", p.name)]
    assert own.name.startswith("full-s0-")
    assert load_checkpoint(own / "checkpoint.pt").settings.epochs == 1
    assert flow.metrics(own.name)["images"] == 12
    assert flow.bytes("runs/tiny/full-s0") == made.bytes("runs/tiny/full-s0")


def test_compare_trains_only_what_is_missing(flow: Flow) -> None:
    chosen = ("compare", "--variant", "max-pool", "--seed", "0", "--seed", "1", "--jobs", "1")
    before = flow.bytes("runs/tiny/max-pool-s0")
    said = flow.ok(*chosen)
    epochs = variant_changes("max-pool")["epochs"]
    assert f"max-pool-s1: {epochs} epochs" in said
    assert "runs/tiny/max-pool-s0: " not in said
    values = [flow.metrics(f"max-pool-s{seed}")["mAP"] for seed in (0, 1)]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert re.search(rf"^\| max-pool +\| {mean:.1f} ± {spread:.1f} +\|", said, re.MULTILINE)
    with no_run_is_made():
        assert "± " in flow.ok(*chosen)
    assert flow.bytes("runs/tiny/max-pool-s0") == before
    flow.params(train__tiny__variants={"max-pool": {"epochs": 1}})
    assert "max-pool-s0: 1 epoch, loss" in flow.ok(*chosen)


# Failures ----------------------------------------------------------------------------------------


def test_commands_in_the_wrong_order_say_what_to_run(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    assert flow.gmpipe("prepare").refused("params.yaml")
    flow.params()
    for command, first in (
        ("detector", "gmpipe prepare"),
        ("extract", "gmpipe prepare"),
        ("train", "gmpipe prepare"),
        ("evaluate", "gmpipe train"),
        ("report", "gmpipe train"),
    ):
        assert flow.gmpipe(command).refused(first)
    flow.ok("prepare")
    assert flow.gmpipe("extract").refused("data/tiny/detector.*gmpipe detector --dataset tiny")
    assert flow.gmpipe("train").refused("cache/tiny.*gmpipe extract --dataset tiny")


def test_an_unknown_data_set_is_named_with_the_nearest(flow: Flow) -> None:
    for command in ("prepare", "detector", "extract", "train", "evaluate", "compare", "report"):
        assert flow.gmpipe(command, "--dataset", "tinny").refused("'tinny'.*`tiny`")


def test_a_deleted_image_is_named_and_drawn_again(flow: Flow, made: Flow) -> None:
    path = flow / "data/tiny/prepared/images/train-00003.png"
    path.unlink()
    assert flow.gmpipe("extract").refused(r"\b1 of 36\b.*'train-00003'.*gmpipe prepare")
    assert "24 train, 12 test" in flow.ok("prepare")
    assert flow.bytes("data/tiny/prepared") == made.bytes("data/tiny/prepared")
    assert "0 of them extracted now" in flow.ok("extract")


def test_a_changed_image_makes_another_recipe(flow: Flow) -> None:
    folder = flow / "data/tiny/prepared/images"
    (folder / "train-00003.png").write_bytes((folder / "train-00004.png").read_bytes())
    assert flow.gmpipe("extract").refused(r"regions-00000\.h5.*gmpipe extract .*--replace")


def test_a_corrupt_manifest_is_named_and_made_again(flow: Flow, made: Flow) -> None:
    path = flow / "data/tiny/prepared/manifest.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    for command in ("detector", "extract", "train", "evaluate"):
        assert flow.gmpipe(command).refused(r"manifest\.parquet .*gmpipe prepare")
    flow.ok("prepare")
    assert flow.bytes("data/tiny/prepared") == made.bytes("data/tiny/prepared")


def test_a_truncated_checkpoint_is_named(flow: Flow) -> None:
    path = flow / "runs/tiny/full-s0/checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert flow.gmpipe("evaluate").refused(r"full-s0/checkpoint\.pt .*gmpipe train")


def test_damaged_detector_weights_are_named(flow: Flow) -> None:
    path = flow / "data/tiny/detector/weights.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert flow.gmpipe("extract").refused(r"weights\.pt .*sha256.*gmpipe detector --dataset tiny")


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (("prepare",), "data/tiny/prepared"),
        (("detector",), "data/tiny/detector"),
        (("extract",), "cache/tiny"),
        (("train",), "runs/tiny/full-s0"),
        (("evaluate",), "runs/tiny/full-s0"),
        (("report",), "reports/tiny"),
    ],
)
def test_a_folder_that_another_process_writes_is_left_alone(
    flow: Flow, made: Flow, command: tuple[str, ...], folder: str
) -> None:
    with being_written(flow / folder):
        assert flow.gmpipe(*command).refused(f"{folder} ")
    assert flow.bytes(folder) == made.bytes(folder)


def test_the_lock_of_a_process_goes_with_it(flow: Flow) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.files import folder_lock\n"
        "with folder_lock(Path('cache/tiny')): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=flow.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert flow.gmpipe("extract").refused("cache/tiny ")
        other.kill()
    flow.ok("extract")


def drop_shards(flow: Flow, *numbers: int) -> dict[str, bytes]:
    """Delete shards; return those that are left."""
    for number in numbers:
        (flow / f"cache/tiny/regions-{number:05d}.h5").unlink()
    return shards(flow)


def shards(flow: Flow) -> dict[str, bytes]:
    return {n: content for n, content in flow.bytes("cache/tiny").items() if n.endswith(".h5")}


FULL = "no space left on the device"


def test_an_extraction_survives_a_full_disk(flow: Flow, made: Flow) -> None:
    """Two shards are missing, and there is no room for a whole one."""
    kept = drop_shards(flow, 1, 4)
    size = (flow / "cache/tiny/regions-00000.h5").stat().st_size
    for limit in (size // 4, size - 10):
        with full_disk(limit):
            failed = flow.gmpipe("extract")
        assert failed.refused(FULL)
        assert shards(flow) == kept
        assert list(flow.folder.rglob("*.tmp")) == []
    assert "60 rows, 20 of them extracted now" in flow.ok("extract")
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


@pytest.mark.slow
def test_an_extraction_in_another_process_survives_a_full_disk(flow: Flow, made: Flow) -> None:
    """The installed script, whose Dask worker writes the shards."""
    kept = drop_shards(flow, 1, 4)
    with full_disk((flow / "cache/tiny/regions-00000.h5").stat().st_size - 10):
        failed = flow.installed("extract")
    assert failed.refused(FULL)
    assert shards(flow) == kept
    assert list(flow.folder.rglob("*.tmp")) == []
    done = flow.installed("extract")
    assert done.code == 0, done.err
    assert "60 rows, 20 of them extracted now" in done.out
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


def test_a_training_survives_a_full_disk(flow: Flow, made: Flow) -> None:
    before = flow.bytes("runs/tiny/full-s0")
    with full_disk(5000):
        failed = flow.gmpipe("train")
    assert failed.refused(FULL)
    assert flow.bytes("runs/tiny/full-s0") == before
    flow.ok("train")
    flow.ok("evaluate")
    assert flow.bytes("runs/tiny/full-s0") == made.bytes("runs/tiny/full-s0")
