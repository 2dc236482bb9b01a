"""The tables that people read: what a cell says, and that they are Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.tables import labels_table, results_table


def metrics(value: float, **ap: float | None) -> dict[str, Any]:
    """Headline numbers that can be told apart, and AP by label."""
    return {
        "mAP": value,
        "CF1": value + 1,
        "OF1": value + 2,
        "top3": {"CF1": value + 3, "OF1": value + 4},
        "AP": ap,
    }


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table, which it is held to be."""
    header, rule, *rows = table.splitlines()
    assert set(rule) == {"|", "-"}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    assert all(line.startswith("|") and line.endswith("|") for line in table.splitlines())
    assert {len(line) for line in lines} == {rule.count("|") - 1}
    return lines


def test_one_seed_is_a_number() -> None:
    table = results_table({"full": [metrics(50.04)], "max-pool": [metrics(7)]})
    assert cells(table) == [
        ["variant", "mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1"],
        ["full", "50.0", "51.0", "52.0", "53.0", "54.0"],
        ["max-pool", "7.0", "8.0", "9.0", "10.0", "11.0"],
    ]


def test_several_seeds_are_mean_and_sample_standard_deviation() -> None:
    # 10, 12, 17: mean 13; deviations -3, -1, 4; (9 + 1 + 16) / (3 - 1) = 13, root 3.606.
    table = results_table({"full": [metrics(10), metrics(12), metrics(17)]})
    assert cells(table)[1][:3] == ["full", "13.0 ± 3.6", "14.0 ± 3.6"]


def test_a_label_without_a_positive_has_a_dash() -> None:
    runs = {
        "full": [metrics(1, sun=80, moon=None), metrics(1, sun=90, moon=None)],
        "max-pool": [metrics(1, sun=60, moon=30), metrics(1, sun=62, moon=None)],
    }
    # 80, 90: mean 85, deviation 5 * root 2. 60, 62: 61, root 2. A single value has no spread.
    assert cells(labels_table(runs, {"all": ["sun", "moon"]})) == [
        ["group", "label", "full", "max-pool"],
        ["all", "sun", "85.0 ± 7.1", "61.0 ± 1.4"],
        ["all", "moon", "-", "30.0"],
    ]


def test_groups_have_a_mean_over_the_labels_with_a_positive() -> None:
    seeds = [metrics(1, a=10, b=20, c=None, d=None), metrics(1, a=30, b=60, c=None, d=None)]
    # Means of the first group by seed: 15 and 45; mean 30, deviation 15 * root 2.
    assert cells(labels_table({"full": seeds}, {"one": ["b", "a"], "two": ["c", "d"]})) == [
        ["group", "label", "full"],
        ["one", "b", "40.0 ± 28.3"],
        ["one", "a", "20.0 ± 14.1"],
        ["one", "mean", "30.0 ± 21.2"],
        ["two", "c", "-"],
        ["two", "d", "-"],
        ["two", "mean", "-"],
    ]


def test_names_that_look_like_numbers_stay_as_they_are() -> None:
    table = labels_table({"full": [metrics(1, **{"007": 5.0})]}, {"1e3": ["007"]})
    assert cells(table)[1] == ["1e3", "007", "5.0"]
