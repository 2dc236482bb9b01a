"""The finished runs of a data set and the entries beside them, as commands read them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from pipeline.datasets.difficult import describe_treatments
from pipeline.datasets.manifest import Manifest
from pipeline.errors import DamagedError, MismatchError, MissingError, advising
from pipeline.evaluation.entries import Entry, EntryEvaluation, read_entry
from pipeline.evaluation.metrics import read_evaluation
from pipeline.evaluation.predictions import Scores, read_logits
from pipeline.evaluation.runs import Run, Runs
from pipeline.files import exists, matching
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    ENTRIES,
    METRICS_FILE,
    PREDICTIONS_FILE,
    entry_folder,
    manifest_file,
    runs_folder,
)
from stages.checkout.manifests import HashName, changed_treatment, dataset_manifest
from stages.checkout.params import Request, has_variant
from stages.checkout.plans import RunPlan, plan_run, read_checkpoint, run_commands
from stages.console.messages import note
from stages.console.progress import progress_phase


def load_runs(
    request: Request, variants: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[Run]]:
    """Read the runs of variants x seeds.

    Raises:
        MissingError: a run was not trained and evaluated yet.
        DamagedError: a file of a run is damaged.
        MismatchError: a run was trained with other settings than those asked for; its metrics are
            of another checkpoint; or two runs have other regions or labels, so that no table may
            hold both.
    """
    make_all, show_made = _make_all(request, seeds), _show_made(request, variants, seeds)
    runs: dict[str, list[Run]] = {}
    first: Run | None = None
    with progress_phase("read runs", len(variants) * len(seeds), "run") as on_runs:
        for variant, seed in product(variants, seeds):
            plan = plan_run(request, variant, seed)
            missing = f"Run {make_all}, or {run_commands(plan)} for this run alone.{show_made}"
            run = _load_run(plan, missing)
            first = first or run
            _check_comparable(run, first, plan)
            runs.setdefault(variant, []).append(run)
            on_runs(1)
    return runs


def _make_all(request: Request, seeds: Sequence[int]) -> str:
    """The command that makes all missing runs, and what it does."""
    of_seeds = [word for seed in seeds for word in ("--seed", str(seed))]
    options = ["--dataset", request.dataset, *of_seeds, *request.set_options]
    return f"`gmpipe compare {shlex.join(options)}`, which makes all missing runs"


def _show_made(request: Request, variants: Sequence[str], seeds: Sequence[int]) -> str:
    """Sentences, after a blank, on how to show the runs that are made."""

    def is_made(variant: str, seed: int) -> bool:
        return exists(plan_run(request, variant, seed).folder / METRICS_FILE)

    made = [name for name in variants if all(is_made(name, seed) for seed in seeds)]
    fewer = f"variants=[{','.join(made)}]"
    if not made:
        of_all = [str(seed) for seed in seeds if all(is_made(name, seed) for name in variants)]
        made, fewer = of_all, f"seeds=[{','.join(of_all)}]"
    key = fewer.partition("=")[0]
    kept = [one for one in request.overrides if one.partition("=")[0] != key]
    sets = [word for override in (*kept, fewer) for word in ("--set", override)]
    options = ["--dataset", request.dataset, *sets]
    command = f"gmpipe report {shlex.join(options)}"
    named = f"`gmpipe runs list --dataset {shlex.quote(request.dataset)}` lists all runs"
    others = f" To show runs of other variants, name these with `--set variants=[...]`; {named}."
    return f" Or show only those that are there: `{command}`.{others}" if made else others


def _load_run(plan: RunPlan, missing: str) -> Run:
    """Read a finished run; ``missing`` is the remedy if it was not made."""
    again = f"Run {run_commands(plan, 'evaluate')}."
    with advising(missing, MissingError), advising(again, DamagedError):
        evaluation = read_evaluation(plan.folder / METRICS_FILE)
    checkpoint = read_checkpoint(plan)
    path = plan.folder / CHECKPOINT_FILE
    if evaluation.checkpoint_sha256 != checkpoint.sha256:
        raise MismatchError(
            f"{plan.folder / METRICS_FILE} is of another checkpoint, {evaluation.checkpoint_sha256}"
            f"; {path} has the sha256 {checkpoint.sha256}.",
            again,
        )
    return Run(
        name=plan.folder.name,
        settings=plan.settings,
        views=plan.views,
        recipe=checkpoint.recipe,
        history=checkpoint.history,
        parameters=checkpoint.parameters,
        evaluation=evaluation,
        checkpoint=path,
        predictions=plan.folder / PREDICTIONS_FILE,
        decisions=checkpoint.decisions,
    )


def _check_comparable(run: Run, first: Run, plan: RunPlan) -> None:
    treatments = [describe_treatments(one.evaluation.difficult) for one in (run, first)]
    differing = ""
    if all(treatments) and treatments[0] != treatments[1]:
        differing = (
            f" In the first, difficult labels are {treatments[0]}; in the second, {treatments[1]}."
        )
    for name in ("fingerprint", "train_sha256", "test_sha256"):
        own, others = getattr(run.evaluation, name), getattr(first.evaluation, name)
        if own != others:
            # Other labels of test images are no reason to train again.
            again = run_commands(plan, "evaluate") if name == "test_sha256" else run_commands(plan)
            raise MismatchError(
                f"{plan.folder} and {first.checkpoint.parent} can't be compared: `{name}` in "
                f"{METRICS_FILE} is {own}, expected {others}.{differing}",
                f"Run {again}, and the same for every other run that is out of date.",
            )


def load_scores(request: Request, runs: Runs) -> Scores:
    """Read the predictions of finished runs, and the truth of the images that they are for.

    Raises:
        MissingError, DamagedError: the predictions of a run can't be read.
        MismatchError: the manifest has other labels than when the runs were evaluated, or the
            predictions are of another network, or for other images than those of the first run.
    """
    manifest = dataset_manifest(request.dataset)
    first = next(iter(runs.values()))[0]
    _check_labels(manifest, first, plan_run(request, next(iter(runs)), first.evaluation.seed))
    image_ids: list[str] | None = None
    logits: dict[str, list[np.ndarray]] = {}
    every = [(variant, run) for variant, seeds in runs.items() for run in seeds]
    with progress_phase("read predictions", len(every), "run") as on_runs:
        for variant, run in every:
            again = run_commands(plan_run(request, variant, run.evaluation.seed), "evaluate")
            with advising(f"Run {again}.", MissingError, DamagedError, MismatchError):
                image_ids, of_run = read_logits(
                    run.predictions,
                    checkpoint_sha256=run.evaluation.checkpoint_sha256,
                    labels=len(manifest.vocabulary),
                    image_ids=image_ids,
                )
            logits.setdefault(variant, []).append(of_run)
            on_runs(1)
    assert image_ids is not None  # there is a run
    return Scores(image_ids, truth_of(manifest, image_ids), logits)


def truth_of(manifest: Manifest, image_ids: Sequence[str]) -> np.ndarray:
    """The labels (N, C) of N images of the test split, as `Manifest.truth` codes them."""
    rows = {image_id: row for row, image_id in enumerate(manifest.image_ids("test"))}
    truth: np.ndarray = manifest.truth("test")[[rows[image_id] for image_id in image_ids]]
    return truth


def _check_labels(manifest: Manifest, run: Run, plan: RunPlan) -> None:
    """Check that the manifest has the images and labels that a run was trained and evaluated on."""
    hashes: tuple[tuple[HashName, str, Sequence[str]], ...] = (
        ("train_sha256", "train", ("train", "evaluate")),
        ("test_sha256", "test", ("evaluate",)),
    )
    for name, split, commands in hashes:
        used, today = getattr(run.evaluation, name), getattr(manifest, name)
        if today != used:
            changed = changed_treatment(manifest, name, used)
            raise MismatchError(
                f"The {split} split of {manifest_file(manifest.dataset)} has other images or labels"
                f" ({today}) than when {run.checkpoint.parent} was made ({used})"
                f"{f': {changed}' if changed else ''}.",
                f"Run {run_commands(plan, *commands)}, and the same for every other run; or "
                "restore the manifest.",
            )


# Entries -----------------------------------------------------------------------------------------


def load_entries(request: Request, scores: Scores) -> tuple[list[Entry], Scores]:
    """Read the entries beside the runs of a data set; a note says which ones are left out, and why.

    Those are left out that are out of date, or lack a file since a command was killed.

    Args:
        scores: of the runs, which must be for the test images and labels of today.

    Returns:
        the entries that are for the same images and labels, and the scores with theirs.

    Raises:
        DamagedError: a file of an entry is damaged.
    """
    manifest = dataset_manifest(request.dataset)
    entries = []
    for folder in matching(runs_folder(request.dataset) / ENTRIES, "[!.]*"):
        if not folder.is_dir():  # it is not gmpipe's
            continue
        try:
            entry = read_entry_of(folder, manifest, scores.image_ids)
            if has_variant(request.train, entry.evaluation.name):
                raise MismatchError(
                    f"{folder} has the name of a variant.",
                    "Rename the variant, or evaluate the entry again with another `--name`, and "
                    f"delete {folder}.",
                )
        except (MismatchError, MissingError) as error:
            note(f"{error.problem} The tables leave it out. {error.remedy}")
            continue
        entries.append(entry)
    of_entries = {entry.evaluation.name: [entry.logits] for entry in entries}
    return entries, replace(scores, logits={**scores.logits, **of_entries})


def read_entry_of(
    folder: Path, manifest: Manifest | None, image_ids: Sequence[str] | None = None
) -> Entry:
    """Read an entry of the test images and labels of today.

    Args:
        folder: of the entry.
        manifest: of the data set; None to leave today's images and labels out of it.
        image_ids: the images that it must be for; None if any will do.

    Raises:
        MissingError, DamagedError: a file of it can't be read.
        MismatchError: it is of another name, data set, images or labels.
    """
    evaluation = read_metrics_of(folder)
    again = f"Run {entry_command(evaluation)}, or delete {folder}."
    if folder != entry_folder(evaluation.dataset, evaluation.name):
        raise MismatchError(
            f"{folder} is the entry {evaluation.name} of {evaluation.dataset}.",
            f"Move it back, or delete {folder}.",
        )
    if manifest is not None and evaluation.test_sha256 != manifest.test_sha256:
        changed = changed_treatment(manifest, "test_sha256", evaluation.test_sha256)
        raise MismatchError(
            f"{folder} is out of date: the test split had other images or labels"
            f"{f': {changed}' if changed else ''}.",
            again,
        )
    with advising(again, MissingError, DamagedError, MismatchError):
        _, logits = read_logits(
            folder / PREDICTIONS_FILE,
            checkpoint_sha256=evaluation.sha256,
            labels=len(evaluation.metrics.AP),
            image_ids=image_ids,
        )
    return Entry(evaluation, logits)


def read_metrics_of(folder: Path) -> EntryEvaluation:
    """Read the metrics of an entry, whatever labels and images they are for.

    Raises:
        MissingError, DamagedError: as `read_entry`.
    """
    remedy = f"Run `gmpipe evaluate` with its `--scores` or `--average` again, or delete {folder}."
    with advising(remedy, MissingError, DamagedError):
        return read_entry(folder / METRICS_FILE)


def entry_command(evaluation: EntryEvaluation) -> str:
    """The command that makes an entry."""
    option = "--average" if evaluation.kind == "average" else "--scores"
    words = ["gmpipe", "evaluate", "--dataset", evaluation.dataset]
    words += [word for name in evaluation.made_of for word in (option, name)]
    words += ["--logits"] if evaluation.kind == "logits" else []
    return f"`{shlex.join([*words, '--name', evaluation.name])}`"
