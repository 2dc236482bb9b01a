"""Metrics of many runs -> the tables that people read, as Markdown and as CSV.

A cell is a number in percent, or mean ± sample standard deviation over several seeds; "-" stands
for a metric that is not defined.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pipeline.datasets.difficult import describe_treatments
from pipeline.datasets.groups import label_groups
from pipeline.evaluation.bootstrap import COVERAGE, Intervals
from pipeline.evaluation.differences import paper_differences, seen_by_detector
from pipeline.evaluation.entries import Entry, EntryEvaluation
from pipeline.evaluation.metrics import GROUPS, SIX, Evaluation
from pipeline.evaluation.paper import NOT_REPRODUCED, PaperResults, method_of, paper_results
from pipeline.evaluation.runs import Evaluations, Runs, evaluations_of
from pipeline.evaluation.spread import mean_of, spread_of
from pipeline.formats.text import csv_cell, markdown, markdown_table, storable
from pipeline.regions.detector import DetectorDescription

BASE = "full"
"""The variant that all others are compared with, where it is among them."""

TOP3 = (
    "Top-3 counts the labels over 0.5 among the three best of an image, as the paper's Table 2 "
    "implies; most other papers always count three. metrics.json has both, as top3 and top3_forced."
)
"""Which labels the columns of top-3 count."""

FEW = 20
"""With fewer positives in the test split, the average precision of a label means little: on VOC
2007, the 95 % interval of an AP from 20 positives is ± 10 points (docs/guides/rare-labels.md)."""

HEADLINES = ("mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1")


def default_base(variants: Iterable[str]) -> str:
    """The variant that the others are compared with unless one is chosen: `BASE`, or the first."""
    names = list(variants)
    return BASE if BASE in names else names[0]


def results_markdown(
    dataset: str,
    source: str,
    detector: DetectorDescription | None,
    runs: Runs,
    intervals: Intervals,
    base: str,
    positives: Sequence[int],
    seconds: Mapping[str, Sequence[float | None]] | None = None,
    entries: Sequence[Entry] = (),
) -> str:
    """Write all tables of a data set's runs, each under a heading.

    Args:
        dataset: its name in params.yaml.
        source: of the data set, as in its settings; decides how labels are grouped.
        detector: as in `differences.describe_detector`.
        intervals: against ``base``.
        base: the variant that the others are compared with.
        positives: of each label among the images that were scored.
        seconds: variant -> how long the training of each seed took, None where it is not known;
            None if the tables must not depend on it.
        entries: to show beside the runs.
    """
    evaluations = evaluations_of(runs, entries)
    first = next(iter(evaluations.values()))
    shown = next(iter(runs.values()))[0]
    seen = seen_by_detector(shown, detector)
    about = markdown(caption(dataset, first))
    notes = f"\n\n{markdown(TOP3)}" + (f"\n\n{seen}." if seen else "")
    sections = {"Results": f"{about}\n\n{results_table(runs, seconds, entries)}{notes}"}
    paper = paper_results(source, shown.evaluation)
    if paper is not None:
        lines = paper_differences(runs, paper, detector)
        sections["Comparison with the paper"] = (
            f"GM-MLIC (IJCAI 2021), {paper.title}, in percent.\n\n"
            f"{paper_table(evaluations, paper)}\n\n{_not_reproduced(paper)}What differs:\n\n"
            + "\n".join(f"- {markdown(line)}" for line in lines)
        )
    if any(seeds[0].metrics.decided for seeds in evaluations.values()):
        sections["Fitted decisions"] = decisions_table(evaluations)
    groups = label_groups(source, list(first[0].metrics.AP))
    printed = paper.ap if paper is not None else {}
    few = f"\n\nfew: fewer than {FEW} positives, so that the numbers of the label mean little."
    sections["Average precision by label"] = labels_table(
        evaluations, groups, printed, positives
    ) + few * any(0 < count < FEW for count in positives)
    differences = {
        variant: (mean_difference(evaluations, variant, base), *interval.difference)
        for variant, interval in intervals.of.items()
        if interval.difference is not None
    }
    if differences:
        sections[f"Difference from {base}"] = (
            f"In points of mAP, averaged over the seeds, with the {intervals.about}.\n\n"
            f"{differences_table(differences, base)}"
        )
    return "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())


def caption(dataset: str, seeds: Sequence[Evaluation | EntryEvaluation]) -> str:
    """Say what a table of a data set's runs shows, from the evaluations of one of its rows."""
    first = seeds[0]
    ap = list(first.metrics.AP.values())
    counted = sum(value is not None for value in ap)
    of_labels = ""
    if 0 < counted < len(ap):  # none is counted where the scores do not rank
        of_labels = f"mAP, CP and CR over the {counted} of {len(ap)} labels that have a positive; "
    if first.difficult:
        of_labels += f"difficult labels {describe_treatments(first.difficult)}; "
    of_seeds = f"seed {first.seed}"
    if len(seeds) > 1:
        numbers = ", ".join(str(evaluation.seed) for evaluation in seeds)
        of_seeds = f"mean and sample standard deviation of seeds {numbers}"
    images = f"{first.images:,} image" + ("" if first.images == 1 else "s")
    return f"{dataset}, split {first.split}, {images}, in percent; {of_labels}{of_seeds}"


