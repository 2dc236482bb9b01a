"""The setting `difficult` from `prepare` to the results: what changes with it, and what does not.

The small data set's regions are imported with 12 difficult labels: 8 of training images and 4 of
test images.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from flows import Flow
from region_files import make_lines, write_tsv
from ruamel.yaml import YAML
from sklearn.metrics import average_precision_score
from small import TRAIN, make_small, no_run_is_made
from trees import make_voc

from pipeline.report.facts import what_was_run
from stages.checkout.params import read_request
from stages.report import _read_inputs

RUN = "runs/voc2007/full-s0"
MANIFEST = "data/voc2007/prepared/manifest.parquet"
NAME = "prepare.voc2007.difficult"
COUNTS_AS = {"positive": 1, "negative": -1, "ignored": 0}  # in the coding of the npz
ALONE = ("--jobs", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A run under the default, evaluated; to be read only."""
    flow = make_small(tmp_path_factory.mktemp("made"))
    with np.load(flow / "regions.npz") as stored:
        arrays = dict(stored)
    labels = arrays["labels"]
    labels[labels == 0] = -1
    for first, number in ((0, 8), (TRAIN, 4)):
        for image in range(first, first + number):
            labels[image, (image + 7) % 10] = 0
    np.savez(flow / "regions.npz", **arrays)
    flow.ok("import-regions", "regions.npz")
    flow.ok("train")
    flow.ok("evaluate")
    return flow


@pytest.fixture
def flow(made: Flow, tmp_path: Path) -> Flow:
    """The same, to be changed."""
    return Flow(Path(shutil.copytree(made.folder, tmp_path / "flow")))


def treat(flow: Flow, **treatments: str) -> None:
    """Write other treatments to params.yaml."""
    yaml = YAML()
    raw = yaml.load(flow / "params.yaml")
    raw["prepare"]["voc2007"]["difficult"] = treatments
    with (flow / "params.yaml").open("w") as stream:
        yaml.dump(raw, stream)


def metrics(flow: Flow) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((flow / RUN / "metrics.json").read_text())
    return found


def map_of(flow: Flow, treatment: str) -> float:
    """The mAP of the stored scores under a treatment, from the npz and scikit-learn."""
    logits = np.array(pq.read_table(flow / RUN / "predictions.parquet")["logits"].to_pylist())
    with np.load(flow / "regions.npz") as stored:
        truth = stored["labels"][stored["split"] == "test"]
    truth = np.where(truth == 0, COUNTS_AS[treatment], truth)
    found = []
    for scores, column in zip(logits.T, truth.T, strict=True):
        known = column != 0
        if (column == 1).any():
            found.append(average_precision_score(column[known] == 1, scores[known]))
    return 100 * float(np.mean(found))


# What does not change ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prepare", "import-regions"])
def test_another_treatment_costs_no_region(flow: Flow, command: str) -> None:
    cache, manifest = flow.bytes("cache/voc2007"), flow.bytes(MANIFEST)
    arguments = (command,) if command == "prepare" else (command, "regions.npz")
    treat(flow, train="positive", test="negative")
    said = flow.ok(*arguments)
    assert "0 of them imported now; nothing to import" in said or command == "prepare"
    assert flow.bytes("cache/voc2007") == cache
    changed = flow.bytes(MANIFEST)
    assert changed != manifest
    # Either command leaves what the other one has written, and what it wrote itself.
    for again in (("prepare",), ("import-regions", "regions.npz")):
        written = (flow / MANIFEST).stat().st_mtime_ns
        flow.ok(*again)
        assert flow.bytes(MANIFEST) == changed
        assert (flow / MANIFEST).stat().st_mtime_ns == written
    assert "8 train, 4 test; positive in training, negative in testing" in flow.ok("prepare")
    treat(flow)
    flow.ok(*arguments)
    assert flow.bytes(MANIFEST) == manifest
    assert flow.bytes("cache/voc2007") == cache


def test_a_check_shows_the_labels_as_they_would_count(flow: Flow) -> None:
    before = flow.bytes("data")
    said = flow.ok("prepare", "--check", "--set", f"{NAME}.train=negative")
    assert "negative in training, ignored in testing" in said
    assert flow.bytes("data") == before


