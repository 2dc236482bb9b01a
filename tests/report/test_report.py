"""What `gmpipe report` puts into the page's folder; test_page.py looks at it in a browser."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flows import Flow
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pipeline.report.page import in_steps, packed
from small import make_small, write_params

from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.evaluation.bootstrap import intervals
from pipeline.evaluation.paper import PAPER
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import SplitData, open_split
from pipeline.report.figures import COLOURS, average_precision_figure
from pipeline.report.gallery import (
    LONGEST_SIDE,
    chosen_places,
    mean_label_nodes,
    read_regions,
    region_scores,
    write_pictures,
)
from pipeline.report.rows import columns, own_rows, paper_rows
from pipeline.shards.failures import Failure, write_failures
from pipeline.shards.reader import RegionCache

NUMBERS = (*(f"all {n}" for n in ("CP", "CF1")), "top3 CF1", "top3_forced OR")


def data(folder: Path, name: str) -> Any:
    """What a script in data/ hands to the page."""
    text = (folder / f"data/{name}.js").read_text()
    match = re.fullmatch(rf'gmpipe\.receive\("{name}",(.*)\);\n', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def unpacked(value: dict[str, Any]) -> np.ndarray:
    """As the page reads an array."""
    content = base64.b64decode(value["base64"])
    return np.frombuffer(content, np.dtype(value["type"]).newbyteorder("<")).reshape(value["shape"])


def split_of(flow: Flow) -> SplitData:
    cache = RegionCache.open(flow / "cache/tiny")
    manifest = read_manifest(flow / "data/tiny/prepared/manifest.parquet")
    return open_split(cache, manifest, "test")


# Arrays ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_probabilities_travel_without_crossing_a_half(values: list[float]) -> None:
    probabilities = np.array(values, dtype=np.float32)
    steps = in_steps(probabilities)
    np.testing.assert_allclose(steps / 65534, probabilities, atol=1 / 65534)
    np.testing.assert_array_equal(steps > 32767, probabilities > 0.5)


@pytest.mark.parametrize("value", [0.5, np.nextafter(np.float32(0.5), np.float32(1))])
def test_a_half_and_what_follows_it_are_told_apart(value: float) -> None:
    assert (in_steps(np.array([value], np.float32))[0] > 32767) == (value > 0.5)


def test_arrays_come_back_as_they_were() -> None:
    array = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
    np.testing.assert_array_equal(unpacked(packed(array)), array)
    np.testing.assert_array_equal(unpacked(packed(array.astype(">i2")[:, ::2])), array[:, ::2])


# The gallery -------------------------------------------------------------------------------------


def test_scores_and_winners_are_those_of_the_predictions(made: Flow) -> None:
    checkpoint = load_checkpoint(made / "runs/tiny/full-s0/checkpoint.pt")
    network, split = checkpoint.network(), split_of(made)
    found = region_scores(network, split, checkpoint.label_vectors)
    table = pq.read_table(made / "runs/tiny/full-s0/predictions.parquet")
    scores = np.array(table.column("scores").to_pylist())
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    np.testing.assert_array_equal(found.winners, np.array(table.column("regions").to_pylist()))
    # A label's score is that of its best region: where that has it among its best labels, too.
    for image, label in zip(*np.nonzero(scores == scores.max(axis=1, keepdims=True)), strict=True):
        winner = found.winners[image, label]
        assert found.region_labels[image, winner, 0] == label
        assert found.region_scores[image, winner, 0] == found.scores[image, label]
    assert (np.diff(found.region_scores, axis=2) <= 0).all()
    real = np.arange(split.regions) < read_regions(split).count[:, None]
    assert (found.region_scores[~real] == 0).all()


def test_label_nodes_are_the_mean_over_the_images(made: Flow) -> None:
    checkpoint = load_checkpoint(made / "runs/tiny/full-s0/checkpoint.pt")
    network, split = checkpoint.network(), split_of(made)
    with torch.inference_mode():
        each = [
            network.label_nodes(  # type: ignore[union-attr]
                split.instances(np.array([image])).to(torch.device("cpu"), torch.float32),
                checkpoint.label_vectors,
            )[0]
            for image in range(len(split))
        ]
    found = mean_label_nodes(network, split, checkpoint.label_vectors)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, torch.stack(each).mean(0).numpy(), atol=1e-5)


def test_a_sample_is_sorted_and_the_same_each_time() -> None:
    assert chosen_places(5, 5).tolist() == chosen_places(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = chosen_places(100, 20)
    assert some.tolist() == sorted(set(some.tolist())) == chosen_places(100, 20).tolist()
    assert len(some) == 20


def test_pictures_are_small_upright_and_only_of_what_can_be_read(tmp_path: Path) -> None:
    wide, turned, broken, missing = (tmp_path / f"{n}.jpg" for n in range(4))
    Image.new("RGB", (1000, 500), "red").save(wide)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (60, 30), "red").save(turned, exif=exif)
    broken.write_bytes(wide.read_bytes()[:300])
    seen: list[int] = []
    sizes = write_pictures(
        [wide, turned, broken, missing], tmp_path / "pictures", threads=2, on_images=seen.append
    )
    assert sizes.tolist() == [[LONGEST_SIDE, LONGEST_SIDE // 2], [30, 60], [0, 0], [0, 0]]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0.jpg", "1.jpg"]
    for place in (0, 1):
        with Image.open(tmp_path / f"pictures/{place}.jpg") as picture:
            assert picture.size == tuple(sizes[place])
    assert sum(seen) == 4


# Rows of the table -------------------------------------------------------------------------------


def test_rows_hold_mean_spread_and_intervals() -> None:
    six = dict.fromkeys(("CP", "CR", "CF1", "OP", "OR", "OF1"), 1.0)

    def run(seed: int, value: float) -> dict[str, Any]:
        return {"seed": seed, "mAP": value, **six, "top3": six, "top3_forced": six}

    runs = {"full": [run(0, 80), run(1, 84)], "own": [run(0, 79), run(1, 81)]}
    rng = np.random.default_rng(0)
    truth = (rng.random((60, 3)) < 0.5).astype(np.int8)
    scores = {name: [rng.random(truth.shape) for _ in of] for name, of in runs.items()}
    found = intervals(scores, truth, "full")
    rows = own_rows(runs, found, "full")
    assert [(row["kind"], row["name"], row["of"]) for row in rows] == [
        ("variant", "full", "full"),
        ("seed", "seed 0", "full"),
        ("seed", "seed 1", "full"),
        ("variant", "own", "own"),
        ("seed", "seed 0", "own"),
        ("seed", "seed 1", "own"),
    ]
    mean, spread, ends = rows[0]["cells"]["mAP"]
    assert (mean, spread) == (82, pytest.approx(8**0.5))
    assert ends == found["full"].ends
    assert "difference" not in rows[0]["cells"]
    assert rows[3]["cells"]["difference"] == [-2, None, found["own"].difference]
    assert rows[2]["cells"]["mAP"] == [84, None]
    keys = [column["key"] for column in columns(runs, "full")]
    assert set(keys) == {*rows[0]["cells"], "difference"}
    assert set(NUMBERS) <= set(keys)


@pytest.mark.parametrize("dataset", list(PAPER))
def test_every_row_and_number_of_the_paper_has_its_place(dataset: str) -> None:
    paper = PAPER[dataset]
    six = dict.fromkeys(("CP", "CR", "CF1", "OP", "OR", "OF1"), 1.0)
    keys = {
        column["key"]
        for column in columns(
            {"full": [{"mAP": 1, **six, "top3": six, "top3_forced": six}]}, "full"
        )
    }
    rows = {row["name"]: row["cells"] for row in paper_rows(paper)}
    assert set(rows) == {method for table in paper.tables for method in table}
    for table in paper.tables:
        for method, numbers in table.items():
            assert set(rows[method]) <= keys
            shown = sorted(value for value, _ in rows[method].values())
            printed = {v for name, v in numbers.items() if v is not None and name in paper.columns}
            assert printed <= set(shown)


# The folder --------------------------------------------------------------------------------------


def test_the_page_holds_what_was_run(made: Flow) -> None:
    overview = data(made / "reports/tiny", "overview")
    assert overview["labels"] == list(VOCABULARY)
    assert set(overview["groups"].values()) == {"context", "position", "undrawn", "plain"}
    facts = dict(overview["run"]["facts"])
    assert facts["split"] == "drawn/test"
    assert facts["images of train"] == "24 (listed 24, missing 0, unlabelled 0)"
    assert facts["left out of these, without regions"] == "0 of train, 0 of test"
    assert facts["regions by"] == "a Faster R-CNN fitted on boxes of this data set"
    assert facts["fingerprint of the regions"] == made.metrics()["fingerprint"]
    packages = dict(overview["run"]["packages"])
    assert packages["torch"] == torch.__version__.partition("+")[0]
    settings = overview["run"]["settings"]
    assert re.search(r"latent_size: 8$", settings, re.MULTILINE)
    assert re.search(r"architecture: max-pool$", settings, re.MULTILINE)
    times = data(made / "reports/tiny", "times")
    assert [row[:2] for row in times if row[0] == "train"] == [
        ["train", "full-s0"],
        ["train", "max-pool-s0"],
    ]
    assert all(float(row[2]) > 0 for row in times)
    assert {row[0] for row in times} == {"prepare", "detector", "extract", "train", "evaluate"}


def test_without_a_file_of_times_they_are_left_out(flow: Flow) -> None:
    shutil.rmtree(flow / ".state")
    flow.ok("report")
    assert data(flow / "reports/tiny", "times") == []


def test_tables_hold_the_numbers_of_the_figures(made: Flow) -> None:
    folder = made / "reports/tiny"

    def rows(name: str) -> list[dict[str, str]]:
        with (folder / f"tables/{name}.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    ap = {name: made.metrics(f"{name}-s0")["AP"] for name in ("full", "max-pool")}
    for row in rows("gains-and-losses"):
        expected = ap["max-pool"][row["label"]] - ap["full"][row["label"]]
        assert float(row["difference"]) == pytest.approx(expected)
    with (made / "runs/tiny/full-s0/history.csv").open(newline="") as stream:
        history = [float(row["train_loss"]) for row in csv.DictReader(stream)]
    curve = [float(r["train_loss"]) for r in rows("learning-curves") if r["variant"] == "full"]
    assert curve == history
    entries = [int(row["entries"]) for row in rows("calibration") if row["variant"] == "full"]
    assert sum(entries) == 12 * len(VOCABULARY)
    assert len(rows("co-occurrence")) == len(VOCABULARY) * (len(VOCABULARY) - 1)
    assert len(rows("label-map")) == 2 * len(VOCABULARY)


def test_of_many_images_a_sample_is_shown(flow: Flow) -> None:
    flow.ok("report", "--images", "5")
    folder = flow / "reports/tiny"
    about = data(folder, "overview")["gallery"]
    assert (about["images"], about["of"], about["pictures"]) == (5, 12, 5)
    images = data(folder, "images")
    ids = read_manifest(flow / "data/tiny/prepared/manifest.parquet").image_ids("test")
    assert images["ids"] == [ids[place] for place in chosen_places(12, 5)]
    assert unpacked(images["truth"]).shape == (5, len(VOCABULARY))
    assert len(list((folder / "pictures").iterdir())) == 5
    assert flow.gmpipe("report", "--images", "0").code == 2


def test_a_photograph_that_is_gone_leaves_its_boxes(flow: Flow) -> None:
    (flow / "data/tiny/prepared/images/test-00003.png").unlink()
    flow.ok("report")
    images = data(flow / "reports/tiny", "images")
    there = unpacked(images["pictures"])
    assert there.tolist() == [1, 1, 1, 0, *[1] * 8]
    assert unpacked(images["sizes"])[3].tolist() == [64, 64]  # as the manifest says
    assert not (flow / "reports/tiny/pictures/3.jpg").exists()


def test_photographs_that_were_left_out_are_counted(flow: Flow) -> None:
    write_failures(
        flow / "cache/tiny",
        [Failure(f"{name}-00003", "x.png", "broken") for name in ("train", "test")],
    )
    flow.ok("evaluate")
    flow.ok("evaluate", "--variant", "max-pool")
    flow.ok("report")
    overview = data(flow / "reports/tiny", "overview")
    facts = dict(overview["run"]["facts"])
    assert facts["left out of these, without regions"] == "1 of train, 1 of test"
    assert (overview["gallery"]["images"], overview["gallery"]["of"]) == (11, 11)


def test_regions_of_other_settings_are_refused(flow: Flow, made: Flow) -> None:
    flow.ok("extract", "--set", "extract.tiny.regions=3", "--replace")
    assert flow.gmpipe("report").refused(
        r"cache/tiny has the fingerprint .*full-s0 was made from .*gmpipe extract --dataset tiny"
    )
    assert flow.bytes("reports") == made.bytes("reports")


def test_a_damaged_history_is_named(flow: Flow) -> None:
    (flow / "runs/tiny/full-s0/history.csv").write_text("epoch,train_loss\n1,x\n")
    assert flow.gmpipe("report").refused(r"full-s0/history\.csv can't be read.*train and evaluate")


def test_one_variant_alone_and_fewer_regions_than_the_cache_has(tmp_path: Path) -> None:
    flow = make_small(tmp_path / "small")
    write_params(flow.folder, {"regions": 2}, variants=["max-pool"])
    flow.ok("train", "--variant", "max-pool")
    flow.ok("evaluate", "--variant", "max-pool")
    flow.ok("report")
    folder = flow / "reports/voc2007"
    overview = data(folder, "overview")
    assert overview["base"] == "max-pool"
    names = {figure["name"] for figure in overview["figures"]}
    assert "gains-and-losses" not in names  # there is nothing to hold it against
    assert "label-map" not in names  # it has no label nodes
    assert unpacked(data(folder, "regions-0")["labels"]).shape[:2] == (18, 2)
    assert unpacked(data(folder, "images")["boxes"]).shape == (18, 3, 4)
    assert overview["gallery"]["classes"] is None  # the regions are imported


# Figures -----------------------------------------------------------------------------------------


def test_figures_are_the_same_bytes_and_follow_the_reader(tmp_path: Path) -> None:
    ap = {
        name: {f"label {n}": 50.0 + n for n in range(6)}
        for name in ("full", *(f"variant {n}" for n in range(len(COLOURS) + 2)))
    }
    for name in ("one", "two"):
        average_precision_figure(tmp_path / name, ap, dict.fromkeys(ap["full"], 2.0))
    for suffix in (".svg", ".png"):
        one, two = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("one", "two"))
        assert one == two
    svg = (tmp_path / "one.svg").read_text()
    assert "prefers-color-scheme: dark" in svg
    assert ">label 3<" in svg  # text is text