def results_table(
    runs: Runs,
    seconds: Mapping[str, Sequence[float | None]] | None = None,
    entries: Sequence[Entry] = (),
) -> str:
    """Write one row per variant and entry: the headline metrics, and what the network costs.

    Args:
        seconds, entries: as in `results_markdown`.
    """
    header = ["variant", *HEADLINES, "parameters"]
    rows = [
        [variant, *_cells([run.evaluation for run in seeds], HEADLINES), f"{seeds[0].parameters:,}"]
        for variant, seeds in runs.items()
    ]
    if seconds is not None:
        header.append("training, s")
        for row in rows:
            mean = mean_of(seconds[row[0]])
            row.append("-" if mean is None else f"{mean:.1f}")
    for entry in entries:
        cells = [entry.evaluation.name, *_cells([entry.evaluation], HEADLINES)]
        rows.append([*cells, *("-" for _ in header[len(cells) :])])
    return markdown_table(header, rows)


def decisions_table(runs: Evaluations) -> str:
    """Write CF1, OF1 and calibration error with and without what each run fitted; Markdown.

    Variants that fitted nothing are not in the table.
    """
    names = ("CF1", "OF1")
    header = [column for name in names for column in (f"{name} at 0.5", f"decided {name}")]
    rows = []
    for variant, seeds in runs.items():
        errors = [one.metrics.calibration_error for one in seeds]
        if seeds[0].metrics.decided is None:
            continue
        columns = [column for name in names for column in (name, f"decided {name}")]
        ece = [
            cell(None if error is None else getattr(error, when) for error in errors)
            for when in ("before", "after")
        ]
        rows.append([variant, *_cells(seeds, columns), *ece])
    return markdown_table(["variant", *header, "calibration error", "after calibration"], rows)


