"""`gmpipe evaluate` with `--scores` and `--average`, and the commands that show what they make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from flows import Flow, unrendered
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from small import no_run_is_made, write_params

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts, read_manifest, write_manifest
from pipeline.formats.sealed import read_sealed_json
from pipeline.shards.failures import Failure, write_failures
from stages.checkout.layout import is_entry_folder

ENTRIES = "runs/voc2007/entries"
TEXT_IDS = pacsv.ConvertOptions(column_types={"image_id": pa.string()})


@pytest.fixture(scope="module")
def beside_made(small_made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """Two runs, and beside them scores of a file and the average; to be read only."""
    folder = tmp_path_factory.mktemp("beside") / "flow"
    flow = Flow(Path(shutil.copytree(small_made.folder, folder)))
    for seed in ("0", "1"):
        flow.ok("train", "--variant", "max-pool", "--seed", seed)
        flow.ok("evaluate", "--variant", "max-pool", "--seed", seed)
    write_params(flow.folder, variants=["max-pool"])
    write_scores(flow)
    flow.ok("evaluate", "--scores", "my scores.csv")
    flow.ok("evaluate", "--average", "max-pool-s0", "--average", "max-pool-s1")
    return flow


@pytest.fixture
def beside(beside_made: Flow, tmp_path: Path) -> Flow:
    """The same, to be changed."""
    return Flow(Path(shutil.copytree(beside_made.folder, tmp_path / "beside")))


def write_scores(flow: Flow, seed: int = 0) -> None:
    manifest = manifest_of(flow)
    scores = np.random.default_rng(seed).random((18, 20))
    columns = dict(zip(manifest.vocabulary, scores.T, strict=True))
    table = pa.table({"image_id": manifest.image_ids("test"), **columns})
    pacsv.write_csv(table, flow / "my scores.csv")


def manifest_of(flow: Flow) -> Manifest:
    return read_manifest(flow / "data/voc2007/prepared/manifest.parquet")


def metrics(flow: Flow, entry: str) -> Any:
    return read_sealed_json(flow / ENTRIES / entry / "metrics.json")


def logits_of(flow: Flow, folder: str) -> np.ndarray:
    return np.array(pq.read_table(flow / folder / "predictions.parquet")["logits"].to_pylist())


def table_row(text: str, name: str) -> list[str]:
    """The cells beside the name in the first table that has such a row."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def mean_ap(truth: np.ndarray, scores: np.ndarray) -> float:
    """By scikit-learn, in percent, over the labels with a positive and without ignored entries."""
    values = [
        average_precision_score(of_label[of_label >= 0], column[of_label >= 0])
        for of_label, column in zip(truth.T, scores.T, strict=True)
        if (of_label == 1).any()
    ]
    return 100 * float(np.mean(values))


# What is measured --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_logistic_regression_on_voc_is_judged_as_by_scikit_learn(
    shared: Path, tmp_path: Path
) -> None:
    """Only the manifest is there: no cache, no detector and no run."""
    with np.load(shared / "data/voc2007-official/regions.npz") as file:
        split, names, coded, ids = (
            file[name] for name in ("split", "label_names", "labels", "image_id")
        )
        whole = file["whole"][:, :384].astype(np.float64)
    labels, test = [str(name) for name in names], split == "test"
    columns: dict[str, Any] = {"image_id": ids[test].astype(str)}
    fitted = np.flatnonzero(~test)[::10]
    for column, label in enumerate(labels):
        model = LogisticRegression(C=1e-3, tol=1e-2).fit(whole[fitted], coded[fitted, column] == 1)
        columns[label] = model.predict_proba(whole[test])[:, 1]
    flow = Flow(tmp_path)
    write_params(flow.folder)
    (flow / "data/voc2007/prepared").mkdir(parents=True)
    lists = [
        pa.array([np.flatnonzero(row == value) for row in coded], pa.list_(pa.int16()))
        for value in (1, 0)  # in the file, 0 is difficult and -1 negative
    ]
    paths, sizes = [f"images/{one}" for one in ids], pa.nulls(len(ids), pa.int32())
    table = pa.table([ids.astype(str), paths, split.astype(str), *lists, sizes, sizes], COLUMNS)
    manifest = Manifest("voc2007", "official", tuple(labels), {}, full_counts(table), table)
    write_manifest(flow / "data/voc2007/prepared/manifest.parquet", manifest)
    pacsv.write_csv(pa.table(columns), flow / "regression.csv")
    mixed = pa.table(dict(reversed(columns.items()))).take(
        np.random.default_rng(0).permutation(4952)
    )
    pq.write_table(mixed, flow / "mixed.parquet")
    for name in ("regression.csv", "mixed.parquet"):
        flow.ok("evaluate", "--scores", name)
    truth = manifest.truth("test")
    scores = np.stack([columns[label] for label in labels], axis=1)
    found = metrics(flow, "regression")
    assert found["mAP"] == pytest.approx(mean_ap(truth, scores), abs=1e-4)
    assert found["mAP"] > 60
    assert metrics(flow, "mixed")["AP"] == found["AP"]
    known = truth.ravel() >= 0
    of1 = 100 * f1_score(truth.ravel()[known], scores.ravel()[known] > 0.5)
    assert found["OF1"] == pytest.approx(of1)


