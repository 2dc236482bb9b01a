"""What `gmpipe report` writes into the page's folder; test_page.py opens it in a browser."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flows import VARIANTS, Flow, unrendered
from hypothesis import given
from hypothesis import strategies as st
from reading import data, unpacked
from results import make_evaluation, make_metrics
from small import make_small, write_params

from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.evaluation.bootstrap import intervals
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.paper import PAPER
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import SplitData, open_split
from pipeline.report.figures import COLOURS, average_precision_figure, looks
from pipeline.report.folder import in_steps, packed
from pipeline.report.gallery import (
    chosen_images,
    mean_label_nodes,
    read_regions,
    region_scores,
)
from pipeline.report.rows import columns, own_rows, paper_rows
from pipeline.shards.failures import Failure, write_failures
from pipeline.shards.reader import RegionCache
from stages.checkout.times import StageTime
from stages.report import _times

SHOWN = 5
"""How many images the page in `changed` shows."""


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
def test_a_half_and_the_next_number_are_told_apart(value: float) -> None:
    assert (in_steps(np.array([value], np.float32))[0] > 32767) == (value > 0.5)


def test_arrays_come_back_as_they_were() -> None:
    array = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
    np.testing.assert_array_equal(unpacked(packed(array)), array)
    np.testing.assert_array_equal(unpacked(packed(array.astype(">i2")[:, ::2])), array[:, ::2])


# The gallery -------------------------------------------------------------------------------------


def test_scores_and_winners_are_those_of_the_predictions(made: Flow) -> None:
    checkpoint = load_checkpoint(made / "runs/tiny/full-s0/checkpoint.pt")
    split = split_of(made)
    scorer = Scorer.of_checkpoint(checkpoint, "full-s0")
    assert scorer.batch_size == checkpoint.settings.batch_size
    shown = region_scores(scorer, split)
    table = pq.read_table(made / "runs/tiny/full-s0/predictions.parquet")
    scores = 1 / (1 + np.exp(-np.array(table.column("logits").to_pylist())))
    np.testing.assert_allclose(shown.scores, scores, atol=1e-6)
    np.testing.assert_array_equal(shown.winners, np.array(table.column("regions").to_pylist()))
    # A label's score is that of its best region, if the label is among the region's best ones.
    for image, label in zip(*np.nonzero(scores == scores.max(axis=1, keepdims=True)), strict=True):
        winner = shown.winners[image, label]
        best = shown.region_scores[image, winner] == shown.scores[image, label]
        assert best[0]
        # Several labels may tie, even more than are kept.
        assert best.all() or label in shown.region_labels[image, winner, best]
    assert (np.diff(shown.region_scores, axis=2) <= 0).all()
    real = np.arange(split.regions) < read_regions(split).count[:, None]
    assert (shown.region_scores[~real] == 0).all()


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
    mean = mean_label_nodes(Scorer.of_checkpoint(checkpoint, "full-s0"), split)
    np.testing.assert_allclose(mean, torch.stack(each).mean(0).numpy(), atol=1e-5)


def test_a_sample_is_sorted_and_the_same_each_time() -> None:
    assert chosen_images(5, 5).tolist() == chosen_images(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = chosen_images(100, 20)
    assert some.tolist() == sorted(set(some.tolist())) == chosen_images(100, 20).tolist()
    assert len(some) == 20


# Rows of the table -------------------------------------------------------------------------------


def test_rows_hold_mean_spread_and_intervals() -> None:
    def run(seed: int, value: float) -> Evaluation:
        return make_evaluation(make_metrics(value), seed=seed)

    runs = {"full": [run(0, 80), run(1, 84)], "own": [run(0, 79), run(1, 81)]}
    rng = np.random.default_rng(0)
    truth = (rng.random((60, 3)) < 0.5).astype(np.int8)
    scores = {name: [rng.random(truth.shape) for _ in seeds] for name, seeds in runs.items()}
    spread_over_images = intervals(scores, truth, "full").of
    rows = own_rows(runs, spread_over_images, "full")
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
    assert ends == spread_over_images["full"].ends
    assert "difference" not in rows[0]["cells"]
    assert rows[3]["cells"]["difference"] == [-2, None, spread_over_images["own"].difference]
    assert rows[2]["cells"]["mAP"] == [84, None]
    keys = [column["key"] for column in columns(runs, "full")]
    assert set(keys) == {*rows[0]["cells"], "difference"}
    assert {"CP", "CF1", "top-3 CF1", "top-3 forced OR"} <= set(keys)


@pytest.mark.parametrize("dataset", list(PAPER))
def test_every_row_and_number_of_the_paper_has_its_column(dataset: str) -> None:
    paper = PAPER[dataset]
    runs = {"full": [make_evaluation(make_metrics(1))]}
    keys = {column["key"] for column in columns(runs, "full")}
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
    assert set(overview["groups"]) == {"context", "position", "undrawn", "plain"}
    facts = dict(overview["run"]["facts"])
    assert facts["split"] == "drawn/test"
    assert facts["images of train"] == "24 (listed 24, missing 0, unlabelled 0)"
    assert facts["images left out, since they have no regions"] == "0 of train, 0 of test"
    assert facts["regions made by"] == "a Faster R-CNN fitted on boxes of this data set"
    assert facts["fingerprint of the regions"] == made.metrics()["fingerprint"]
    packages = dict(overview["run"]["packages"])
    assert packages["torch"] == torch.__version__.partition("+")[0]
    settings = "\n".join(overview["run"]["settings"])
    assert re.search(r"latent_size: 8$", settings, re.MULTILINE)
    assert re.search(r"head: max-pool$", settings, re.MULTILINE)
    times = data(made / "reports/tiny", "times")
    assert [row[:2] for row in times if row[0] == "train"] == [
        ["train", "full-s0"],
        ["train", "max-pool-s0"],
    ]
    assert all(re.fullmatch(r"\d+\.\d", row[2]) for row in times)
    assert max(float(row[2]) for row in times) > 0
    assert {row[0] for row in times} == {"prepare", "detector", "extract", "train", "evaluate"}


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


@pytest.fixture(scope="module")
def changed(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A page of `SHOWN` images, after much has happened to the data set and the checkout.

    `train-00003` and `test-00003` have no regions, the photograph of the second image that the page
    shows is gone, and there is no file of times.
    """
    flow = Flow(Path(shutil.copytree(made.folder, tmp_path_factory.mktemp("changed") / "flow")))
    write_failures(
        flow / "cache/tiny",
        [Failure(f"{name}-00003", "x.png", "broken") for name in ("train", "test")],
    )
    flow.ok("evaluate")
    flow.ok("evaluate", "--variant", "max-pool")
    (flow / f"data/tiny/prepared/images/{shown_ids(flow)[1]}.png").unlink()
    shutil.rmtree(flow / ".state")
    with unrendered(), mock.patch("stages.console.progress._PHASE_DELAY", 0):
        done = flow.gmpipe("report", "--images", str(SHOWN))
    assert done.code == 0, done.err
    (flow / "progress.txt").write_text(done.err)
    return flow


