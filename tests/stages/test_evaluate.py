"""`gmpipe evaluate` after something has changed since the training, and what the metrics say.

The toy problem has 42 training and 9 test images.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from flows import Flow, being_written
from ruamel.yaml import YAML
from toys import LABELS, N_TEST, N_TRAIN, RECIPE, VECTORS, copied, make_checkout, make_toy

from pipeline.datasets.manifest import COLUMNS, full_counts, read_manifest, write_manifest
from pipeline.learning.losses import compute_loss
from pipeline.shards.failures import Failure, write_failures
from pipeline.shards.index import write_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.shard import whole_shards, write_shard
from stages.checkout import results

RUN = "runs/toy/full-s0"
COMPARE = ("compare", "--seed", "0", "--jobs", "1")
MANIFEST = "data/toy/prepared/manifest.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A run that was trained and evaluated; to be read only."""
    flow = make_checkout(tmp_path_factory.mktemp("made"), epochs=1)
    make_toy(flow / "cache/toy", {**RECIPE, "imported_from": "regions.npz"})
    for command in ("detector", "train", "evaluate"):
        flow.ok(command)
    return flow


@pytest.fixture
def flow(made: Flow, tmp_path: Path) -> Flow:
    """The same, to be changed."""
    return Flow(Path(shutil.copytree(made.folder, tmp_path / "flow")))