def test_an_average_is_that_of_the_runs_probabilities(beside_made: Flow) -> None:
    runs = [logits_of(beside_made, f"runs/voc2007/max-pool-s{seed}") for seed in (0, 1)]
    mean = np.mean([1 / (1 + np.exp(-logits)) for logits in runs], axis=0)
    averaged = logits_of(beside_made, f"{ENTRIES}/average")
    assert 1 / (1 + np.exp(-averaged)) == pytest.approx(mean, abs=1e-6)
    truth = manifest_of(beside_made).truth("test")
    assert metrics(beside_made, "average")["mAP"] == pytest.approx(mean_ap(truth, mean))
    assert list(metrics(beside_made, "average")["made_of"]) == ["max-pool-s0", "max-pool-s1"]


def test_runs_to_average_are_named_as_runs_list_shows_them(beside: Flow) -> None:
    (beside / "max-pool-s1").mkdir()  # another folder of the name of a run
    folder = "runs/voc2007/max-pool-s0"
    assert f"| {folder} " in beside.ok("runs", "list")
    for named in (folder, str(beside / folder)):
        beside.ok("evaluate", "--average", named, "--average", "max-pool-s1")
    assert list(metrics(beside, "average")["made_of"]) == ["max-pool-s0", "max-pool-s1"]


def test_no_region_wins_in_an_entry(beside_made: Flow) -> None:
    table = pq.read_table(beside_made / ENTRIES / "average/predictions.parquet")
    assert {region for row in table["regions"].to_pylist() for region in row} == {-1}


def test_logits_are_taken_as_they_are(beside: Flow) -> None:
    truth = manifest_of(beside).truth("test")
    table = pacsv.read_csv(beside / "my scores.csv")
    scores = np.stack([np.asarray(column) for column in table.columns[1:]], axis=1)
    said = beside.gmpipe("evaluate", "--scores", "my scores.csv", "--logits", "--name", "taken")
    assert "--logits" in said.err  # for they look like probabilities
    assert logits_of(beside, f"{ENTRIES}/taken") == pytest.approx(scores)
    assert metrics(beside, "taken")["mAP"] == pytest.approx(mean_ap(truth, scores))
    assert metrics(beside, "taken")["OR"] == 100  # all are over 0, so over 0.5


def test_images_without_regions_are_left_out_as_for_runs(beside: Flow) -> None:
    lost, *others = manifest_of(beside).image_ids("test")
    write_failures(beside / "cache/voc2007", [Failure(lost, "x.jpg", "it is broken")])
    table = pacsv.read_csv(beside / "my scores.csv", convert_options=TEXT_IDS)
    pacsv.write_csv(table.filter(pc.not_equal(table["image_id"], lost)), beside / "fewer.csv")
    assert "1 image without regions" in beside.ok("evaluate", "--scores", "fewer.csv")
    assert metrics(beside, "fewer")["left_out"] == 1
    stored = pq.read_table(beside / ENTRIES / "fewer/predictions.parquet")
    assert stored["image_id"].to_pylist() == others
    assert metrics(beside, "fewer")["images"] == len(others)


