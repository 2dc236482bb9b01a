"""The figures of a page, each with its numbers as CSV and a description for those who can't see it.

Every `draw_*` function draws into <folder>/figures, writes <folder>/tables/<name>.csv, and returns
what the page says about the figure. Variants are drawn in the order of the mapping.

Letters: N images, C labels, W size of a label vector, H size of a label's node. Scores (N, C) and
truth (N, C) are as in `pipeline.evaluation.metrics`.
"""

from __future__ import annotations

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
from pipeline.evaluation.metrics import THRESHOLD, Floats, Integers, shown
from pipeline.evaluation.runs import Evaluations, Runs
from pipeline.evaluation.spread import Spread, mean_of, spread_of
from pipeline.evaluation.tables import as_csv
from pipeline.report import figures
from pipeline.report.folder import FIGURES, TABLES
from pipeline.report.searches import SearchResults, in_words
from pipeline.report.sweeps import Sweep

Histories = Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]
"""Variant -> seed -> one row per epoch."""

Curves = Mapping[str, Mapping[str, figures.Curve]]
"""Label -> variant -> its precision-recall curve."""


@dataclass(frozen=True)
class Illustration:
    """A figure of the page.

    Attributes:
        name: of its files, without suffix.
        title: above the figure.
        alt: what it shows, for those who can't see it.
        note: below the figure.

    There is a CSV of its numbers by the same name.
    """

    name: str
    title: str
    alt: str
    note: str

    def stem(self, folder: Path) -> Path:
        """The path of the drawing, without suffix."""
        return folder / FIGURES / self.name

    def write_table(self, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the numbers of the figure."""
        (folder / TABLES / f"{self.name}.csv").write_text(as_csv(rows), encoding="utf-8")


def draw_average_precision(folder: Path, runs: Evaluations, base: str) -> None:
    """Draw the AP by label: ``base``, which comes first, as bars, the other variants as marks.

    All variants must have AP.

    The page does not show this figure, since its table of labels has the same bars.
    """
    spreads = _ap_spreads(runs)
    order = sorted(spreads[base], key=lambda label: -spreads[base][label].mean)
    ap = {
        variant: {label: of_variant[label].mean for label in order}
        for variant, of_variant in spreads.items()
    }
    deviation = {
        label: spreads[base][label].deviation or 0.0 for label in order if len(runs[base]) > 1
    }
    figures.average_precision_figure(folder / FIGURES / "average-precision", ap, deviation)


def draw_gains(folder: Path, runs: Evaluations, base: str) -> Illustration:
    """Draw the labels that gain and lose most compared with ``base``; needs another variant.

    All variants must have AP.
    """
    spreads = _ap_spreads(runs)
    differences = {
        variant: {label: ap.mean - spreads[base][label].mean for label, ap in of_variant.items()}
        for variant, of_variant in spreads.items()
        if variant != base
    }
    extremes = "; ".join(
        f"{variant} from {min(gains.values()):+.1f} ({min(gains, key=gains.__getitem__)}) to "
        f"{max(gains.values()):+.1f} ({max(gains, key=gains.__getitem__)})"
        for variant, gains in differences.items()
    )
    about = Illustration(
        "gains-and-losses",
        "Labels that gain and lose most",
        f"For each variant the difference in average precision from {base}: {extremes}.",
        f"Average precision minus that of {base}, in points, averaged over the seeds.",
    )
    figures.gains_figure(about.stem(folder), differences, base)
    about.write_table(
        folder,
        (
            {"variant": variant, "label": label, "difference": gain}
            for variant, gains in differences.items()
            for label, gain in gains.items()
        ),
    )
    return about


def _ap_spreads(runs: Evaluations) -> dict[str, dict[str, Spread]]:
    """Variant -> label -> its AP in percent over the seeds, for the labels with a positive."""
    return {
        variant: {
            label: spread
            for label in seeds[0].metrics.AP
            if (spread := spread_of(one.metrics.AP[label] for one in seeds)) is not None
        }
        for variant, seeds in runs.items()
    }


def histories_of(runs: Runs) -> Histories:
    """The history of every run."""
    return {
        variant: {run.evaluation.seed: run.history for run in seeds}
        for variant, seeds in runs.items()
    }


def draw_learning(folder: Path, histories: Histories) -> Illustration:
    """Draw the learning curves."""
    last = ", ".join(
        f"{variant} {mean_of(rows[-1]['train_loss'] for rows in seeds.values()):.3f}"
        for variant, seeds in histories.items()
    )
    about = Illustration(
        "learning-curves",
        "Learning curves",
        f"The training loss by epoch, with a line for each run. At the end it is: {last}.",
        "One line per run.",
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
    """Draw the precision-recall curves of each label that has a positive.

    Args:
        scores: variant -> (N, C) of one run, whose scores rank.

    Returns:
        the figure, and the curves, which the page draws too.
    """
    curves = {
        label: {
            variant: thinned_curve(of_variant[:, column], truth[:, column])
            for variant, of_variant in scores.items()
        }
        for column, label in enumerate(labels)
        if (truth[:, column] == 1).any()
    }
    about = Illustration(
        "precision-recall",
        "Precision and recall of all labels",
        f"{len(curves)} small panels, one per label, with a precision-recall curve for each of "
        f"{len(scores)} variants. The points are in precision-recall.csv.",
        "For the first seed; a curve has at most 100 points.",
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
    """Draw the reliability diagram.

    Args:
        scores: variant -> (N, C) of each of its runs, whose scores are probabilities.
    """
    calibrations = {
        variant: calibration(np.concatenate(runs), np.concatenate([truth] * len(runs)))
        for variant, runs in scores.items()
    }
    errors = ", ".join(f"{variant} {one.error:.1f} %" for variant, one in calibrations.items())
    about = Illustration(
        "calibration",
        "Calibration",
        "A reliability diagram: the share of positives against the predicted probability, in "
        f"bins. Expected calibration error: {errors}.",
        "Each label of each image is one entry; all seeds are counted together. The lower panel "
        f"shows how many entries a bin has. Expected calibration error: {errors}.",
    )
    figures.calibration_figure(about.stem(folder), calibrations)
    about.write_table(
        folder,
        (
            {
                "variant": variant,
                "bin": number,
                "entries": int(one.count[number]),
                "confidence": _defined(one.confidence[number]),
                "frequency": _defined(one.frequency[number]),
            }
            for variant, one in calibrations.items()
            for number in range(len(one.count))
        ),
    )
    return about


def draw_co_occurrence(
    folder: Path, scores: Floats, truth: Integers, labels: Sequence[str], run: str
) -> Illustration:
    """Draw how often labels occur together, in truth and as one run predicts; needs two labels.

    Args:
        run: the run, in words.
    """
    shares = co_occurrence(scores, truth)
    gaps = _largest_gaps(shares, labels)
    about = Illustration(
        "co-occurrence",
        "Labels that occur together",
        f"Three matrices of {len(labels)} x {len(labels)} labels: how often the label of a column "
        f"occurs with the label of a row in truth, as predicted, and the difference.{gaps}",
        "Of the test images with the row's label, the share that also has the column's label: in "
        f"truth, as predicted by {run} (probability over {THRESHOLD}), and the difference.{gaps}",
    )
    figures.co_occurrence_figure(about.stem(folder), shares, labels)
    about.write_table(
        folder,
        (
            {
                "label": one,
                "with": other,
                "truth": _defined(shares.truth[i, j]),
                "predicted": _defined(shares.predicted[i, j]),
            }
            for i, one in enumerate(labels)
            for j, other in enumerate(labels)
            if i != j
        ),
    )
    return about


def _largest_gaps(shares: CoOccurrence, labels: Sequence[str], most: int = 3) -> str:
    """Name the pairs that are predicted together too often or too rarely, as a further sentence."""
    gaps = np.nan_to_num(shares.predicted - shares.truth)
    order = np.argsort(-np.abs(gaps), axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(index, gaps.shape) for index in order]
    listed = ", ".join(
        f"{labels[j]} with {labels[i]} ({100 * gaps[i, j]:+.0f} points)"
        for i, j in pairs
        if gaps[i, j] != 0
    )
    return f" Largest differences: {listed}." if listed else ""


def draw_label_map(
    folder: Path,
    vectors: Floats,
    nodes: Floats,
    labels: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None,
    run: str,
) -> Illustration | None:
    """Draw the topology of the labels; return None if there are too few of them for a map.

    Args:
        vectors: (C, W), the word vectors.
        nodes: (C, H), the label nodes that a run learned.
        groups: name of a group -> its labels; None if the data set defines none.
        run: the run, in words.
    """
    both = {"word vectors": label_map(vectors), "learned label nodes": label_map(nodes)}
    maps = {title: points for title, points in both.items() if points is not None}
    if not maps:
        return None
    about = Illustration(
        "label-map",
        "Topology of the labels",
        f"Two maps of the {len(labels)} labels: one of the word vectors, and one of the nodes that "
        f"{run} learned. The coordinates are in label-map.csv.",
        "As the paper's Figure 5: t-SNE (cosine) of the word vectors, and of the label nodes after "
        f"the last convolution module of {run}, averaged over the images of the gallery."
        + (" The colours show the groups that the data set defines." if groups else "")
        + " Distances between points that are far apart mean little in such a map.",
    )
    figures.label_map_figure(about.stem(folder), maps, labels, groups)
    group_of = {label: group for group, members in (groups or {}).items() for label in members}
    about.write_table(
        folder,
        (
            {
                "map": title,
                "label": label,
                **({"group": group_of[label]} if groups else {}),
                "x": x,
                "y": y,
            }
            for title, points in maps.items()
            for label, (x, y) in zip(labels, points.tolist(), strict=True)
        ),
    )
    return about


def draw_sweep(folder: Path, sweep: Sweep) -> Illustration:
    """Draw a sweep of one setting, or a search over several."""
    if isinstance(sweep, SearchResults):
        return _draw_search(folder, sweep)
    key, variant = sweep.setting, sweep.variant
    metric = sweep.metric
    means = ", ".join(
        f"{value}: {shown(mean_of(numbers), digits=1)}"
        for value, numbers in sweep.numbers().items()
    )
    axis = figures.AXES.get(key, key)
    text = f"The {metric} of {variant} against {axis}: {means}."
    caption = f"The {metric} of {variant}, in percent."
    if best := sweep.best():
        text = f"The validation mAP and the test {metric} of {variant} against {axis}. On the test "
        text += f"split: {means}. The best validation mAP is that of {' and '.join(best)}."
        caption += (
            " A value is chosen by its validation mAP; the test numbers only stand beside it."
        )
    caption += " The paper's Figure 4 varies m and k." if key in figures.AXES else ""
    about = Illustration(
        f"sweep-{variant}-{key}".replace(".", "-"), f"Sweep of {key}", text, caption
    )
    sweep.draw(about.stem(folder))
    about.write_table(folder, sweep.rows())
    return about


def _draw_search(folder: Path, search: SearchResults) -> Illustration:
    best = search.best()
    mean = shown(search.ranking()[best], digits=1)
    keys, words = ", ".join(search.settings), in_words(search.settings, best)
    about = Illustration(
        f"sweep-{search.variant}-{search.setting}".replace(".", "-").replace("+", "-"),
        f"Search over {keys}",
        f"The validation mAP of {len(search.trials())} trials of {search.variant}, against each of "
        f"{keys}. The best trial has {words}, with {mean}.",
        "A point is the mean of a trial's runs, and the ring marks the best trial: "
        f"{words}. Only that one was evaluated on the test split.",
    )
    search.draw(about.stem(folder))
    about.write_table(folder, search.rows())
    return about


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
