"""The finished runs of a data set, as `compare`, `sweep` and `report` read them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.evaluation.metrics import read_evaluation
from pipeline.evaluation.predictions import Scores, read_scores
from pipeline.evaluation.runs import Run, Runs
from pipeline.learning.checkpoint import load_checkpoint
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    manifest_file,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.plans import RunPlan, plan_run
from stages.checkout.remedies import advising


def load_runs(
    request: Request, variants: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[Run]]:
    """Read the runs of variants x seeds.

    Raises:
        MissingError: a run was not trained and evaluated yet.
        DamagedError: a file of a run is damaged.
        MismatchError: a run was trained with other settings than those asked for, or two runs have
            other regions or labels, so that no table may hold both.
    """
    options = ["--dataset", request.dataset]
    options += [word for seed in seeds for word in ("--seed", str(seed))]
    options += request.set_options
    make_all = f"gmpipe compare {shlex.join(options)}"
    runs: dict[str, list[Run]] = {}
    first: Run | None = None
    for variant in variants:
        for seed in seeds:
            plan = plan_run(request, variant, seed)
            run = _load_run(plan, make_all)
            first = first or run
            _check_comparable(run, first, plan)
            runs.setdefault(variant, []).append(run)
    return runs


def _load_run(plan: RunPlan, make_all: str) -> Run:
    """Read a finished run; ``make_all`` is the command that makes all missing runs."""
    missing = (
        f"Run `{make_all}`, which makes all missing runs, or {_commands(plan)} for this run alone. "
        "`variants` and `seeds` in params.yaml list the runs that belong together."
    )
    damaged = f"Run {_commands(plan, 'evaluate')}."
    with advising(missing, MissingError), advising(damaged, DamagedError):
        evaluation = read_evaluation(plan.folder / METRICS_FILE)
    path = plan.folder / CHECKPOINT_FILE
    with advising(f"Run {_commands(plan)}.", MissingError, DamagedError, MismatchError):
        checkpoint = load_checkpoint(path)
    if checkpoint.settings != plan.settings:
        used, wanted = checkpoint.settings.model_dump(), plan.settings.model_dump()
        name = next(name for name in wanted if used[name] != wanted[name])
        raise MismatchError(
            f"{plan.folder} was trained with other settings: `{name}` was {used[name]!r}, expected "
            f"{wanted[name]!r}.",
            f"Run `dvc repro`, or {_commands(plan)}.",
        )
    return Run(
        name=plan.folder.name,
        settings=plan.settings,
        views=plan.views,
        recipe=checkpoint.recipe,
        evaluation=evaluation,
        checkpoint=path,
        history=plan.folder / HISTORY_FILE,
        predictions=plan.folder / PREDICTIONS_FILE,
    )


def _check_comparable(run: Run, first: Run, plan: RunPlan) -> None:
    for name in ("fingerprint", "labels_sha256"):
        own, others = getattr(run.evaluation, name), getattr(first.evaluation, name)
        if own != others:
            raise MismatchError(
                f"{plan.folder} and {first.checkpoint.parent} can't be compared: `{name}` in "
                f"{METRICS_FILE} is {own}, expected {others}.",
                f"Run {_commands(plan)}, and the same for every other run that is out of date.",
            )


def load_scores(request: Request, runs: Runs) -> Scores:
    """Read the predictions of finished runs, and the truth of the images that they are for.

    Raises:
        MissingError, DamagedError: the predictions of a run can't be read.
        MismatchError: the manifest has other labels than when the runs were evaluated, or the
            predictions are for other images than those of the first run.
    """
    manifest = dataset_manifest(request.dataset)
    first = next(iter(runs.values()))[0]
    if manifest.labels_sha256 != first.evaluation.labels_sha256:
        raise MismatchError(
            f"{manifest_file(request.dataset)} has other images or labels "
            f"({manifest.labels_sha256}) than when {first.checkpoint.parent} was evaluated "
            f"({first.evaluation.labels_sha256}).",
            "Train and evaluate the runs again, or restore the manifest.",
        )
    image_ids: list[str] | None = None
    scores: dict[str, list[np.ndarray]] = {}
    for variant, seeds in runs.items():
        for run in seeds:
            again = _commands(plan_run(request, variant, run.evaluation.seed), "evaluate")
            with advising(f"Run {again}.", MissingError, DamagedError, MismatchError):
                image_ids, run_scores = read_scores(run.predictions, image_ids)
            scores.setdefault(variant, []).append(run_scores)
    assert image_ids is not None  # there is a run
    rows = {image_id: row for row, image_id in enumerate(manifest.image_ids("test"))}
    truth = manifest.truth("test")[[rows[image_id] for image_id in image_ids]]
    return Scores(image_ids, truth, scores)


def _commands(plan: RunPlan, *names: str) -> str:
    """The commands, by default `train` and `evaluate`, that make a run."""
    return " and ".join(
        f"`gmpipe {name} {plan.options}`" for name in names or ("train", "evaluate")
    )