# What shows it -----------------------------------------------------------------------------------


def test_compare_and_report_show_entries_beside_the_runs(beside: Flow) -> None:
    seeds = ("--seed", "0", "--seed", "1")
    with no_run_is_made():
        tables = beside.ok("compare", *seeds)
    maps = {name: metrics(beside, name)["mAP"] for name in ("my-scores", "average")}
    for name, value in maps.items():
        assert table_row(tables, name)[0] == f"{value:.1f}"
    single = [
        json.loads((beside / f"runs/voc2007/max-pool-s{seed}/metrics.json").read_text())["mAP"]
        for seed in (0, 1)
    ]
    of_difference = tables.split("## Difference from max-pool")[1]
    difference = maps["average"] - np.mean(single)
    assert table_row(of_difference, "average")[0] == f"{difference:+.2f}"
    with unrendered():
        beside.ok("report", "--set", "seeds=[0,1]")
    page = beside / "reports/voc2007"
    rows = (page / "tables/results.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["max-pool", "0"],
        ["max-pool", "1"],
        ["average", ""],
        ["my-scores", ""],
    ]
    overview = (page / "data/overview.js").read_text()
    assert '"variants":["max-pool","average","my-scores"]' in overview
    assert "probabilities in my scores.csv" in overview
    assert (page / "data/scores-2.js").exists()
    assert not (page / "data/regions-2.js").exists()


def test_runs_list_show_and_verify_know_entries(beside: Flow) -> None:
    listed = beside.ok("runs", "list")
    assert table_row(listed, f"{ENTRIES}/average")[0] == f"{metrics(beside, 'average')['mAP']:.1f}"
    assert "average of max-pool-s0, max-pool-s1" in listed
    for named in ("my-scores", f"{ENTRIES}/my-scores", str(beside / ENTRIES / "my-scores")):
        shown = beside.ok("runs", "show", named)
        assert f"{metrics(beside, 'my-scores')['mAP']:.2f}" in shown
        assert metrics(beside, "my-scores")["made_of"]["my scores.csv"] in shown
        assert "sound" in shown
    assert f"{ENTRIES}/average: sound" in beside.ok("verify")
    write_scores(beside, seed=1)
    shutil.rmtree(beside / "runs/voc2007/max-pool-s1")
    verified = beside.ok("verify")
    assert f"{ENTRIES}/my-scores: out of date: my scores.csv" in verified
    assert "gmpipe evaluate --dataset voc2007 --scores 'my scores.csv' --name my-scores" in verified
    assert f"{ENTRIES}/average: sound" in verified
    predictions = beside / ENTRIES / "average/predictions.parquet"
    predictions.write_bytes(predictions.read_bytes()[:-1])
    assert f"{ENTRIES}/average: damaged" in beside.gmpipe("verify").out


def test_entries_are_removed_only_if_that_is_asked_for(beside: Flow) -> None:
    assert "--unlisted" in beside.ok("runs", "prune", "--yes")
    assert (beside / ENTRIES / "average/metrics.json").exists()
    assert f"{ENTRIES}/average" in beside.ok("runs", "prune", "--unlisted")
    beside.ok("runs", "prune", "--unlisted", "--yes")
    assert not (beside / ENTRIES).exists()
    beside.ok("evaluate", "--scores", "my scores.csv")
    beside.ok("clean", "voc2007", "--yes")
    assert not (beside / "runs/voc2007").exists()


def test_an_entry_of_other_labels_or_of_a_variants_name_is_left_out(beside: Flow) -> None:
    write_params(beside.folder, variants=["max-pool"], train={"variants": {"average": {}}})
    runs = ("--variant", "max-pool", "--seed", "0")
    outcome = beside.gmpipe("compare", *runs)
    assert f"{ENTRIES}/average" in outcome.err
    assert "| average" not in outcome.out
    assert "| my-scores" in outcome.out
    beside.ok("prepare", "--set", "prepare.voc2007.difficult.test=negative")
    outcome = beside.gmpipe("compare", *runs)
    assert "`prepare.voc2007.difficult.test` was `ignored`" in outcome.err
    assert "--scores 'my scores.csv' --name my-scores" in outcome.err
    assert "| my-scores" not in outcome.out


