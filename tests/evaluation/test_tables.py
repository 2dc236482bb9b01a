"""The tables that people read: what their cells say, and that they are Markdown."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from results import make_evaluation, make_metrics, make_six

from pipeline.evaluation.metrics import Evaluation, Metrics
from pipeline.evaluation.paper import PAPER
from pipeline.evaluation.runs import Run
from pipeline.evaluation.tables import (
    caption,
    default_base,
    differences_table,
    labels_csv,
    labels_table,
    paper_table,
    results_csv,
    results_table,
    sweep_table,
)
from pipeline.settings import TrainSettings


def run(value: float, **ap: float | None) -> Evaluation:
    """A run with headline numbers that can be told apart, and AP by label."""
    return make_evaluation(make_metrics(value, ap))


def made(*values: float, parameters: int = 1) -> list[Run]:
    """A variant's runs, one for each value."""
    return [
        Run(
            name=f"{value}",
            settings=TrainSettings(),
            views=1,
            recipe={},
            history=[],
            parameters=parameters,
            evaluation=run(value),
            checkpoint=Path("unread"),
            predictions=Path("unread"),
        )
        for value in values
    ]


def cells(table: str) -> list[list[str]]:
    """The rows of a table, which is checked to be Markdown."""
    header, rule, *rows = table.splitlines()
    assert set(rule) == {"|", "-"}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    assert all(line.startswith("|") and line.endswith("|") for line in table.splitlines())
    assert {len(line) for line in lines} == {rule.count("|") - 1}
    return lines


def test_one_seed_is_a_number() -> None:
    runs = {"full": made(50.04, parameters=1_234_567), "max-pool": made(7)}
    table = results_table(runs)
    assert cells(table) == [
        ["variant", "mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1", "parameters"],
        ["full", "50.0", "51.0", "52.0", "53.0", "54.0", "1,234,567"],
        ["max-pool", "7.0", "8.0", "9.0", "10.0", "11.0", "1"],
    ]


def test_several_seeds_are_mean_and_sample_standard_deviation() -> None:
    # 10, 12, 17: mean 13; deviations -3, -1, 4; (9 + 1 + 16) / (3 - 1) = 13, root 3.606.
    table = results_table({"full": made(10, 12, 17)})
    assert cells(table)[1][:3] == ["full", "13.0 ± 3.6", "14.0 ± 3.6"]


def test_the_training_time_is_the_mean_over_the_seeds_where_it_is_known() -> None:
    runs = {"full": made(10, 12), "max-pool": made(1, 2), "mine": made(3, 4)}
    seconds = {"full": [1.0, 2.5], "max-pool": [None, None], "mine": [None, 7.25]}
    table = cells(results_table(runs, seconds))
    assert [row[-1] for row in table] == ["training, s", "1.8", "-", "7.2"]
    assert [row[:-1] for row in table] == cells(results_table(runs))


def test_the_base_is_full_or_else_the_first_variant() -> None:
    assert default_base(["max-pool", "full"]) == "full"
    assert default_base(["mine", "max-pool"]) == "mine"


def test_a_label_without_a_positive_has_a_dash() -> None:
    runs = {
        "full": [run(1, sun=80, moon=None), run(1, sun=90, moon=None)],
        "max-pool": [run(1, sun=60, moon=30), run(1, sun=62, moon=None)],
    }
    # 80, 90: mean 85, deviation 5 * root 2. 60, 62: 61, root 2. A single value has no spread.
    assert cells(labels_table(runs, None, {}, [1234, 0])) == [
        ["label", "full", "max-pool", "positives"],
        ["sun", "85.0 ± 7.1", "61.0 ± 1.4", "1,234"],
        ["moon", "-", "30.0", "0"],
    ]


