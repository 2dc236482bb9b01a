"""The whole flow through the command line, on a data set that takes seconds; and what goes wrong.

One flow is run for all tests; a test that changes anything works in a copy of it. Commands run in
this process, except where the process itself matters. 24 training scenes in two views and 12 test
scenes are 60 rows, 6 shards of 10.
"""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flows import BIN, ROOT, VARIANTS, Flow, run_all

from pipeline.datasets.manifest import COLUMNS, full_counts, read_manifest, write_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.evaluation.metrics import evaluate
from pipeline.learning.checkpoint import load_checkpoint
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
            for name in ("core.js", "gallery.js", "page.css", "page.js", "tables.js")
        ),
        "data",
        *(f"data/{name}.js" for name in ("curves", "images", "overview", "times")),
        *(f"data/{kind}-{place}.js" for kind in ("regions", "scores") for place in (0, 1)),
        "figures",
        *(f"figures/{name}.svg" for name in FIGURES),  # and .png
        "index.html",
        "pictures",
        *(f"pictures/{place}.jpg" for place in range(12)),
        "tables",
        *(f"tables/{name}.csv" for name in (*FIGURES[1:], "labels", "results")),
        "tables/results.md",
    ]
)

# What is made ------------------------------------------------------------------------------------


def test_every_stage_leaves_its_outputs_and_nothing_else(made: Flow) -> None:
    def names(path: str) -> list[str]:
        found = (made / path).rglob("*")
        return sorted(str(p.relative_to(made / path)) for p in found if p.suffix != ".png")

    assert names("data/tiny/prepared") == ["boxes.parquet", "images", "manifest.parquet"]
    assert names("data/tiny/detector") == ["detector.json", "metrics.json", "weights.pt"]
    assert names("cache/tiny") == ["index.parquet", *(f"regions-{n:05d}.h5" for n in range(6))]
    files = [
        "checkpoint.pt",
        "history.csv",
        "metrics.json",
        "predictions.parquet",
        "summary.json",
    ]
    for variant in VARIANTS:
        assert names(f"runs/tiny/{variant}-s0") == files
    assert names("reports/tiny") == PAGE
    assert names(".state") == ["times", "times/tiny.csv"]
    assert list(made.folder.rglob("*.tmp*")) == []


def test_metrics_hold_what_the_design_asks_for(made: Flow) -> None:
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


def test_predictions_are_what_the_metrics_were_taken_of(made: Flow) -> None:
    manifest = read_manifest(made / "data/tiny/prepared/manifest.parquet")
    table = pq.read_table(made / "runs/tiny/full-s0/predictions.parquet")
    assert table.column("image_id").to_pylist() == manifest.image_ids("test")
    scores = np.array(table.column("scores").to_pylist(), dtype=np.float32)
    regions = np.array(table.column("regions").to_pylist())
    assert scores.shape == regions.shape == (12, len(VOCABULARY))
    metrics = evaluate(scores, manifest.truth("test"), manifest.vocabulary)
    assert metrics["mAP"] == pytest.approx(made.metrics()["mAP"])
    assert metrics["AP"] == pytest.approx(made.metrics()["AP"])
    cache = RegionCache.open(made / "cache/tiny")
    count = cache.gather(cache.lookup(manifest.image_ids("test"))).count
    assert ((regions >= 0) & (regions < count[:, None])).all()


def test_a_checkpoint_holds_all_that_its_use_needs(made: Flow) -> None:
    path = made / "runs/tiny/full-s0/checkpoint.pt"
    assert isinstance(torch.load(path, weights_only=True), dict)
    checkpoint = load_checkpoint(path)
    assert checkpoint.vocabulary == VOCABULARY
    assert checkpoint.settings.epochs == 2
    assert checkpoint.recipe == RegionCache.open(made / "cache/tiny").recipe
    assert (checkpoint.state["inputs.feature_scale"] != 1).any()
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.label_vectors_sha256)
    with (made / "runs/tiny/full-s0/history.csv").open() as stream:
        history = list(csv.DictReader(stream))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert list(history[0]) == ["epoch", "learning_rate", "train_loss", "gradient_norm"]


def test_the_report_has_a_row_a_variant_and_a_row_a_label(made: Flow) -> None:
    text = (made / "reports/tiny/tables/results.md").read_text()
    assert "tiny, split drawn/test, 12 images, in percent; seed 0" in text
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
    for path in ("data/tiny/prepared", "data/tiny/detector", "cache/tiny", "runs", "reports"):
        expected, found = (
            {name: content for name, content in flow.bytes(path).items() if name != TIMES}
            for flow in (made, again)
        )
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []


# What is not made again --------------------------------------------------------------------------


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
    assert flow.gmpipe("train").refused(r"regions-00002\.h5.*Run `gmpipe extract --dataset tiny`")
    assert "60 rows, 10 of them extracted now" in flow.ok("extract")
    assert (flow / ".state/times/tiny.csv").read_text().splitlines()[-1].endswith(",10")
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


def test_a_damaged_shard_is_named_and_extracted_again(flow: Flow, made: Flow) -> None:
    path = flow / "cache/tiny/regions-00001.h5"
    path.write_bytes(path.read_bytes()[:3000])
    assert flow.gmpipe("extract").refused(r"regions-00001\.h5.*--replace")
    path.unlink()
    assert "10 of them extracted now" in flow.ok("extract")
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


def test_an_index_older_than_its_shards_is_written_again(flow: Flow, made: Flow) -> None:
    """Left by a run that was killed after its last shard, before the index."""
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


def test_other_settings_are_refused_until_they_may_replace(flow: Flow, made: Flow) -> None:
    other = ("--set", "extract.tiny.regions=3")
    assert flow.gmpipe("extract", *other).refused(r"regions is 4, expected 3.*--replace`")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")
    said = flow.ok("extract", *other, "--replace")
    assert said.count("6 shards (60 rows") == 1
    assert "regions-00000.h5" in said
    assert "60 rows, 60 of them extracted now" in said
    cache = RegionCache.open(flow / "cache/tiny")
    assert cache.regions == 3
    # A run of the other regions is not evaluated on these.
    assert flow.gmpipe("evaluate").refused(
        r"full-s0/checkpoint\.pt.*regions is 4, expected 3.*gmpipe train"
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


def test_compare_trains_what_is_missing_only(flow: Flow) -> None:
    chosen = ("compare", "--variant", "max-pool", "--seed", "0", "--seed", "1")
    before = flow.bytes("runs/tiny/max-pool-s0")
    said = flow.ok(*chosen)
    assert "max-pool-s1: 2 epochs" in said
    assert "max-pool-s0: 2 epochs" not in said
    values = [flow.metrics(f"max-pool-s{seed}")["mAP"] for seed in (0, 1)]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert re.search(rf"^\| max-pool +\| {mean:.1f} ± {spread:.1f} +\|", said, re.MULTILINE)
    with mock.patch("stages.workers.jobs.train", side_effect=AssertionError):
        assert "± " in flow.ok(*chosen)
    assert flow.bytes("runs/tiny/max-pool-s0") == before
    flow.params(train__tiny__epochs=1)
    assert "max-pool-s0: 1 epochs" in flow.ok(*chosen)


# What goes wrong ---------------------------------------------------------------------------------


def test_commands_in_the_wrong_order_say_what_to_run(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    assert flow.gmpipe("prepare").refused("no params.yaml in .*change to that folder")
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
    assert flow.gmpipe("extract").refused("no detector in .*gmpipe detector --dataset tiny")
    assert flow.gmpipe("train").refused("no index of regions.*gmpipe extract --dataset tiny")


def test_an_unknown_data_set_is_named_with_the_nearest(flow: Flow) -> None:
    for command in ("prepare", "detector", "extract", "train", "evaluate", "compare", "report"):
        assert flow.gmpipe(command, "--dataset", "tinny").refused("'tinny'.*`tiny`")


def test_a_deleted_image_is_named_and_drawn_again(flow: Flow, made: Flow) -> None:
    path = flow / "data/tiny/prepared/images/train-00003.png"
    path.unlink()
    assert flow.gmpipe("extract").refused(
        r"1 of 36 images of tiny are missing; the first is 'train-00003'.*gmpipe prepare"
    )
    assert "24 train, 12 test" in flow.ok("prepare")
    assert flow.bytes("data/tiny/prepared") == made.bytes("data/tiny/prepared")
    assert "0 of them extracted now" in flow.ok("extract")


def test_a_changed_image_is_another_recipe(flow: Flow) -> None:
    folder = flow / "data/tiny/prepared/images"
    (folder / "train-00003.png").write_bytes((folder / "train-00004.png").read_bytes())
    assert flow.gmpipe("extract").refused(r"regions-00000\.h5.*--replace")


def test_a_corrupt_manifest_is_named_and_made_again(flow: Flow, made: Flow) -> None:
    path = flow / "data/tiny/prepared/manifest.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    for command in ("detector", "extract", "train", "evaluate"):
        assert flow.gmpipe(command).refused(r"manifest\.parquet is not .*gmpipe prepare")
    flow.ok("prepare")
    assert flow.bytes("data/tiny/prepared") == made.bytes("data/tiny/prepared")


def test_a_truncated_checkpoint_is_named(flow: Flow) -> None:
    path = flow / "runs/tiny/full-s0/checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert flow.gmpipe("evaluate").refused(r"full-s0/checkpoint\.pt is not.*gmpipe train")


def test_damaged_detector_weights_are_named(flow: Flow) -> None:
    path = flow / "data/tiny/detector/weights.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert flow.gmpipe("extract").refused(r"weights\.pt has sha256.*gmpipe detector --dataset tiny")


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
    code = (
        "import sys; from pathlib import Path; from pipeline.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder],
        cwd=flow.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert flow.gmpipe(*command).refused(f"{folder} is being written by another")
        other.communicate()
    assert flow.bytes(folder) == made.bytes(folder)
    if command == ("extract",):
        flow.ok("extract")


def limit_files(size: int) -> None:
    """No file of this process grows over ``size`` bytes: writing more fails as on a full disk.

    Python ignores the signal that would come with it.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_is_said_and_survived(flow: Flow, made: Flow) -> None:
    """Through the installed script: two shards are gone, and there is no room for a whole one."""
    for number in (1, 4):
        (flow / f"cache/tiny/regions-{number:05d}.h5").unlink()
    kept = {n: c for n, c in flow.bytes("cache/tiny").items() if n.endswith(".h5")}
    size = (flow / "cache/tiny/regions-00000.h5").stat().st_size
    for limit in (size // 4, size - 10):
        failed = flow.installed("extract", preexec_fn=lambda limit=limit: limit_files(limit))
        assert failed.refused("no space left on the device.*run the same command again")
        assert {n: c for n, c in flow.bytes("cache/tiny").items() if n.endswith(".h5")} == kept
        assert list(flow.folder.rglob("*.tmp")) == []
    done = flow.installed("extract")
    assert done.code == 0, done.err
    assert "60 rows, 20 of them extracted now" in done.out
    flow.ok("evaluate")
    assert flow.metrics() == made.metrics()


def test_a_full_disk_while_training_is_said_and_survived(flow: Flow, made: Flow) -> None:
    before = flow.bytes("runs/tiny/full-s0")
    failed = flow.installed("train", preexec_fn=lambda: limit_files(5000))
    assert failed.refused("no space left on the device.*run the same command again")
    assert flow.bytes("runs/tiny/full-s0") == before
    flow.ok("train")
    flow.ok("evaluate")
    assert flow.bytes("runs/tiny/full-s0") == made.bytes("runs/tiny/full-s0")


# DVC ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dvc_runs_what_changed_and_no_more(tmp_path: Path) -> None:
    flow = Flow(tmp_path / "checkout")
    flow.folder.mkdir()
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, flow / name)
    (flow / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", flow / ".dvc/config")
    shutil.copytree(ROOT / "pipeline", flow / "pipeline")  # dependencies of stage two
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(tmp_path / "system"),
    }

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=flow.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro() -> list[str]:
        """The stages that ran, by name, without the data set's."""
        return re.findall(r"^Running stage '(\w+)@tiny", run(BIN / "dvc", "repro"), re.MULTILINE)

    run("git", "init", "--quiet")
    only = {"variants": ["max-pool"]}
    flow.params(**only)
    assert repro() == ["prepare", "detector", "extract", "train", "evaluate", "report"]
    assert repro() == ["prepare"]
    flow.params(**only, train__tiny__epochs=1)
    assert repro() == ["prepare", "train", "evaluate", "report"]
    flow.params(**only, train__tiny__epochs=1, extract__tiny__regions=3)
    assert repro() == ["prepare", "extract", "train", "evaluate", "report"]
    assert RegionCache.open(flow / "cache/tiny").regions == 3
    shown = json.loads(run(BIN / "dvc", "metrics", "show", "--json"))[""]["data"]
    assert list(shown) == ["runs/tiny/max-pool-s0/summary.json"]
    assert shown["runs/tiny/max-pool-s0/summary.json"]["data"]["mAP"] == pytest.approx(
        flow.metrics("max-pool-s0")["mAP"]
    )
