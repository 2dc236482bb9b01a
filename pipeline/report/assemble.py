"""The page: tables, figures, gallery and words, put together from what was read of the checkout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.groups import label_groups
from pipeline.datasets.label_counts import LabelCounts
from pipeline.drawing import missing_letters
from pipeline.evaluation import bootstrap
from pipeline.evaluation.differences import (
    describe_detector,
    paper_differences,
    seen_by_detector,
)
from pipeline.evaluation.paper import paper_results
from pipeline.evaluation.runs import Run, deciding, ranking
from pipeline.evaluation.tables import (
    FEW,
    TOP3,
    caption,
    labels_csv,
    results_csv,
    results_markdown,
)
from pipeline.heads.matching.network import GmMlic
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.prediction import Scorer
from pipeline.report import illustrations as drawn
from pipeline.report.doubts import write_doubt_pictures
from pipeline.report.facts import what_was_run
from pipeline.report.figures import looks
from pipeline.report.folder import TABLES, write_data, write_frame
from pipeline.report.gallery import mean_label_nodes, shown_split, write_gallery
from pipeline.report.inputs import PageInputs, Phase, load_evaluated
from pipeline.report.rows import columns, label_cells, own_rows, paper_rows

Groups = Mapping[str, Sequence[str]]
"""Name of a group -> its labels."""


def write_page(folder: Path, inputs: PageInputs, phase: Phase) -> str:
    """Write a page into an empty folder.

    Args:
        phase: shows the parts of the work.

    Returns:
        the tables as Markdown, as in tables/results.md.

    Raises:
        MissingError, DamagedError: a file of a run can't be read.
    """
    scores, evaluations = inputs.scores, inputs.evaluations
    ranked = {variant: scores.logits[variant] for variant in ranking(evaluations)}
    with phase("intervals", len(ranked) * bootstrap.RESAMPLES, "resample") as on_resamples:
        intervals = bootstrap.intervals(ranked, scores.truth, inputs.base, on_resamples)
    text = results_markdown(
        inputs.manifest.dataset,
        inputs.source,
        inputs.detector,
        inputs.runs,
        intervals,
        inputs.base,
        _positives(inputs),
        entries=inputs.entries,
    )
    write_frame(folder)
    (folder / TABLES / "results.md").write_text(text, encoding="utf-8")
    for name, table in (("results.csv", results_csv), ("labels.csv", labels_csv)):
        (folder / TABLES / name).write_text(table(evaluations), encoding="utf-8")

    checkpoint = load_evaluated(inputs.shown)
    groups = label_groups(inputs.source, inputs.manifest.vocabulary)
    with phase("figures", None, "figure") as on_figures:
        figures, curves = _draw_figures(folder, inputs, on_figures)
    figures += _draw_label_map(folder, inputs, checkpoint, groups, phase)
    with phase("figures of sweeps", len(inputs.sweeps), "figure") as on_figures:
        for sweep in inputs.sweeps:
            figures.append(drawn.draw_sweep(folder, sweep))
            on_figures(1)
    gallery = write_gallery(folder, inputs, phase)
    doubts = write_doubt_pictures(folder, inputs, phase)

    write_data(folder, "curves", _rounded(curves, inputs.manifest.vocabulary))
    # Times have a script of their own: all others have the same bytes for the same runs.
    write_data(folder, "times", inputs.times)
    overview = {
        **_about_data_set(inputs, groups),
        **_numbers(inputs, intervals),
        "figures": [asdict(figure) for figure in figures],
        "missing_letters": missing_letters(_drawn_texts(inputs)),
        "gallery": gallery,
        "doubts": doubts,
        "run": what_was_run(inputs),
    }
    write_data(folder, "overview", overview)
    return text


def _draw_figures(
    folder: Path, inputs: PageInputs, on_figures: Callable[[int], object]
) -> tuple[list[drawn.Illustration], drawn.Curves]:
    """Draw the figures that need only metrics, histories and predictions.

    Each shows the variants that have what it draws.
    """
    evaluations = {name: inputs.evaluations[name] for name in inputs.variants}
    runs = {name: inputs.runs[name] for name in evaluations if name in inputs.runs}
    scores = inputs.scores.logits
    truth, labels, base = inputs.scores.truth, inputs.manifest.vocabulary, inputs.base
    ranked, decided = ranking(evaluations), deciding(evaluations)
    figures: list[drawn.Illustration] = []
    curves: drawn.Curves = {}

    if ranked:
        drawn.draw_average_precision(folder, ranked, next(iter(ranked)))
        on_figures(1)
    if len(ranked) > 1 and base in ranked:
        figures.append(drawn.draw_gains(folder, ranked, base))
        on_figures(1)
    figures.append(drawn.draw_learning(folder, drawn.histories_of(runs)))
    on_figures(1)
    if ranked:
        first_seed = {variant: scores[variant][0] for variant in ranked}
        figure, curves = drawn.draw_precision_recall(folder, first_seed, truth, labels)
        figures.append(figure)
        on_figures(1)
    probable = {variant: scores[variant] for variant in ranked if variant in decided}
    if probable := {**probable, **_calibrated(inputs)}:
        figures.append(drawn.draw_calibration(folder, probable, truth))
        on_figures(1)
    if len(labels) > 1 and base in decided:
        run = _in_words(inputs)
        figures.append(drawn.draw_co_occurrence(folder, scores[base][0], truth, labels, run))
        on_figures(1)
    return figures, curves


def _calibrated(inputs: PageInputs) -> dict[str, list[np.ndarray]]:
    """Variant, and that its scores are calibrated -> (N, C) calibrated logits of each run."""
    return {
        f"{variant}, calibrated": [
            run.decisions.calibrated(logits)
            for run, logits in zip(inputs.runs[variant], inputs.scores.logits[variant], strict=True)
            if run.decisions is not None
        ]
        for variant in inputs.variants
        if variant in inputs.runs
        and inputs.runs[variant][0].settings.decisions.calibration != "none"
    }


def _draw_label_map(
    folder: Path,
    inputs: PageInputs,
    checkpoint: Checkpoint,
    groups: Groups | None,
    phase: Phase,
) -> list[drawn.Illustration]:
    """Draw the map of the labels, unless the network has no label nodes or there are too few."""
    scorer = Scorer.of_checkpoint(checkpoint, inputs.shown.name)
    if not isinstance(scorer.network, GmMlic):
        return []
    split = shown_split(inputs, checkpoint.settings.regions)
    with phase("map of the labels", len(split), "image") as on_images:
        nodes = mean_label_nodes(scorer, split, on_images)
    vectors, labels = checkpoint.label_vectors.numpy(), inputs.manifest.vocabulary
    figure = drawn.draw_label_map(folder, vectors, nodes, labels, groups, _in_words(inputs))
    return [] if figure is None else [figure]


def _positives(inputs: PageInputs) -> list[int]:
    """How many of the images that were scored have each label."""
    positives: list[int] = LabelCounts.of_truth(inputs.scores.truth).positive.tolist()
    return positives


def _drawn_texts(inputs: PageInputs) -> list[str]:
    """The user's texts that figures show."""
    values = [text for sweep in inputs.sweeps for text in sweep.texts()]
    return [*inputs.manifest.vocabulary, *values]


