"""Stage `report`: the metrics of the runs -> reports/<dataset>/results.md, and the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipeline.datasets import scenes
from pipeline.errors import GmpipeError
from pipeline.evaluation.tables import labels_table, results_table
from pipeline.files import folder_lock, replacing_folder
from stages.evaluate import METRICS_FILE
from stages.layout import report_folder
from stages.params import DatasetSettings
from stages.train import plan_run


def load_runs(
    settings: DatasetSettings, variants: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """The metrics of variants x seeds.

    Raises:
        GmpipeError: a run was not evaluated yet.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for seed in seeds:
            path = plan_run(settings, variant, seed).folder / METRICS_FILE
            if not path.is_file():
                raise GmpipeError(
                    f"there are no metrics at {path}. Run `dvc repro`, or `gmpipe train` and "
                    f"`gmpipe evaluate` with --variant {variant} --seed {seed}."
                )
            runs.setdefault(variant, []).append(json.loads(path.read_text()))
    return runs


def tables(settings: DatasetSettings, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Both tables of a data set's runs, as Markdown."""
    first = next(iter(runs.values()))
    vocabulary = list(first[0]["AP"])
    groups = {"all": vocabulary}
    if settings.prepare.source == "scenes":
        groups = {
            "context": list(scenes.CONTEXT_LABELS),
            "position": list(scenes.POSITION_LABELS),
            "undrawn": list(scenes.UNDRAWN_LABELS),
            "plain": list(scenes.PLAIN_LABELS),
        }
    seeds = ", ".join(str(run["seed"]) for run in first)
    caption = (
        f"{settings.dataset}, split {first[0]['split']}, {first[0]['images']} images, in percent; "
        + (
            f"mean and sample standard deviation of seeds {seeds}"
            if len(first) > 1
            else f"seed {seeds}"
        )
    )
    return (
        f"## Results\n\n{caption}\n\n{results_table(runs)}\n\n"
        f"## Average precision by label\n\n{labels_table(runs, groups)}\n"
    )


def report(settings: DatasetSettings, variants: Sequence[str], seeds: Sequence[int]) -> str:
    """Write the tables of variants x seeds.

    Returns:
        the tables.
    """
    text = tables(settings, load_runs(settings, variants, seeds))
    folder = report_folder(settings.dataset)
    with folder_lock(folder), replacing_folder(folder) as temporary:
        (temporary / "results.md").write_text(text)
    return text