@pytest.fixture(scope="module")
def other(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """The same run as another version of the code would train it; to be read only."""
    flow = copied(made, tmp_path_factory.mktemp("other"))
    with mock.patch("pipeline.learning.steps.compute_loss", lambda *x: 2 * compute_loss(*x)):
        flow.ok("train")
    flow.ok("evaluate")
    assert metrics(flow)["mAP"] != metrics(made)["mAP"]
    return flow


def metrics(flow: Flow) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((flow / RUN / "metrics.json").read_text())
    return content


def change_manifest(
    flow: Flow, change: Callable[[list[dict[str, Any]]], object], labels: tuple[str, ...] = LABELS
) -> None:
    path = flow / MANIFEST
    manifest = read_manifest(path)
    rows = manifest.table.to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    about = manifest.dataset, manifest.split_name, labels, manifest.sources
    write_manifest(path, type(manifest)(*about, full_counts(table), table))


def change_params(flow: Flow, block: str, **changes: Any) -> None:
    yaml = YAML()
    raw = yaml.load(flow / "params.yaml")
    raw[block]["toy"].update(changes)
    with (flow / "params.yaml").open("w") as stream:
        yaml.dump(raw, stream)


# What is refused ---------------------------------------------------------------------------------


def move(first: int, number: int, split: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows[first : first + number]:
            row["split"] = split

    return change


def exchange(rows: list[dict[str, Any]]) -> None:
    """Another split, with as many images in both parts."""
    rows[0]["split"], rows[-1]["split"] = "test", "train"


def relabel(row: int, label: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        labels = set(rows[row]["labels"]) ^ {label}
        rows[row]["labels"], rows[row]["ignored"] = sorted(labels), []

    return change


def ignore(rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if row["labels"] == [0])
    row["labels"], row["ignored"] = [], [0]


@pytest.mark.parametrize(
    ("change", "trained_on", "has"),
    [
        (move(0, 9, "test"), 42, 33),
        (move(N_TRAIN, 3, "train"), 42, 45),
        (exchange, 42, 42),
        (relabel(0), 42, 42),
        (relabel(N_TRAIN - 1, 2), 42, 42),
        (ignore, 42, 42),
    ],
    ids=["test-images-trained-on", "more", "exchanged", "label", "last-label", "ignored"],
)
def test_another_training_split_is_refused(
    flow: Flow, change: Callable[[list[dict[str, Any]]], None], trained_on: int, has: int
) -> None:
    before = flow.bytes("runs")
    change_manifest(flow, change)
    assert flow.gmpipe("evaluate").refused(
        rf"{RUN}/checkpoint\.pt .*\b{trained_on} .*\b{has} .*`gmpipe train --dataset toy "
    )
    assert flow.gmpipe("evaluate").refused("has the same images, so their labels or splits differ")
    assert flow.bytes("runs") == before
    assert flow.gmpipe("report").refused(rf"{RUN}.*`gmpipe train --dataset toy ")
    flow.ok("train")
    flow.ok("evaluate")
    assert metrics(flow)["trained_images"] == has


@pytest.mark.parametrize(
    ("block", "changes", "said"),
    [
        ("train", {"learning_rate": 0.01}, r"`learning_rate` was 0\.02, expected 0\.01"),
        ("train", {"loss": {"beta": 0.5}}, r"`loss\.beta` was 0\.0, expected 0\.5"),
        (
            "train",
            {"network": {"latent_size": 4, "neighbors": 2}},
            r"settings: `network\.latent_size` was 8, expected 4\. Run",
        ),
        ("train", {"variants": {"full": {"epochs": 3}}}, r"`epochs` was 1, expected 3"),
        ("extract", {"views": 1}, r"`views` was 2, expected 1"),
    ],
)
def test_other_settings_are_said_as_report_says_them(
    flow: Flow, block: str, changes: dict[str, Any], said: str
) -> None:
    change_params(flow, block, **changes)
    commands = "`gmpipe train --dataset toy .*`gmpipe evaluate --dataset toy "
    errors = []
    for command in ("evaluate", "report"):
        outcome = flow.gmpipe(command)
        assert outcome.refused(f"{RUN} .*{said}.*{commands}")
        errors.append(outcome.err[outcome.err.index("Error: ") :])
    assert errors[0] == errors[1]


def test_other_label_vectors_and_labels_are_refused(flow: Flow) -> None:
    np.savez(flow / "vectors.npz", labels=np.array(LABELS), vectors=2 * VECTORS.vectors)
    train = "`gmpipe train --dataset toy "
    assert flow.gmpipe("evaluate").refused(rf"{RUN}/checkpoint\.pt .*{VECTORS.sha256}.*{train}")
    changed = ("cat", "cow", "owl")
    np.savez(flow / "vectors.npz", labels=np.array(changed), vectors=VECTORS.vectors)
    change_manifest(flow, lambda rows: None, changed)
    outcome = flow.gmpipe("evaluate")
    assert outcome.refused(rf"{RUN}/checkpoint\.pt .*'dog'.*'cow'.*{train}")
    assert "'cat'" not in outcome.err  # both have it


# What is evaluated -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [relabel(N_TRAIN), relabel(N_TRAIN + N_TEST - 1, 1)])
def test_corrected_test_labels_are_evaluated(
    flow: Flow, made: Flow, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    change_manifest(flow, change)
    # Until then, nobody shows the metrics beside the new labels.
    assert flow.gmpipe("report").refused(rf"\btest\b.*{RUN}.*`gmpipe evaluate --dataset toy ")
    before = (flow / RUN / "checkpoint.pt").read_bytes()
    flow.ok("evaluate")
    assert metrics(flow)["test_sha256"] != metrics(made)["test_sha256"]
    assert metrics(flow)["train_sha256"] == metrics(made)["train_sha256"]
    assert {name: metrics(flow)[name] for name in ("mAP", "OF1", "AP")} != {
        name: metrics(made)[name] for name in ("mAP", "OF1", "AP")
    }
    change_manifest(flow, change)  # and back; `compare` evaluates what is out of date
    flow.ok(*COMPARE)
    assert flow.bytes(f"{RUN}/metrics.json") == made.bytes(f"{RUN}/metrics.json")
    assert (flow / RUN / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("validation", "share", "trained_on"), [(0.0, 1.0, 40), (0.25, 1.0, 30), (0.25, 0.5, 15)]
)
def test_the_images_that_were_really_trained_on_are_counted(
    made: Flow, tmp_path: Path, validation: float, share: float, trained_on: int
) -> None:
    """Of 42 training images, two have no regions; of 9 test images, one."""
    flow = copied(made, tmp_path)
    change_params(flow, "train", validation=validation, training_share=share)
    failures = [Failure(f"image-{n}", f"{n}.png", "broken") for n in (3, 5, N_TRAIN)]
    write_failures(flow / "cache/toy", failures)
    flow.ok("train")
    flow.ok("evaluate")
    counted = metrics(flow)
    assert counted["trained_images"] == trained_on
    assert (counted["images"], counted["left_out"]) == (8, 1)
    assert counted["counts"]["train"]["images"] == N_TRAIN
    # One of them is dropped: the same number of others is left, counted in the same way.
    change_manifest(flow, lambda rows: rows.pop(3))
    assert flow.gmpipe("evaluate").refused(
        rf"\b{trained_on} images with .*\b{trained_on} images, .* no longer has 'image-3'\."
    )


# One network's numbers only ----------------------------------------------------------------------


def put(other: Flow, flow: Flow, *names: str) -> None:
    """Replace files of a run by those of the other training."""
    for path in (other / RUN).iterdir():
        if path.name in names or not names:
            shutil.copy(path, flow / RUN)


def test_old_metrics_are_never_shown_beside_a_new_checkpoint(flow: Flow, other: Flow) -> None:
    """A training that is killed before it removes them leaves both."""
    put(other, flow, "checkpoint.pt")
    assert flow.gmpipe("report").refused(rf"{RUN}/metrics\.json .*`gmpipe evaluate --dataset toy ")
    assert re.search(rf"\| {RUN} +\| out of date +\|", flow.ok("runs", "list"))
    said = flow.ok(*COMPARE)
    assert flow.bytes(RUN).keys() == other.bytes(RUN).keys()
    for name in ("checkpoint.pt", "metrics.json", "predictions.parquet", "summary.json"):
        assert (flow / RUN / name).read_bytes() == (other / RUN / name).read_bytes()
    # The first table has the times of trainings, too.
    tables = "## Average precision by label"
    assert said.partition(tables)[2] == other.ok(*COMPARE).partition(tables)[2] != ""


@pytest.mark.parametrize("names", [("metrics.json",), ("predictions.parquet",), ("checkpoint.pt",)])
def test_files_of_two_trainings_do_not_mix(flow: Flow, other: Flow, names: tuple[str]) -> None:
    put(other, flow, *names)
    assert flow.gmpipe("report").refused(rf"{RUN}/.*`gmpipe evaluate --dataset toy ")


@pytest.mark.parametrize("command", [("report",), COMPARE])
@pytest.mark.parametrize("read", ["read_evaluation", "read_checkpoint", "read_logits"])
def test_a_run_that_is_replaced_while_it_is_read_is_refused_or_shown_whole(
    flow: Flow, made: Flow, other: Flow, command: tuple[str, ...], read: str
) -> None:
    """All files of the run are replaced once one of them was read."""
    of = getattr(results, read)

    def read_and_replace(*inputs: Any, **options: Any) -> Any:
        content = of(*inputs, **options)
        put(other, flow)
        return content

    with mock.patch.object(results, read, read_and_replace):
        outcome = flow.gmpipe(*command)
    if (command, read) == (COMPARE, "read_logits"):  # it had read everything
        assert outcome.out == made.ok(*COMPARE)
    else:
        assert outcome.refused(rf"{RUN}/")
        assert not (flow / "reports/toy").exists()


def test_a_training_and_an_evaluation_wait_for_each_other(flow: Flow) -> None:
    before = flow.bytes("runs")
    with being_written(flow / RUN):
        for command in ("train", "evaluate"):
            assert flow.gmpipe(command).refused(RUN)
    assert flow.bytes("runs") == before


# The commit --------------------------------------------------------------------------------------


def git(flow: Flow, *arguments: str) -> str:
    options = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    command = ["git", *options, *arguments]
    done = subprocess.run(command, cwd=flow.folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def marks(flow: Flow) -> tuple[Any, Any]:
    flow.ok("evaluate")
    return metrics(flow)["commit"], metrics(flow)["uncommitted"]


def test_uncommitted_changes_are_marked(flow: Flow, made: Flow) -> None:
    assert (metrics(made)["commit"], metrics(made)["uncommitted"]) == (None, None)
    git(flow, "init", "--quiet")
    assert marks(flow) == (None, None)  # there is no commit yet
    (flow / "code.py").write_text("one = 1\n")
    (flow / "dvc.lock").write_text("schema: '2.0'\n")
    git(flow, "add", "params.yaml", "code.py", "dvc.lock")
    git(flow, "commit", "--quiet", "--message", "all")
    commit = git(flow, "rev-parse", "HEAD")
    assert marks(flow) == (commit, False)  # runs, data and caches are not tracked
    (flow / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")  # as `dvc repro` does
    assert marks(flow) == (commit, False)

    def change() -> None:
        (flow / "code.py").write_text("one = 2\n")

    def stage() -> None:
        git(flow, "add", "code.py")

    def remove() -> None:
        (flow / "code.py").unlink()

    for step in (change, stage, remove):
        step()
        assert marks(flow) == (commit, True)
    flow.ok("report")
    overview = flow / "reports/toy/data/overview.js"
    assert f"{commit} with uncommitted changes" in overview.read_text()
    git(flow, "checkout", "--quiet", "HEAD", "--", "code.py")
    assert marks(flow) == (commit, False)
    with mock.patch.dict("os.environ", PATH=""):  # git is not installed
        assert marks(flow) == (None, None)


def test_the_commit_of_a_checkout_below_its_repository_is_found(flow: Flow, tmp_path: Path) -> None:
    above = Flow(tmp_path)
    (tmp_path / "code.py").write_text("one = 1\n")
    git(above, "init", "--quiet")
    git(above, "add", "code.py")
    git(above, "commit", "--quiet", "--message", "all")
    assert marks(flow) == (git(above, "rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("one = 2\n")
    assert marks(flow)[1] is True


# Sound files of another data set or run ----------------------------------------------------------


def as_other(path: Path) -> None:
    """Make a manifest that of another data set."""
    manifest = read_manifest(path)
    write_manifest(path, dataclasses.replace(manifest, dataset="other"))


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "compare"])
def test_the_manifest_of_another_data_set_is_refused(flow: Flow, command: str) -> None:
    as_other(flow / MANIFEST)
    before = flow.bytes("runs")
    assert flow.gmpipe(command).refused(rf"{MANIFEST}.*'other'.*'toy'.*gmpipe prepare")
    assert flow.bytes("runs") == before


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "compare", "cache verify"])
def test_the_cache_of_another_data_set_is_refused(flow: Flow, command: str) -> None:
    cache = RegionCache.open(flow / "cache/toy")
    rows = cache.gather(np.arange(len(cache)))
    shutil.rmtree(flow / "cache/toy")
    write_shard(flow / "cache/toy/regions-00000.h5", rows, dataset="other", recipe=cache.recipe)
    shards = whole_shards(flow / "cache/toy")
    write_index(flow / "cache/toy", "other", cache.recipe, shards)
    before = flow.bytes("runs")
    assert flow.gmpipe(*command.split()).refused("cache/toy.*'other'.*'toy'")
    assert flow.bytes("runs") == before


def test_the_checkpoint_of_another_run_is_refused(flow: Flow) -> None:
    flow.ok("train", "--seed", "1")
    shutil.copy(flow / "runs/toy/full-s1/checkpoint.pt", flow / RUN / "checkpoint.pt")
    for command in ("evaluate", "report"):
        assert flow.gmpipe(command).refused(rf"{RUN}.*(seed 1|another checkpoint)")
    # Its metrics too: the whole folder was copied.
    flow.ok("evaluate", "--seed", "1")
    shutil.rmtree(flow / RUN)
    shutil.copytree(flow / "runs/toy/full-s1", flow / RUN)
    for command in ("evaluate", "report"):
        assert flow.gmpipe(command).refused(rf"{RUN}/checkpoint\.pt.*'full', seed 1.*gmpipe train")