def _in_words(inputs: PageInputs) -> str:
    return f"{inputs.base}, seed {inputs.shown.evaluation.seed}"


def _rounded(
    curves: drawn.Curves, labels: Sequence[str]
) -> list[dict[str, list[list[float]]] | None]:
    """The curves of each label by variant; None for a label without a positive.

    No label is a key of the page's objects: JavaScript gives some names, such as `__proto__`,
    a meaning.
    """
    return [
        {
            variant: [np.round(axis, 4).tolist() for axis in curve]
            for variant, curve in curves[label].items()
        }
        if label in curves
        else None
        for label in labels
    ]


def _about_data_set(inputs: PageInputs, groups: Groups | None) -> dict[str, Any]:
    """The overview's words and names."""
    detector = describe_detector(inputs.detector, inputs.shown.recipe)
    seen = seen_by_detector(inputs.shown, inputs.detector)
    labels = inputs.manifest.vocabulary
    group_of = None
    if groups is not None:
        of = {label: group for group, members in groups.items() for label in members}
        group_of = [of[label] for label in labels]
    return {
        "dataset": inputs.manifest.dataset,
        "caption": caption(inputs.manifest.dataset, inputs.evaluations[inputs.base]),
        "detector": f"{detector}. {seen}" if seen else detector,
        "base": inputs.base,
        "variants": inputs.variants,
        "looks": looks(inputs.variants),
        "labels": list(labels),
        "groups": group_of,
        "positives": _positives(inputs),
        "few": FEW,
        "thresholds": _thresholds(inputs.shown),
    }


def _thresholds(run: Run) -> list[float] | None:
    """The run's fitted thresholds by label, as probabilities in percent; None without any."""
    if run.decisions is None or run.settings.decisions.thresholds == "fixed":
        return None
    return [float(share) for share in np.round(100 * run.decisions.probabilities, 2)]


def _numbers(inputs: PageInputs, intervals: bootstrap.Intervals) -> dict[str, Any]:
    """The overview's tables, with the paper's numbers where it has any."""
    evaluations, labels = inputs.evaluations, inputs.manifest.vocabulary
    first = next(iter(inputs.runs.values()))[0]
    paper = paper_results(inputs.source, first.evaluation)
    rows = own_rows(evaluations, intervals.of, inputs.base)
    of_paper = None
    if paper is not None:
        rows += paper_rows(paper)
        of_paper = {
            "title": paper.title,
            "ap": [paper.ap.get(label) for label in labels] if paper.ap else None,
            "differences": paper_differences(inputs.runs, paper, inputs.detector),
        }
    return {
        "ap": label_cells(evaluations),
        "columns": columns(evaluations, inputs.base),
        "rows": rows,
        "interval": intervals.about,
        "interval_is_weak": intervals.weak,
        "top3": TOP3,
        "paper": of_paper,
    }