def test_groups_have_a_mean_over_the_labels_with_a_positive() -> None:
    seeds = [run(1, a=10, b=20, c=None, d=None), run(1, a=30, b=60, c=None, d=None)]
    # Means of the first group by seed: 15 and 45; mean 30, deviation 15 * root 2.
    groups = {"one": ["b", "a"], "two": ["c", "d"]}
    assert cells(labels_table({"full": seeds}, groups, {}, [20, 19, 0, 0])) == [
        ["group", "label", "full", "positives"],
        ["one", "b", "40.0 ± 28.3", "19 (few)"],
        ["one", "a", "20.0 ± 14.1", "20"],
        ["one", "mean", "30.0 ± 21.2", ""],
        ["two", "c", "-", "0"],
        ["two", "d", "-", "0"],
        ["two", "mean", "-", ""],
    ]


def test_names_that_look_like_numbers_stay_as_they_are() -> None:
    table = labels_table({"full": [run(1, **{"007": 5.0})]}, {"1e3": ["007"]}, {}, [50])
    assert cells(table)[1:] == [["1e3", "007", "5.0", "50"], ["1e3", "mean", "5.0", ""]]


def test_a_difference_has_its_sign_and_interval() -> None:
    table = differences_table({"max-pool": (-1.234, -2.0, 0.5), "mine": (0.004, 0.0, 12.25)}, "hcp")
    assert cells(table) == [
        ["variant", "mAP - hcp", "95 % interval"],
        ["max-pool", "-1.23", "-2.00 to +0.50"],
        ["mine", "+0.00", "+0.00 to +12.25"],
    ]


def test_a_sweep_has_one_row_per_value() -> None:
    runs = {"2": [run(10), run(12)], "4": [run(11)]}
    assert cells(sweep_table("regions", runs, {})) == [
        ["regions", "mAP", "CF1", "OF1"],
        ["2", "11.0 ± 1.4", "12.0 ± 1.4", "13.0 ± 1.4"],
        ["4", "11.0", "12.0", "13.0"],
    ]
    validation = {"2": [20.0, 21.0], "4": [30.0]}
    assert cells(sweep_table("regions", runs, validation, ["4"])) == [
        ["regions", "validation mAP", "test mAP", "test CF1", "test OF1"],
        ["2", "20.5 ± 0.7", "11.0 ± 1.4", "12.0 ± 1.4", "13.0 ± 1.4"],
        ["4", "30.0 (best)", "11.0", "12.0", "13.0"],
    ]


def test_our_rows_stand_above_the_papers() -> None:
    runs = {"max-pool": [run(50)], "full": [run(60), run(61)], "cma": [run(7)]}
    assert cells(paper_table(runs, PAPER["nuswide"])) == [
        ["method", "of", "mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1"],
        ["CNN-RNN", "paper", "56.1", "-", "-", "34.7", "55.2"],
        ["SRN", "paper", "61.8", "56.9", "73.2", "47.7", "62.2"],
        ["MLIC-KD-WSD", "not reproduced", *["-"] * 5],
        ["MLIC-KD-WSD", "paper", "60.1", "58.7", "73.7", "53.8", "71.1"],
        ["PLA", "paper", "-", "56.2", "-", "-", "72.3"],
        ["CMA", "ours: cma", "7.0", "8.0", "9.0", "10.0", "11.0"],
        ["CMA", "paper", "61.4", "60.5", "73.7", "55.5", "70.0"],
        [
            "GM-MLIC",
            "ours: full",
            "60.5 ± 0.7",
            "61.5 ± 0.7",
            "62.5 ± 0.7",
            "63.5 ± 0.7",
            "64.5 ± 0.7",
        ],
        ["GM-MLIC", "paper", "62.2", "61.0", "74.1", "55.3", "72.5"],
    ]


def test_both_of_our_variants_of_a_method_stand_above_its_row() -> None:
    runs = {"ml-gcn": [run(50)], "ml-gcn-published": [run(60)]}
    rows = cells(paper_table(runs, PAPER["voc2007"]))
    assert [row for row in rows if row[0] == "ML-GCN"] == [
        ["ML-GCN", "ours: ml-gcn", "50.0"],
        ["ML-GCN", "ours: ml-gcn-published", "60.0"],
        ["ML-GCN", "paper", "93.1"],
    ]
    assert ["TSGCN", "not reproduced", "-"] in rows


