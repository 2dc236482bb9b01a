"""The page of labels that are hard to show, of one label, of planted sweeps, on a full disk."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from flows import Flow, full_disk, unrendered
from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import Browser, expect
from reading import Reader
from small import write_params

from pipeline.files import read_bytes
from pipeline.formats.sealed import read_sealed_json
from pipeline.report.sweeps import SweepResults, SweepRun, read_sweep, write_sweep

HARD = ["=1+1", "$5 bill$", "<script>alert(1)</script>", "a|b`c`", "__proto__", "constructor"]
HARD += ["\x1b[31m\0red", "line\nbreak", "-x", "@y", "猫 沙发", "كلب", "कुत्ता", "😀", "</script>"]
HARD += ["_hidden", "a'b\"c", "javascript:alert(1)", "\u202ertl", "mean"]


HASHES = ("fingerprint", "train_sha256", "test_sha256")
"""What says of which regions and labels a run is."""


def with_labels(flow: Flow, labels: Sequence[str]) -> None:
    """Import the regions again with other labels, which are the first ones; train and evaluate."""
    with np.load(flow / "regions.npz") as file:
        arrays = dict(file)
    arrays["labels"], arrays["label_names"] = arrays["labels"][:, : len(labels)], np.array(labels)
    np.savez(flow / "regions.npz", **arrays)
    with np.load(flow / "vectors.npz") as file:
        vectors = file["vectors"][: len(labels)]
    np.savez(flow / "vectors.npz", labels=np.array(labels), vectors=vectors)
    for name in ("cache", "data"):
        shutil.rmtree(flow / name)
    write_params(flow.folder, {"epochs": 1}, variants=["full"])
    flow.ok("import-regions", "regions.npz")
    flow.ok("train")
    flow.ok("evaluate")


@pytest.mark.slow
def test_labels_are_shown_as_they_are(small: Flow, browser: Browser) -> None:
    with_labels(small, HARD)
    said = small.ok("report")
    shown = {re.sub(r"[\x00-\x1f]", lambda m: f"\\x{ord(m[0]):02x}", label) for label in HARD}
    shown = shown - {"\u202ertl"} | {r"\xe2\x80\xaertl"}
    folder = small / "reports/voc2007"
    with (folder / "tables/labels.csv").open(newline="") as stream:
        cells = [row["label"] for row in csv.DictReader(stream)]
    assert cells == [f"'{label}" if label[0] in "=-@" else label for label in HARD]
    assert "\x1b" not in said
    html = (
        MarkdownIt("commonmark").enable("table").render((folder / "tables/results.md").read_text())
    )
    assert "<script" not in html
    for figure in (folder / "figures").glob("*.svg"):
        ElementTree.parse(figure)
    reader = Reader(browser, folder)
    assert set(reader.column("labels-table", 0)) == shown
    options = reader.page.locator("#curve-controls option").all_inner_texts()
    assert len(options) == len(HARD) - 1  # no test image has the last label
    reader.page.locator("#curve-controls select").select_option(label="__proto__")
    assert reader.page.locator("#curve-chart path").count() == 1
    isolated = reader.page.evaluate("['cat', 'كلب'].map(gmpipe.isolated)")
    assert isolated == ["cat", "\u2068كلب\u2069"]
    reader.close()


def test_one_label_has_a_page(small: Flow, browser: Browser) -> None:
    with_labels(small, ["cat"])
    folder = small / "data/voc2007/images"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "000030.png")
    small.ok("report")
    reader = Reader(browser, small / "reports/voc2007")
    assert reader.column("labels-table", 0) == ["cat"]
    assert reader.page.locator(".card img").count() == 1
    expect(reader.page.locator("#gallery-about")).to_contain_text("17 of 18 photographs")
    expect(reader.page.locator("#figure-learning-curves img")).to_be_visible()
    assert reader.page.locator("#figure-co-occurrence").count() == 0
    reader.close()


# Sweeps ------------------------------------------------------------------------------------------


@pytest.fixture
def swept(small: Flow) -> tuple[Flow, Path]:
    """A trained data set with a sweep, which was not made by training."""
    write_params(small.folder, {"epochs": 1}, variants=["full"])
    small.ok("train")
    small.ok("evaluate")
    folder = small / "runs/voc2007/sweeps/optimizer"
    folder.mkdir(parents=True)
    runs = [
        SweepRun(value=value, seed=0, mAP=mean_ap, CF1=1.0, OF1=2.0)
        for value, mean_ap in (("$a$<b>", 40.25), ("=x\x1b", 60.0))
    ]
    metrics = read_sealed_json(small / "runs/voc2007/full-s0/metrics.json")
    same = ("dataset", "split", "variant", *HASHES)
    of = {name: metrics[name] for name in same}
    sweep = SweepResults(setting="optimizer", numeric=False, runs=runs, **of)
    write_sweep(folder / "sweep.json", sweep)
    assert read_sweep(folder / "sweep.json") == sweep
    return small, folder


@pytest.mark.slow
def test_a_sweep_is_drawn_from_its_numbers(swept: tuple[Flow, Path]) -> None:
    flow, folder = swept
    planted = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (folder / "figure.svg").write_text(planted)
    (folder / "figure.png").write_bytes(b"planted")
    (folder / "results.csv").write_text("planted,=1+1")
    flow.ok("report")
    page = flow / "reports/voc2007"
    root = ElementTree.parse(page / "figures/sweep-full-optimizer.svg").getroot()
    assert not any("script" in element.tag for element in root.iter())
    assert {"$a$<b>", r"=x\x1b"} <= {text.strip() for text in root.itertext()}
    with (page / "tables/sweep-full-optimizer.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["value"], row["mAP"]) for row in rows] == [
        ("$a$<b>", "40.25"),
        ("'=x\x1b", "60.0"),
    ]
    assert not any(b"planted" in content for content in flow.bytes("reports").values())


def test_sweeps_of_other_regions_or_labels_are_left_out(swept: tuple[Flow, Path]) -> None:
    """Each of the three differs from the runs in one of `HASHES`."""
    flow, folder = swept
    assert "runs/voc2007/sweeps/optimizer: sound" in flow.ok("verify")
    sweep = read_sweep(folder / "sweep.json")
    others = dict(zip(("optimizer", "schedule", "selection"), HASHES, strict=True))
    for setting, name in others.items():
        other = sweep.model_copy(update={"setting": setting, name: "other"})
        folder.with_name(setting).mkdir(exist_ok=True)
        write_sweep(folder.with_name(setting) / "sweep.json", other)
    with unrendered():
        outcome = flow.gmpipe("report")
    assert outcome.code == 0
    metrics = read_sealed_json(flow / "runs/voc2007/full-s0/metrics.json")
    verified = flow.ok("verify")
    for setting, name in others.items():
        told = rf"sweeps/{setting} .*{name} other.*{metrics[name]}.*`gmpipe sweep`"
        assert re.search(told, outcome.err)
        assert re.search(rf"sweeps/{setting}: out of date: .*`gmpipe sweep`", verified)
    assert not list((flow / "reports/voc2007/figures").glob("sweep-*"))
    for gone in ("cache/voc2007/index.parquet", "data/voc2007/prepared/manifest.parquet"):
        (flow / gone).unlink()  # whose own lines say so
    verified = flow.ok("verify")
    assert all(f"runs/voc2007/sweeps/{setting}: sound" in verified for setting in others)


def test_a_damaged_or_missing_sweep_is_named(swept: tuple[Flow, Path]) -> None:
    flow, folder = swept
    path = folder / "sweep.json"
    whole = read_bytes(path)
    sweep = read_sweep(path)
    other = json.loads(whole)
    for number, damaged in enumerate(
        (
            whole.replace(b"60.0", b"61.0"),
            whole[:-9],
            b"\xff",
            b"[" * 100_000,
            b"{}",
            json.dumps(other["runs"]).encode(),
        )
    ):
        path.write_bytes(damaged)
        refused = flow.gmpipe("report").refused(r"sweeps/optimizer/sweep\.json.*`gmpipe sweep`")
        assert refused, number
    for change in ({"setting": "beta"}, {"dataset": "other"}, {"variant": "max-pool"}):
        write_sweep(path, sweep.model_copy(update=change))
        assert flow.gmpipe("report").refused(r"sweep\.json.*`gmpipe sweep`")
    for change in ({"setting": "../../x"}, {"numeric": True}, {"runs": []}):
        write_sweep(path, sweep.model_copy(update=change))
        assert flow.gmpipe("report").refused(r"sweep\.json is damaged.*`gmpipe sweep`")
    (folder / "sweep.json").rename(folder / "results.csv")
    with unrendered():
        outcome = flow.gmpipe("report")
    assert outcome.code == 0
    assert re.search(r"sweeps/optimizer has no sweep\.json.*`gmpipe sweep`", outcome.err)
    assert not list((flow / "reports/voc2007/figures").glob("sweep-*"))


# A full disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2_000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_a_full_disk_keeps_the_former_page(swept: tuple[Flow, Path], size: int) -> None:
    """At these sizes of a file the assets and the figures can't be written."""
    flow, _ = swept
    with unrendered():
        flow.ok("report")
    before = flow.bytes("reports")
    with full_disk(size):
        outcome = flow.gmpipe("report")
    assert outcome.refused("no space left .*reports/.*voc2007")
    assert flow.bytes("reports") == before
