"""The figures of a page, each with its numbers as CSV and with words for who can't see it.

Every function here draws into <folder>/figures, writes <folder>/tables/<name>.csv, and returns what
the page says of the figure.

Letters: N images, C labels, W size of a label vector, H size of a label's node. Scores (N, C) and
truth (N, C) are those of `pipeline.evaluation.metrics`; runs are metrics as `tables.Runs` has them.
"""

from __future__ import annotations

import csv
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.diagnostics import (
    CoOccurrence,
    calibration,
    co_occurrence,
    label_map,
    thinned_curve,
)
from pipeline.evaluation.metrics import THRESHOLD, Floats, Integers
from pipeline.evaluation.tables import Runs, as_csv
from pipeline.report import figures
from pipeline.report.page import FIGURES, TABLES

Row = Mapping[str, float]
"""Of a run's history.csv."""

Curves = Mapping[str, Mapping[str, figures.Curve]]
"""Label -> variant -> its precision-recall curve."""


@dataclass(frozen=True)
class Illustration:
    """A figure of the page.

    Attributes:
        name: of its files, without suffix.
        title: above it.
        alt: what it shows, for who can't see it.
        note: below it.
        table: whether there is a CSV of its numbers by the same name.
    """

    name: str
    title: str
    alt: str
    note: str
    table: bool = True

    def stem(self, folder: Path) -> Path:
        """Where it is drawn, without suffix."""
        return folder / FIGURES / self.name

    def write_table(self, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write its numbers."""
        (folder / TABLES / f"{self.name}.csv").write_text(as_csv(rows))


def mean_ap(runs: Runs) -> dict[str, dict[str, float]]:
    """Variant -> label -> AP in percent, mean over the seeds, of the labels with a positive."""
    return {
        variant: {
            label: statistics.fmean(metrics["AP"][label] for metrics in seeds)
            for label, value in seeds[0]["AP"].items()
            if value is not None
        }
        for variant, seeds in runs.items()
    }


def draw_average_precision(folder: Path, runs: Runs, base: str) -> Illustration:
    """AP by label: ``base`` as bars, the other variants as marks."""
    ap = mean_ap(runs)
    order = sorted(ap[base], key=lambda label: -ap[base][label])
    ordered = {
        variant: {label: ap[variant][label] for label in order}
        for variant in [base, *(name for name in ap if name != base)]
    }
    spread = {}
    if len(runs[base]) > 1:
        spread = {
            label: statistics.stdev(metrics["AP"][label] for metrics in runs[base])
            for label in order
        }
    best, worst = order[0], order[-1]
    about = Illustration(
        "average-precision",
        "Average precision by label",
        f"Bars of {base} for {len(order)} labels, from {ap[base][best]:.1f} % ({best}) to "
        f"{ap[base][worst]:.1f} % ({worst}), with a mark for each other variant. All numbers are "
        "in the table above and in labels.csv.",
        "Mean over the seeds"
        + (f"; lines: sample standard deviation of {base}." if spread else "."),
        table=False,
    )
    figures.average_precision_figure(about.stem(folder), ordered, spread)
    return about


def draw_gains(folder: Path, runs: Runs, base: str) -> Illustration:
    """The labels that gain and lose most against ``base``; there is another variant."""
    ap = mean_ap(runs)
    differences = {
        variant: {label: value - ap[base][label] for label, value in found.items()}
        for variant, found in ap.items()
        if variant != base
    }
    said = "; ".join(
        f"{variant} from {min(found.values()):+.1f} ({min(found, key=found.__getitem__)}) to "
        f"{max(found.values()):+.1f} ({max(found, key=found.__getitem__)})"
        for variant, found in differences.items()
    )
    about = Illustration(
        "gains-and-losses",
        "Labels that gain and lose most",
        f"For each variant the difference in average precision to {base}: {said}.",
        f"Average precision minus that of {base}, in points, mean over the seeds.",
    )
    figures.gains_figure(about.stem(folder), differences, base)
    about.write_table(
        folder,
        (
            {"variant": variant, "label": label, "difference": value}
            for variant, found in differences.items()
            for label, value in found.items()
        ),
    )
    return about


def draw_learning(
    folder: Path, histories: Mapping[str, Mapping[int, Sequence[Row]]]
) -> Illustration:
    """Learning curves.

    Args:
        histories: variant -> seed -> the rows of its history.csv.
    """
    ends = ", ".join(
        f"{variant} {statistics.fmean(rows[-1]['train_loss'] for rows in seeds.values()):.3f}"
        for variant, seeds in histories.items()
    )
    about = Illustration(
        "learning-curves",
        "Learning curves",
        f"Loss of the training split by epoch, a line a run. At the end it is: {ends}.",
        "A line a run, from its history.csv.",
    )
    figures.learning_figure(
        about.stem(folder), {variant: list(seeds.values()) for variant, seeds in histories.items()}
    )
    columns = dict.fromkeys(
        column for seeds in histories.values() for rows in seeds.values() for column in rows[0]
    )
    about.write_table(
        folder,
        (
            {"variant": variant, "seed": seed, **{name: row.get(name) for name in columns}}
            for variant, seeds in histories.items()
            for seed, rows in seeds.items()
            for row in rows
        ),
    )
    return about


def draw_precision_recall(
    folder: Path, scores: Mapping[str, Floats], truth: Integers, labels: Sequence[str]
) -> tuple[Illustration, Curves]:
    """Precision-recall curves of each label that has a positive; the page draws them too.

    Args:
        scores: variant -> (N, C) of one run.
    """
    curves = {
        label: {
            variant: thinned_curve(found[:, place], truth[:, place])
            for variant, found in scores.items()
        }
        for place, label in enumerate(labels)
        if (truth[:, place] == 1).any()
    }
    about = Illustration(
        "precision-recall",
        "Precision and recall, all labels",
        f"{len(curves)} small panels, a label each, with a precision-recall curve for each of "
        f"{len(scores)} variants. Their points are in precision-recall.csv.",
        "First seed; at most 100 points of a curve.",
    )
    figures.precision_recall_figure(about.stem(folder), curves)
    about.write_table(
        folder,
        (
            {"label": label, "variant": variant, "recall": r, "precision": p}
            for label, of_label in curves.items()
            for variant, (recall, precision) in of_label.items()
            for r, p in zip(recall, precision, strict=True)
        ),
    )
    return about, curves


def draw_calibration(
    folder: Path, scores: Mapping[str, Sequence[Floats]], truth: Integers
) -> Illustration:
    """The reliability diagram.

    Args:
        scores: variant -> (N, C) of each of its runs.
    """
    found = {
        variant: calibration(np.concatenate(runs), np.concatenate([truth] * len(runs)))
        for variant, runs in scores.items()
    }
    said = ", ".join(f"{variant} {one.error:.1f} %" for variant, one in found.items())
    about = Illustration(
        "calibration",
        "Calibration",
        "Reliability diagram: share of positives against probability, in bins. Expected "
        f"calibration error: {said}.",
        "Every image and label is one entry, all seeds together. Below: how many entries a bin "
        f"has. Expected calibration error: {said}.",
    )
    figures.calibration_figure(about.stem(folder), found)
    about.write_table(
        folder,
        (
            {
                "variant": variant,
                "bin": number,
                "entries": int(one.count[number]),
                "confidence": _known(one.confidence[number]),
                "frequency": _known(one.frequency[number]),
            }
            for variant, one in found.items()
            for number in range(len(one.count))
        ),
    )
    return about


def draw_co_occurrence(
    folder: Path, scores: Floats, truth: Integers, labels: Sequence[str], who: str
) -> Illustration:
    """How often labels come together, in truth and as one run predicts.

    Args:
        who: the run, in words.
    """
    found = co_occurrence(scores, truth)
    said = _largest_gaps(found, labels)
    about = Illustration(
        "co-occurrence",
        "Labels that come together",
        f"Three matrices of {len(labels)} x {len(labels)} labels: how often the label of a column "
        f"comes with that of a row in truth, as predicted, and the difference. {said}",
        "Of the test images with the label of the row, the share that also has that of the column: "
        f"in truth, as predicted by {who} (probability over {THRESHOLD}), and the difference. "
        f"{said}",
    )
    figures.co_occurrence_figure(about.stem(folder), found, labels)
    about.write_table(
        folder,
        (
            {
                "label": one,
                "with": other,
                "truth": _known(found.truth[i, j]),
                "predicted": _known(found.predicted[i, j]),
            }
            for i, one in enumerate(labels)
            for j, other in enumerate(labels)
            if i != j
        ),
    )
    return about


def _largest_gaps(found: CoOccurrence, labels: Sequence[str], most: int = 3) -> str:
    """The pairs that prediction joins too often or too seldom."""
    gaps = np.nan_to_num(found.predicted - found.truth)
    order = np.argsort(-np.abs(gaps), axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(place, gaps.shape) for place in order]
    said = ", ".join(
        f"{labels[j]} with {labels[i]} ({100 * gaps[i, j]:+.0f} points)" for i, j in pairs
    )
    return f"Largest differences: {said}."


def draw_label_map(
    folder: Path,
    vectors: Floats,
    nodes: Floats,
    labels: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    who: str,
    grouped: str,
) -> Illustration | None:
    """The labels' topology; None where there are too few of them for a map.

    Args:
        vectors: (C, W), of the labels.
        nodes: (C, H), that a network learned.
        groups: name of a group -> its labels.
        who: the run, in words.
        grouped: where the groups come from, in words.
    """
    found = {"word vectors": label_map(vectors), "learned label nodes": label_map(nodes)}
    maps = {title: places for title, places in found.items() if places is not None}
    if not maps:
        return None
    about = Illustration(
        "label-map",
        "Topology of the labels",
        f"Two maps of the {len(labels)} labels, coloured by {grouped}: by word vectors, and by the "
        f"nodes that {who} has learned. Coordinates are in label-map.csv.",
        "The paper's Figure 5: t-SNE (cosine) of the word vectors, and of the label nodes after "
        f"the last convolution module of {who}, mean over the images of the gallery. Colour: "
        f"{grouped}. Distances between far points mean little in such a map.",
    )
    figures.label_map_figure(about.stem(folder), maps, labels, groups)
    group_of = {label: group for group, members in groups.items() for label in members}
    about.write_table(
        folder,
        (
            {"map": title, "label": label, "group": group_of[label], "x": x, "y": y}
            for title, places in maps.items()
            for label, (x, y) in zip(labels, places.tolist(), strict=True)
        ),
    )
    return about


def copy_sweep(folder: Path, results: Path, figure: Path) -> Illustration:
    """A sweep that was drawn already.

    Args:
        results: its CSV.
        figure: its figure, without suffix.
    """
    with results.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["value"], []).append(float(row["mAP"]))
    said = ", ".join(f"{value}: {statistics.fmean(v):.1f}" for value, v in means.items())
    key, variant = rows[0]["setting"], rows[0]["variant"]
    about = Illustration(
        f"sweep-{variant}-{key}".replace(".", "-"),
        f"Sweep of {key}",
        f"mAP of {variant} against {figures.AXES.get(key, key)}: {said}.",
        f"mAP of {variant}. The paper's Figure 4 varies m and k." if key in figures.AXES else "",
    )
    for suffix in (".svg", ".png"):
        shutil.copyfile(figure.with_suffix(suffix), about.stem(folder).with_suffix(suffix))
    shutil.copyfile(results, folder / TABLES / f"{about.name}.csv")
    return about


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