def test_ablations_stand_beside_the_papers_and_unknown_cells_are_dashes() -> None:
    numbers = make_six(7.0, CR=7.0, CF1=7.0, OP=7.0, OR=7.0, OF1=7.0)
    ours = make_evaluation(Metrics(70.0, numbers, numbers, numbers, {}))
    header, *rows = cells(paper_table({"without-label-graph": [ours]}, PAPER["coco"]))
    assert header[2:6] == ["mAP", "CP", "CR", "CF1"]
    of_ablations = rows[-4:]
    assert [row[:2] for row in of_ablations] == [
        ["w/o G^l", "ours: without-label-graph"],
        ["w/o G^l", "paper"],
        ["w/o G^o", "paper"],
        ["w/o ILM edges", "paper"],
    ]
    assert of_ablations[0][2:] == ["70.0", *["7.0"] * 12]
    assert of_ablations[1][2:] == ["81.7", "85.1", "68.3", "76.5", *["-"] * 9]


def test_the_papers_ap_has_a_column_of_its_own() -> None:
    runs = {"full": [run(1, a=10.0, b=20.0)]}
    assert cells(labels_table(runs, None, {"a": 99.4}, [50, 60])) == [
        ["label", "full", "paper", "positives"],
        ["a", "10.0", "99.4", "50"],
        ["b", "20.0", "-", "60"],
    ]
    groups = {"g": ["a", "b"], "h": ["of no image of this data set"]}
    table = labels_table(runs, groups, {"a": 90.0, "b": 95.0}, [50, 60])
    assert cells(table)[3:] == [["g", "mean", "15.0", "92.5", ""]]


def complete(seed: int, map_11: float | None = None) -> Evaluation:
    """A run with every number."""
    groups = (make_six(first) for first in (0, 10, 20))
    return make_evaluation(Metrics(50.25, *groups, {"a": 1.5, "b": None}, map_11), seed=seed)


def test_a_csv_has_one_row_per_run_and_all_metrics() -> None:
    runs = {"full": [complete(0), complete(1)], "max-pool": [complete(0)]}
    rows = list(csv.DictReader(io.StringIO(results_csv(runs))))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("full", "0"),
        ("full", "1"),
        ("max-pool", "0"),
    ]
    assert len(rows[0]) == 2 + 1 + 3 * 6
    assert rows[0]["mAP"] == "50.25"
    assert (rows[0]["OF1"], rows[0]["top3_CP"], rows[0]["top3_forced_OF1"]) == ("5", "10", "25")
    [row] = csv.DictReader(io.StringIO(results_csv({"full": [complete(0, 47.5)]})))
    assert row["mAP11"] == "47.5"


def test_a_csv_of_labels_has_one_row_per_run_and_label() -> None:
    runs = {"full": [complete(3)], "max-pool": [complete(0)]}
    assert labels_csv(runs).splitlines() == [
        "variant,seed,label,AP",
        "full,3,a,1.5",
        "full,3,b,",
        "max-pool,0,a,1.5",
        "max-pool,0,b,",
    ]


def test_the_caption_says_over_which_labels_and_seeds() -> None:
    one = caption("tiny", [complete(4)])
    assert one.startswith("tiny, split drawn/test, 12 images")
    assert "1 of 2 labels" in one
    assert one.endswith("seed 4")
    several = caption("tiny", [run(1, a=1.0), make_evaluation(make_metrics(1), seed=3)])
    assert several.endswith("seeds 0, 3")
    assert "labels" not in several
    treated = make_evaluation(make_metrics(1), difficult={"train": "positive", "test": "ignored"})
    assert "difficult labels positive in training, ignored in testing; seed 0" in caption(
        "tiny", [treated]
    )
