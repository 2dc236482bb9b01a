"""Metrics of many runs -> the tables that people read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""The metrics (as `metrics.evaluate` returns them) of each variant's runs, one a seed."""

HEADLINES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "mAP": lambda metrics: metrics["mAP"],
    "CF1": lambda metrics: metrics["CF1"],
    "OF1": lambda metrics: metrics["OF1"],
    "top-3 CF1": lambda metrics: metrics["top3"]["CF1"],
    "top-3 OF1": lambda metrics: metrics["top3"]["OF1"],
}


def results_table(runs: Runs) -> str:
    """A row a variant, a column a headline metric, in percent; Markdown.

    With several seeds a cell is mean ± sample standard deviation.
    """
    rows = [
        [variant, *(_cell([read(metrics) for metrics in seeds]) for read in HEADLINES.values())]
        for variant, seeds in runs.items()
    ]
    return _markdown(["variant", *HEADLINES], rows)


def labels_table(runs: Runs, groups: Mapping[str, Sequence[str]]) -> str:
    """AP of each label by variant, in percent; Markdown.

    Args:
        groups: name of a group -> its labels, in the order to show.
    """
    rows = []
    for group, labels in groups.items():
        for label in labels:
            cells = [_cell([metrics["AP"][label] for metrics in seeds]) for seeds in runs.values()]
            rows.append([group, label, *cells])
        if len(groups) > 1:
            means = [
                _cell([_mean(metrics["AP"][label] for label in labels) for metrics in seeds])
                for seeds in runs.values()
            ]
            rows.append([group, "mean", *means])
    return _markdown(["group", "label", *runs], rows)


def _mean(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _cell(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    if len(present) == 1:
        return f"{present[0]:.1f}"
    return f"{statistics.fmean(present):.1f} ± {statistics.stdev(present):.1f}"


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
