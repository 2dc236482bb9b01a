"""Metrics -> the rows and columns of the page's table of results, and the AP of its labels.

A cell is [value, spread], or [value, spread, [low, high]] with an interval; all in percent, and
spread, the sample standard deviation over the seeds, null for a single number.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.paper import PaperResults
from pipeline.evaluation.tables import Runs, mean_difference

Cell = list[Any]

_SIX = ("CP", "CR", "CF1", "OP", "OR", "OF1")
_GROUPS = {"all": "All", "top3": "Top-3", "top3_forced": "Top-3, always three"}


def columns(runs: Runs, base: str) -> list[dict[str, str]]:
    """Key, title and group of each column of numbers."""
    first = next(iter(runs.values()))[0]
    found = [{"key": "mAP", "title": "mAP", "group": ""}]
    if "mAP11" in first:
        found.append({"key": "mAP11", "title": "11-point mAP", "group": ""})
    if len(runs) > 1 and base in runs:
        found.append({"key": "difference", "title": f"minus {base}", "group": ""})
    found += [
        {"key": f"{group} {name}", "title": name, "group": title}
        for group, title in _GROUPS.items()
        for name in _SIX
    ]
    return found


def own_rows(runs: Runs, found: Mapping[str, Interval], base: str) -> list[dict[str, Any]]:
    """A row a variant and, where there are several seeds, one a seed below it."""
    rows: list[dict[str, Any]] = []
    for variant, seeds in runs.items():
        each = [_cells(metrics) for metrics in seeds]
        cells = {key: mean_and_spread([one[key] for one in each]) for key in each[0]}
        interval = found[variant]
        cells["mAP"] = [*(cells["mAP"] or []), interval.ends]
        if interval.difference is not None:
            cells["difference"] = [
                mean_difference(runs, variant, base),
                None,
                interval.difference,
            ]
        rows.append({"kind": "variant", "name": variant, "of": variant, "cells": cells})
        if len(seeds) > 1:
            rows += [
                {
                    "kind": "seed",
                    "name": f"seed {metrics['seed']}",
                    "of": variant,
                    "cells": {key: [value, None] for key, value in one.items()},
                }
                for metrics, one in zip(seeds, each, strict=True)
            ]
    return rows


def paper_rows(paper: PaperResults) -> list[dict[str, Any]]:
    """A row for every method of the paper's tables of a data set."""
    return [
        {
            "kind": "paper",
            "name": method,
            "of": method,
            "cells": {
                _own_key(column): [value, None]
                for column, value in row.items()
                if value is not None and column in paper.columns
            },
        }
        for method, row in paper.methods.items()
    ]


def label_cells(runs: Runs) -> dict[str, list[Cell | None]]:
    """Variant -> the AP of each label, in their order; None where a label has no positive."""
    return {
        variant: [
            mean_and_spread([metrics["AP"][label] for metrics in seeds]) for label in seeds[0]["AP"]
        ]
        for variant, seeds in runs.items()
    }


def mean_and_spread(values: Sequence[float | None]) -> Cell | None:
    """The cell of one number a seed; None where there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return [statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None]


def _cells(metrics: Mapping[str, Any]) -> dict[str, float]:
    cells = {name: metrics[name] for name in ("mAP", "mAP11") if name in metrics}
    cells |= {f"all {name}": metrics[name] for name in _SIX}
    for group in ("top3", "top3_forced"):
        cells |= {f"{group} {name}": metrics[group][name] for name in _SIX}
    return cells


def _own_key(column: str) -> str:
    """A column of the paper, by the key that ours has."""
    if column == "mAP":
        return column
    if column.startswith("top-3 "):
        return f"top3 {column.removeprefix('top-3 ')}"
    return f"all {column}"