def test_an_unfinished_entry_is_left_out(beside: Flow) -> None:
    """A killed command leaves no metrics.json, since that is written last."""
    (beside / ENTRIES / "notes.txt").touch()
    (beside / ENTRIES / "average/metrics.json").unlink()
    outcome = beside.gmpipe("compare", "--seed", "0")
    assert f"{ENTRIES}/average" in outcome.err
    assert "notes.txt" not in outcome.err
    assert "| my-scores" in outcome.out
    (beside / ENTRIES / "my-scores/predictions.parquet").unlink()
    assert "| my-scores" not in beside.ok("compare", "--seed", "0")
    shown = beside.gmpipe("runs", "show", "average")
    assert shown.refused(f"{ENTRIES}/average/metrics.json.*gmpipe evaluate.*delete")


def test_a_run_of_a_data_set_called_entries_is_no_entry() -> None:
    assert is_entry_folder(Path("runs/demo/entries/other"))
    assert not is_entry_folder(Path("runs/entries/full-s0"))


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("--scores", "my scores.csv", "--name", "full"), "'full'"),
        (("--scores", "my scores.csv", "--name", "max-pool-s0"), "'max-pool-s0'"),
        (("--scores", "my scores.csv", "--name", "a/b"), "a-b"),
        (("--scores", "absent.csv"), r"absent\.csv"),
        (("--average", "max-pool-s0"), "two"),
        (("--average", "max-pool-s0", "--average", "max-pool-s0"), "once"),
        (("--average", "max-pool-s0", "--average", "max-pool-s7"), "'max-pool-s7'"),
        (("--average", "max-pool-s0", "--average", "runs/voc2007/max-pool-s0"), "once"),
        (("--average", "max-pool-s0", "--average", "runs/x/full-s0"), "x/full-s0.*runs/voc2007"),
        (("--average", "max-pool-s0", "--average", "my-scores"), "'my-scores'"),
    ],
)
def test_what_can_be_no_entry(beside_made: Flow, words: tuple[str, ...], pattern: str) -> None:
    assert beside_made.gmpipe("evaluate", *words).refused(pattern)


def test_an_entry_of_other_scores_is_not_replaced(beside: Flow) -> None:
    (beside / "other").mkdir()
    shutil.copy(beside / "my scores.csv", beside / "other")
    words = ("evaluate", "--scores", "other/my scores.csv")
    assert beside.gmpipe(*words).refused("'my-scores'.* my scores.csv.*--name")
    two = ("evaluate", "--average", "max-pool-s0", "--average", "max-pool-s1")
    assert beside.gmpipe(*two, "--name", "my-scores").refused("'my-scores'.*--name")
    shutil.copytree(beside / "runs/voc2007/max-pool-s1", beside / "runs/voc2007/max-pool-s2")
    assert beside.gmpipe(*two, "--average", "max-pool-s2").refused("'average'.*max-pool-s1.*--name")
    write_scores(beside, seed=1)  # another content of the same file
    before = metrics(beside, "my-scores")
    beside.ok("evaluate", "--scores", "my scores.csv")
    assert metrics(beside, "my-scores")["made_of"] != before["made_of"]
    beside.ok(*two)


def test_an_entry_has_no_network(beside_made: Flow) -> None:
    outcome = beside_made.gmpipe("export", "--run", "my-scores")
    assert outcome.refused(f"{ENTRIES}/my-scores/checkpoint.pt.*entry")


@pytest.mark.parametrize(
    "words",
    [
        ("--name", "x"),
        ("--logits",),
        ("--scores", "x.csv", "--average", "a"),
        ("--scores", "x.csv", "--variant", "full"),
        ("--scores", "x.csv", "--seed", "0"),
        ("--average", "a", "--set", "seeds=[1]"),
        ("--average", "a", "--average", "b", "--logits"),
    ],
)
def test_options_that_exclude_each_other(beside_made: Flow, words: tuple[str, ...]) -> None:
    outcome = beside_made.gmpipe("evaluate", *words)
    assert outcome.code == 2
    assert "--scores" in outcome.err