def shown_ids(flow: Flow) -> list[str]:
    """The images that the page in `changed` must show: a sample of those that have regions."""
    ids = read_manifest(flow / "data/tiny/prepared/manifest.parquet").image_ids("test")
    ids.remove("test-00003")
    return [ids[index] for index in chosen_images(11, SHOWN)]


def test_of_many_images_a_sample_is_shown(changed: Flow) -> None:
    folder = changed / "reports/tiny"
    about = data(folder, "overview")["gallery"]
    assert (about["images"], about["of"]) == (SHOWN, 11)
    images = data(folder, "images")
    assert images["ids"] == shown_ids(changed)
    assert unpacked(images["truth"]).shape == (SHOWN, len(VOCABULARY))
    assert changed.gmpipe("report", "--images", "0").code == 2


def test_the_progress_names_each_part_and_counts_what_it_has(changed: Flow) -> None:
    text = (changed / "progress.txt").read_text()
    ends = dict(re.findall(r"^(.*): 100% (\d+/\d+) ", text, re.MULTILINE))
    shown = f"{SHOWN}/{SHOWN}"
    assert ends == {
        "read runs": "2/2",
        "read predictions": "2/2",
        "report, intervals": "200/200",  # 100 of each variant, as conftest.py asks for
        "report, map of the labels": shown,
        "report, pictures": shown,
        "report, scores of full": shown,
        "report, scores of max-pool": shown,
    }
    figures = {figure["name"] for figure in data(changed / "reports/tiny", "overview")["figures"]}
    # The one of average precision is not among those of the page.
    assert f"report, figures: {len(figures - {'label-map'}) + 1} figures [" in text