def test_regions_of_a_devkit_stay_too(tmp_path: Path) -> None:
    """A TSV's regions are matched to the images of a manifest that `prepare` reads from VOC."""
    flow = Flow(tmp_path)
    blocks = {
        "prepare": {"source": "voc"},
        "detector": {"source": "imported"},
        "extract": {"regions": 3},
        "train": {},
    }
    params = {section: {"voc": block} for section, block in blocks.items()}
    with (tmp_path / "params.yaml").open("w") as stream:
        YAML().dump({"datasets": ["voc"], "variants": ["full"], "seeds": [0], **params}, stream)
    made = tmp_path / "made"
    make_voc(made)
    shutil.move(made, tmp_path / "data/voc")
    lines = make_lines(5)
    ids = ("000001", "000012", "2008_000003", "000004", "000005")
    for line, image_id in zip(lines, ids, strict=True):
        line |= {"image_id": image_id, "width": 20, "height": 10}
        line["boxes"] = line["boxes"] / np.float32(10)
    write_tsv(tmp_path / "a.tsv", lines)
    # An image with a difficult label alone is kept, whatever that counts as.
    labelled = ("--set", "prepare.voc.drop_unlabelled=true")
    treated = ("--set", "prepare.voc.difficult={train: positive, test: negative}")
    assert "2 train (1 unlabelled and left out), 2 test" in flow.ok("prepare", *labelled)
    flow.ok("import-regions", "a.tsv")
    before = flow.bytes("cache/voc") | flow.bytes("data/voc/prepared/boxes.parquet")
    manifest = flow.bytes("data/voc/prepared/manifest.parquet")
    said = flow.ok("prepare", *labelled, *treated)
    assert "2 train (1 unlabelled and left out), 2 test" in said.splitlines()[0]
    assert "`difficult`" in said.splitlines()[0]
    assert flow.ok("prepare", *labelled, *treated).splitlines()[0].endswith(": unchanged")
    assert "nothing to import" in flow.ok("import-regions", "a.tsv")
    assert flow.bytes("cache/voc") | flow.bytes("data/voc/prepared/boxes.parquet") == before
    flow.ok("prepare", *labelled)
    assert flow.bytes("data/voc/prepared/manifest.parquet") == manifest


# What changes ------------------------------------------------------------------------------------


def test_a_run_is_trained_and_evaluated_under_the_protocol(flow: Flow) -> None:
    ignored = metrics(flow)
    assert ignored["difficult"] == {"train": "ignored", "test": "ignored"}
    assert ignored["mAP"] == pytest.approx(map_of(flow, "ignored"), abs=1e-6)
    checkpoint = flow.bytes(f"{RUN}/checkpoint.pt")
    # SSGRL's, and then ML-GCN's.
    for train, test in (("negative", "negative"), ("positive", "ignored")):
        treat(flow, train=train, test=test)
        flow.ok("prepare")
        flow.ok("train")
        flow.ok("evaluate")
        found = metrics(flow)
        assert found["difficult"] == {"train": train, "test": test}
        assert found["mAP"] == pytest.approx(map_of(flow, test), abs=1e-6)
        assert found["fingerprint"] == ignored["fingerprint"]
        assert flow.bytes(f"{RUN}/checkpoint.pt") != checkpoint
    treat(flow)
    flow.ok("prepare")
    flow.ok("train")
    flow.ok("evaluate")
    assert metrics(flow) == {**ignored, "checkpoint_sha256": metrics(flow)["checkpoint_sha256"]}


def test_results_say_the_protocol(flow: Flow) -> None:
    treat(flow, train="positive")
    flow.ok("prepare")
    words = "positive in training, ignored in testing"
    compared = flow.ok("compare", "--variant", "full", "--seed", "0", *ALONE)
    line = compared.split("## Results\n")[1].strip().splitlines()[0]
    assert line.startswith("voc2007, split imported/test, 18 images")
    assert words in line
    # The paper's rows stand beside these, and what differs from it is listed.
    assert re.search(rf"^- Labels: .*{words}", compared, re.MULTILINE)
    with contextlib.chdir(flow.folder):
        page = _read_inputs(read_request(None), ["full"], [0], 1)
    facts = dict(what_was_run(page)["facts"])
    assert facts["difficult labels"] == f"{words} (8 of train, 4 of test)"
    shown = flow.ok("runs", "show", "full-s0")
    assert re.search(rf"^difficult labels +{words}$", shown, re.MULTILINE)


# An old run meets new labels ---------------------------------------------------------------------


