"""Metrics -> the rows and columns of the page's table of results, and the AP of its labels.

A cell is [value, spread], or [value, spread, [low, high]] with an interval. All numbers are in
percent; the spread is the sample standard deviation over the seeds, null for a single number.

A column's key is its name in `Metrics.number`, so the paper's columns have the same keys as ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.metrics import GROUPS, SIX, Metrics
from pipeline.evaluation.paper import PaperResults
from pipeline.evaluation.runs import Evaluations
from pipeline.evaluation.spread import spread_of
from pipeline.evaluation.tables import mean_difference

Cell = list[Any]

_TITLES = {
    "": "All",
    "top-3": "Top-3",
    "top-3 forced": "Top-3, always three",
    "decided": "Fitted thresholds",
}
"""Titles of the `GROUPS` of columns."""

_IN_GROUPS = tuple((group, name, f"{group} {name}".strip()) for group in GROUPS for name in SIX)
"""Group, title and key of the columns that stand in groups."""

_KEYS = ("mAP", "mAP11", *(key for _, _, key in _IN_GROUPS))


def columns(runs: Evaluations, base: str) -> list[dict[str, str]]:
    """Key, title and group of each column of numbers."""
    alone = {"mAP": "mAP"}
    if any(seeds[0].metrics.mAP11 is not None for seeds in runs.values()):
        alone["mAP11"] = "11-point mAP"
    if len(runs) > 1 and base in runs:
        alone["difference"] = f"difference from {base}"
    decided = any(seeds[0].metrics.decided for seeds in runs.values())
    return [
        *({"key": key, "title": title, "group": ""} for key, title in alone.items()),
        *(
            {"key": key, "title": name, "group": _TITLES[group]}
            for group, name, key in _IN_GROUPS
            if group != "decided" or decided
        ),
    ]


def own_rows(
    runs: Evaluations, intervals: Mapping[str, Interval], base: str
) -> list[dict[str, Any]]:
    """One row per variant and, if there are several seeds, one row per seed below it.

    Args:
        intervals: of the variants that have an mAP.
    """
    rows: list[dict[str, Any]] = []
    for variant, seeds in runs.items():
        cells = _cells([evaluation.metrics for evaluation in seeds])
        if interval := intervals.get(variant):
            cells["mAP"] = [*cells["mAP"], interval.ends]
            if interval.difference is not None:
                difference = mean_difference(runs, variant, base)
                cells["difference"] = [difference, None, interval.difference]
        rows.append({"kind": "variant", "name": variant, "of": variant, "cells": cells})
        if len(seeds) > 1:
            rows += [
                {
                    "kind": "seed",
                    "name": f"seed {evaluation.seed}",
                    "of": variant,
                    "cells": _cells([evaluation.metrics]),
                }
                for evaluation in seeds
            ]
    return rows


def paper_rows(paper: PaperResults) -> list[dict[str, Any]]:
    """One row for each method in the paper's tables of a data set."""
    return [
        {
            "kind": "paper",
            "name": method,
            "of": method,
            "cells": {
                column: [value, None]
                for column, value in row.items()
                if value is not None and column in paper.columns
            },
        }
        for method, row in paper.methods.items()
    ]


def label_cells(runs: Evaluations) -> dict[str, list[Cell | None]]:
    """Variant -> the AP of each label, in their order; None where it is not defined."""
    return {
        variant: [
            _cell(evaluation.metrics.AP[label] for evaluation in seeds)
            for label in seeds[0].metrics.AP
        ]
        for variant, seeds in runs.items()
    }


def _cells(seeds: list[Metrics]) -> dict[str, Cell]:
    """Key -> cell, for the numbers that are defined."""
    cells = {key: _cell(metrics.number(key) for metrics in seeds) for key in _KEYS}
    return {key: cell for key, cell in cells.items() if cell is not None}


def _cell(values: Iterable[float | None]) -> Cell | None:
    spread = spread_of(values)
    return None if spread is None else [spread.mean, spread.deviation]
