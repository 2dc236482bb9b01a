"""Metrics of many runs -> the tables that people read."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from pipeline.evaluation.paper import VARIANT_NAMES, PaperResults

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


def differences_table(rows: Mapping[str, tuple[float, float, float]]) -> str:
    """A row a variant: its mAP minus that of `full`, in points, and the interval; Markdown.

    Args:
        rows: variant -> difference, lower and upper end.
    """
    cells = [
        [variant, f"{difference:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        for variant, (difference, low, high) in rows.items()
    ]
    return _markdown(["variant", "mAP - full", "95 % interval"], cells)


def mean_difference(runs: Runs, variant: str, base: str) -> float:
    """mAP of a variant minus that of another, mean over the seeds, which both have, in points."""
    pairs = zip(runs[variant], runs[base], strict=True)
    return statistics.fmean(one["mAP"] - other["mAP"] for one, other in pairs)


def sweep_table(key: str, runs: Runs) -> str:
    """A row a value of the setting ``key``, in percent; Markdown."""
    names = ("mAP", "CF1", "OF1")
    rows = [
        [value, *(_cell([metrics[name] for metrics in seeds]) for name in names)]
        for value, seeds in runs.items()
    ]
    return _markdown([key, *names], rows)


def paper_table(runs: Runs, paper: PaperResults) -> str:
    """Ours above the paper's, for each variant that the paper reports; Markdown."""
    rows = []
    for variant in VARIANT_NAMES:
        printed = paper.row(variant)
        if printed is None:
            continue
        if variant in runs:
            ours = [_cell([metric(one, name) for one in runs[variant]]) for name in paper.columns]
            rows.append([variant, "ours", *ours])
        rows.append([variant, "paper", *(_cell([printed.get(name)]) for name in paper.columns)])
    return _markdown(["variant", "of", *paper.columns], rows)


def metric(metrics: Mapping[str, Any], name: str) -> float:
    """One number of a run by the name of its column, e.g. `CF1` or `top-3 CF1`."""
    value = metrics["top3"][name.removeprefix("top-3 ")] if "top-3" in name else metrics[name]
    return float(value)


def results_csv(runs: Runs) -> str:
    """A row a run: what it is, and every metric but the AP of single labels, in percent."""
    rows = [
        {
            "variant": variant,
            "seed": metrics["seed"],
            **{name: value for name, value in metrics.items() if name in _NUMBERS},
            **{
                f"{group}_{name}": value
                for group in ("top3", "top3_forced")
                for name, value in metrics[group].items()
            },
        }
        for variant, seeds in runs.items()
        for metrics in seeds
    ]
    return as_csv(rows)


def labels_csv(runs: Runs) -> str:
    """A row a run and label: the AP in percent; empty where the label has no positive."""
    return as_csv(
        {"variant": variant, "seed": metrics["seed"], "label": label, "AP": ap}
        for variant, seeds in runs.items()
        for metrics in seeds
        for label, ap in metrics["AP"].items()
    )


_NUMBERS = ("mAP", "mAP11", "CP", "CR", "CF1", "OP", "OR", "OF1")


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys, as a text with a header."""
    rows = list(rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def labels_table(
    runs: Runs, groups: Mapping[str, Sequence[str]], printed: Mapping[str, float | None]
) -> str:
    """AP of each label by variant, in percent; Markdown.

    Args:
        groups: name of a group -> its labels, in the order to show.
        printed: label -> the paper's AP; a column of its own unless empty.
    """
    rows = []
    for group, labels in groups.items():
        for label in labels:
            cells = [_cell([metrics["AP"][label] for metrics in seeds]) for seeds in runs.values()]
            rows.append([group, label, *cells, *([_cell([printed.get(label)])] if printed else [])])
        if len(groups) > 1:
            means = [
                _cell([_mean(metrics["AP"][label] for label in labels) for metrics in seeds])
                for seeds in runs.values()
            ]
            of_paper = [_cell([_mean(printed.get(label) for label in labels)])] if printed else []
            rows.append([group, "mean", *means, *of_paper])
    return _markdown(["group", "label", *runs, *(["paper"] if printed else [])], rows)


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