def test_a_run_of_another_protocol_is_refused_with_the_setting(flow: Flow) -> None:
    before = flow.bytes("runs")
    treat(flow, train="negative")
    flow.ok("prepare")
    changed = rf"`{NAME}\.train` was `ignored` and is `negative` now"
    assert flow.gmpipe("evaluate").refused(
        rf"{RUN}/checkpoint\.pt .*{MANIFEST}.*{changed}.*`gmpipe train --dataset voc2007 .*"
        r"`gmpipe prepare --dataset voc2007`"
    )
    report = ("report", "--set", "variants=[full]")
    assert flow.gmpipe(*report).refused(rf"\btrain\b.*{RUN}.*{changed}.*`gmpipe train ")
    assert re.search(rf"checkpoint\.pt: out of date.*{changed}", flow.gmpipe("verify").out)
    assert flow.bytes("runs") == before
    treat(flow)
    flow.ok("prepare")
    with no_run_is_made():
        flow.ok("compare", "--variant", "full", "--seed", "0")


def test_other_test_labels_need_no_training(flow: Flow) -> None:
    checkpoint = flow.bytes(f"{RUN}/checkpoint.pt")
    treat(flow, test="positive")
    flow.ok("prepare")
    changed = rf"`{NAME}\.test` was `ignored` and is `positive` now"
    report = ("report", "--set", "variants=[full]")
    assert flow.gmpipe(*report).refused(rf"\btest\b.*{RUN}.*{changed}.*`gmpipe evaluate ")
    assert re.search(rf"metrics\.json: out of date.*{changed}", flow.gmpipe("verify").out)
    flow.ok("compare", "--variant", "full", "--seed", "0", *ALONE)
    assert metrics(flow)["difficult"] == {"train": "ignored", "test": "positive"}
    assert metrics(flow)["mAP"] == pytest.approx(map_of(flow, "positive"), abs=1e-6)
    assert flow.bytes(f"{RUN}/checkpoint.pt") == checkpoint


def test_other_labels_are_not_taken_for_a_treatment(flow: Flow) -> None:
    with np.load(flow / "regions.npz") as stored:
        arrays = dict(stored)
    arrays["labels"][9] *= -1
    np.savez(flow / "regions.npz", **arrays)
    treat(flow, train="negative")
    flow.ok("import-regions", "regions.npz")
    outcome = flow.gmpipe("evaluate")
    assert outcome.refused(rf"{RUN}/checkpoint\.pt .*`gmpipe train ")
    assert NAME not in outcome.err[outcome.err.index("Error: ") :]


def test_runs_of_two_protocols_are_not_compared(flow: Flow) -> None:
    treat(flow, train="positive")
    flow.ok("prepare")
    flow.ok("train", "--variant", "max-pool")
    flow.ok("evaluate", "--variant", "max-pool")
    assert flow.gmpipe("report").refused(
        "max-pool-s0 .*full-s0 .*positive in training, ignored in testing.*"
        "ignored in training and testing"
    )


def test_a_setting_that_was_not_prepared_is_noted(flow: Flow) -> None:
    assert NAME not in flow.gmpipe("evaluate").err
    treat(flow, train="positive")
    noted = flow.gmpipe("evaluate").err
    assert f"`{NAME}`" in noted
    assert "train ignored (params.yaml: positive)" in noted
    assert "`gmpipe prepare --dataset voc2007`" in noted
    assert metrics(flow)["difficult"]["train"] == "ignored"
    flow.ok("prepare")
    assert f"{MANIFEST} was made" not in flow.gmpipe("train").err
    # Asked for on the command line, as in `prepare`.
    treat(flow)
    assert f"{MANIFEST} was made" not in flow.gmpipe("train", "--set", f"{NAME}.train=positive").err


def test_a_setting_without_difficult_labels_is_noted(flow: Flow) -> None:
    with np.load(flow / "regions.npz") as stored:
        arrays = dict(stored)
    arrays["labels"][arrays["labels"] == 0] = -1
    np.savez(flow / "regions.npz", **arrays)
    flow.ok("import-regions", "regions.npz")
    assert NAME not in flow.ok("prepare")
    treat(flow, test="negative")
    assert f"`{NAME}`" in flow.ok("prepare")
    flow.ok("train")
    flow.ok("evaluate")
    assert "difficult" not in metrics(flow)