def differences_table(rows: Mapping[str, tuple[float, float, float]], base: str) -> str:
    """Write one row per variant: its mAP minus that of ``base``, in points, and the interval.

    Args:
        rows: variant -> difference, lower and upper end.
        base: the variant that the others are compared with.
    """
    cells = [
        [variant, f"{difference:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        for variant, (difference, low, high) in rows.items()
    ]
    header = ["variant", f"mAP - {base}", f"{100 * COVERAGE:.0f} % interval"]
    return markdown_table(header, cells)


def mean_difference(runs: Evaluations, variant: str, base: str) -> float:
    """The mAP of a variant minus that of ``base``, averaged over the seeds that both have.

    Both must have an mAP.
    """
    means = [mean_of(one.metrics.mAP for one in runs[name]) for name in (variant, base)]
    of_variant, of_base = means
    assert of_variant is not None
    assert of_base is not None
    return of_variant - of_base


def sweep_table(
    key: str,
    runs: Evaluations,
    validation: Mapping[str, Sequence[float]],
    best: Collection[str] = (),
) -> str:
    """Write one row per value of the setting ``key``; Markdown.

    Args:
        key: of the setting.
        runs: of each value, evaluated on the test split.
        validation: value -> validation mAP of its runs; empty if they have none.
        best: the values to mark.
    """
    names = ("mAP", "CF1", "OF1")
    if not validation:
        rows = [[value, *_cells(seeds, names)] for value, seeds in runs.items()]
        return markdown_table([key, *names], rows)
    rows = [
        [
            value,
            cell(validation[value]) + (" (best)" if value in best else ""),
            *_cells(seeds, names),
        ]
        for value, seeds in runs.items()
    ]
    return markdown_table([key, "validation mAP", *(f"test {name}" for name in names)], rows)


def paper_table(runs: Evaluations, paper: PaperResults) -> str:
    """Write a row for each method of the paper's tables, below those of our variants of it.

    Variants that are none of these methods are not in the table; Markdown.
    """
    columns = paper.columns
    rows = []
    for method, printed in paper.methods.items():
        for variant, seeds in runs.items():
            if method_of(variant) == method:
                rows.append([method, f"ours: {variant}", *_cells(seeds, columns)])
        if method in NOT_REPRODUCED:
            rows.append([method, "not reproduced", *("-" for _ in columns)])
        rows.append([method, "paper", *(cell([printed.get(name)]) for name in columns)])
    return markdown_table(["method", "of", *columns], rows)


def _not_reproduced(paper: PaperResults) -> str:
    """A list, before an empty line, of the paper's methods that have no variant of ours, and why;
    empty if there are none."""
    lines = [
        f"- {method}: {why}." for method, why in NOT_REPRODUCED.items() if method in paper.methods
    ]
    return "Not reproduced:\n\n" + "\n".join(lines) + "\n\n" if lines else ""


def labels_table(
    runs: Evaluations,
    groups: Mapping[str, Sequence[str]] | None,
    printed: Mapping[str, float | None],
    positives: Sequence[int],
) -> str:
    """Write the AP of each label by variant; Markdown.

    Args:
        groups: name of a group -> its labels, in the order of the rows. Each group gets a row
            with its mean. None if the data set defines no groups: there is no such column then.
        printed: label -> the paper's AP; a column of its own unless empty.
        positives: of each label, in the vocabulary's order; fewer than `FEW` are marked.
    """
    ap = {variant: [one.metrics.AP for one in seeds] for variant, seeds in runs.items()}
    known = list(next(iter(ap.values()))[0])

    def row(labels: Sequence[str]) -> list[str]:
        """The mean over some labels, by variant and in the paper."""
        of_paper = [cell([mean_of(map(printed.get, labels))])] if printed else []
        return [
            *(
                cell(mean_of(of_seed[label] for label in labels) for of_seed in seeds)
                for seeds in ap.values()
            ),
            *of_paper,
        ]

    counts = {
        label: f"{count:,}" + " (few)" * (0 < count < FEW)
        for label, count in zip(known, positives, strict=True)
    }
    columns = ["label", *runs, *(["paper"] if printed else []), "positives"]
    if groups is None:
        return markdown_table(columns, [[label, *row([label]), counts[label]] for label in known])
    rows = []
    for group, members in groups.items():
        labels = [label for label in members if label in known]
        if labels:
            rows += [[group, label, *row([label]), counts[label]] for label in labels]
            rows.append([group, "mean", *row(labels), ""])
    return markdown_table(["group", *columns], rows)


def results_csv(runs: Evaluations) -> str:
    """Write one row per run: variant, seed, and every metric but the AP of single labels.

    The cell of a metric that is not defined is empty.
    """
    every = [evaluation.metrics for seeds in runs.values() for evaluation in seeds]
    eleven_points = ["mAP11"] if any(one.mAP11 is not None for one in every) else []
    columns = {name: name for name in ("mAP", *eleven_points)} | {
        "_".join(filter(None, (field if group else "", name))): f"{group} {name}".strip()
        for group, field in GROUPS.items()
        if group != "decided" or any(one.decided for one in every)
        for name in SIX
    }
    return as_csv(
        {
            "variant": variant,
            "seed": evaluation.seed,
            **{name: evaluation.metrics.number(column) for name, column in columns.items()},
        }
        for variant, seeds in runs.items()
        for evaluation in seeds
    )


def labels_csv(runs: Evaluations) -> str:
    """Write one row per run and label: the AP; empty where it is not defined."""
    return as_csv(
        {"variant": variant, "seed": evaluation.seed, "label": label, "AP": ap}
        for variant, seeds in runs.items()
        for evaluation in seeds
        for label, ap in evaluation.metrics.AP.items()
    )


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys, of which there is at least one, as CSV with a header.

    Texts are `storable`, and as `csv_cell` gives them.
    """
    rows = list(rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {
            name: csv_cell(storable(value)) if isinstance(value, str) else value
            for name, value in row.items()
        }
        for row in rows
    )
    return stream.getvalue()


def _cells(seeds: Sequence[Evaluation | EntryEvaluation], columns: Iterable[str]) -> list[str]:
    return [cell(one.metrics.number(column) for one in seeds) for column in columns]


def cell(values: Iterable[float | None]) -> str:
    """Mean and spread of a number over the seeds; "-" if it is defined for none."""
    spread = spread_of(values)
    if spread is None:
        return "-"
    if spread.deviation is None:
        return f"{spread.mean:.1f}"
    return f"{spread.mean:.1f} ± {spread.deviation:.1f}"