def test_a_photograph_that_is_gone_leaves_its_boxes(changed: Flow) -> None:
    folder = changed / "reports/tiny"
    images = data(folder, "images")
    assert unpacked(images["pictures"]).tolist() == [1, 0, 1, 1, 1]
    assert unpacked(images["sizes"])[1].tolist() == [64, 64]  # as the manifest says
    assert sorted(path.stem for path in (folder / "pictures").iterdir()) == list("0234")
    gone = f"data/tiny/prepared/images/{shown_ids(changed)[1]}.png"
    about = data(folder, "overview")["gallery"]["photographs"]
    assert "data/tiny/prepared/images." in about["origin"]
    assert f"1 of {SHOWN} photographs" in about["problem"]
    assert gone in about["problem"]
    assert gone in (changed / "progress.txt").read_text()  # the command says it, too


def test_photographs_without_regions_are_counted(changed: Flow) -> None:
    facts = dict(data(changed / "reports/tiny", "overview")["run"]["facts"])
    assert facts["images left out, since they have no regions"] == "1 of train, 1 of test"


def test_long_times_have_separators(monkeypatch: pytest.MonkeyPatch) -> None:
    took = StageTime("extract", "", 12345.67, "2026-11-26T12:00:00+00:00", rows=123456)
    monkeypatch.setattr("stages.report.read_times", lambda dataset: [took])
    assert _times("tiny", {}) == [["extract", "123,456 rows", "12,345.7", took.finished]]


def test_without_a_file_of_times_they_are_left_out(changed: Flow) -> None:
    assert data(changed / "reports/tiny", "times") == []


def test_regions_of_other_settings_are_refused(flow: Flow, made: Flow) -> None:
    for name in VARIANTS:
        path = flow / f"runs/tiny/{name}-s0/metrics.json"
        write_sealed_json(path, {**read_sealed_json(path), "fingerprint": "other"})
    fingerprint = made.metrics()["fingerprint"]
    assert flow.gmpipe("report").refused(
        rf"cache/tiny .*{fingerprint}.*full-s0 .*other.*`gmpipe extract --dataset tiny --replace`"
    )
    assert flow.bytes("reports") == made.bytes("reports")


def test_other_labels_than_at_the_evaluation_are_refused(flow: Flow) -> None:
    for name in VARIANTS:
        path = flow / f"runs/tiny/{name}-s0/metrics.json"
        write_sealed_json(path, {**read_sealed_json(path), "test_sha256": "other"})
    assert flow.gmpipe("report").refused(r"manifest\.parquet.*full-s0.*other")


def test_the_learning_curves_are_those_of_the_checkpoint(flow: Flow, made: Flow) -> None:
    (flow / "runs/tiny/full-s0/history.csv").write_text("epoch,train_loss\n1,0.0\n")
    with unrendered():
        flow.ok("report")
    path = "reports/tiny/tables/learning-curves.csv"
    assert (flow / path).read_bytes() == (made / path).read_bytes()


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
    assert "gains-and-losses" not in names  # there is no other variant
    assert "label-map" not in names  # the network has no label nodes
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


def test_the_page_draws_variants_as_the_figures_do() -> None:
    variants = [f"variant {number}" for number in range(9)]
    drawn = looks(variants)
    assert [look["colour"] for look in drawn.values()] == [*COLOURS, *COLOURS[:2]]
    dashes = [look["dash"] for look in drawn.values()]
    assert len(set(dashes[:4])) == 4
    assert dashes[4:8] == dashes[:4]
