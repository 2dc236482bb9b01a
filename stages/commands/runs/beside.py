"""Command `evaluate` with `--scores` or `--average`: entries beside the runs of a data set.

Either way, scores for all test images become an entry. Only the manifest is needed for it.

Letters: N images, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic_core import PydanticCustomError

from pipeline.datasets.groups import has_eleven_points
from pipeline.datasets.manifest import Manifest
from pipeline.entries.averages import average_of
from pipeline.entries.scores import read_scores
from pipeline.errors import DamagedError, InputError, MismatchError, MissingError, advising
from pipeline.evaluation import bootstrap
from pipeline.evaluation.entries import EntryEvaluation, Kind, read_entry, write_entry
from pipeline.evaluation.metrics import Evaluation, read_evaluation, shown
from pipeline.evaluation.metrics import evaluate as measure
from pipeline.evaluation.predictions import read_logits, write_predictions
from pipeline.files import check_writable, exists, folder_lock, sha256_file, tidy, write_json
from pipeline.formats.text import counted
from pipeline.names import check_name, nearest_name
from pipeline.shards.failures import read_failures
from stages.checkout.caches import advising_on_cache
from stages.checkout.keys import name_error
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SUMMARY_FILE,
    cache_folder,
    entry_folder,
    is_entry_folder,
    manifest_file,
    run_of_folder,
    runs_folder,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request, has_variant
from stages.checkout.results import truth_of
from stages.commands.runs.listing import folder_of_name
from stages.console.messages import note
from stages.console.progress import progress_phase
from stages.evaluate import commit_of_checkout, note_without_negative


def evaluate_scores(request: Request, file: Path, name: str | None, *, logits: bool) -> str:
    """Put a model's scores in a file beside the runs.

    Args:
        file: as `read_scores` reads it.
        name: of the entry; None for that of the file.
        logits: whether the scores are logits; else they are probabilities.

    Returns:
        a line with the headline numbers.

    Raises:
        InputError: the file or the name can't be used, or the name is that of an entry that was
            made of another file.
        MissingError, DamagedError: the manifest can't be read.
        BusyError: another process writes to the entry's folder.
    """
    name = nearest_name(file.stem) if name is None else name
    _check_name(request, name)
    manifest = dataset_manifest(request.dataset)
    image_ids = _scored_images(manifest)
    table = read_scores(file, manifest.vocabulary, image_ids)
    for sentence in table.notes:
        note(sentence)
    if logits:
        numbers = table.scores
        if (numbers >= 0).all() and (numbers <= 1).all():
            note(
                f"{file}: all scores are from 0 to 1, as probabilities are. If they are, leave "
                "`--logits` out."
            )
    else:
        with advising(
            "If they are logits, add `--logits`. If not, change them to probabilities.", InputError
        ):
            numbers = table.logits_of_probabilities()
    kind: Kind = "logits" if logits else "probabilities"
    return _write(
        request, manifest, name, (kind, {str(file): sha256_file(file)}), image_ids, numbers
    )


def evaluate_average(request: Request, runs: Sequence[str], name: str | None) -> str:
    """Put the average of runs' probabilities beside them.

    Args:
        runs: names or folders of two or more runs of the data set.
        name: of the entry; None for `average`.

    Returns:
        a line with the headline numbers.

    Raises:
        InputError: the runs or the name can't be used, or the name is that of an entry that was
            made of other runs.
        MissingError, DamagedError: a run or the manifest can't be read.
        MismatchError: a run was evaluated on other images or labels than those of today.
        BusyError: another process writes to the entry's folder.
    """
    name = "average" if name is None else name
    _check_name(request, name)
    runs = [_name_of_run(request.dataset, named) for named in runs]
    if len(set(runs)) < max(2, len(runs)):
        raise InputError(
            f"--average names {', '.join(runs)}; expected two or more runs, and each once.",
            "Repeat the option: `--average full-s0 --average max-pool-s0`.",
        )
    manifest = dataset_manifest(request.dataset)
    image_ids = _scored_images(manifest)
    made_of: dict[str, str] = {}
    logits = []
    with progress_phase("read predictions", len(runs), "run") as on_runs:
        for run in runs:
            evaluation, of_run = _read_run(request, run, manifest, image_ids)
            made_of[run] = evaluation.checkpoint_sha256
            logits.append(of_run)
            on_runs(1)
    return _write(request, manifest, name, ("average", made_of), image_ids, average_of(logits))


def _check_name(request: Request, name: str) -> None:
    """Refuse what can't be told from a run or a variant."""
    try:
        check_name(name)
    except PydanticCustomError as error:
        raise name_error(name, "--name", error.context or {}) from error
    if has_variant(request.train, name) or run_of_folder(name) is not None:
        raise InputError(
            f"--name: {name!r} is the name of a variant or a run.",
            "Choose another name with `--name`.",
        )


def _check_replaced(folder: Path, made_of: Mapping[str, str]) -> None:
    """Refuse to replace an entry that was made of another file or of other runs."""
    try:
        former = read_entry(folder / METRICS_FILE)
    except (MissingError, DamagedError):
        return
    if former.made_of.keys() != made_of.keys():
        raise InputError(
            f"There is an entry {former.name!r} already, of other scores: {former.describe()}.",
            f"Choose another name with `--name`, or delete {folder}.",
        )


def _name_of_run(dataset: str, named: str) -> str:
    """The name of a run that is given by its name or, as `runs list` shows it, by its folder."""
    path, runs = Path(named), runs_folder(dataset)
    if path.absolute().parent == runs.absolute():
        return path.name
    if len(path.parts) != 1:
        raise InputError(
            f"--average: {named} is no run of the data set {dataset}: expected a name, or a folder "
            f"in {runs}.",
            f"`gmpipe runs list --dataset {dataset}` lists the runs.",
        )
    return named


def _scored_images(manifest: Manifest) -> list[str]:
    """The test images on which runs are evaluated: those that don't lack regions."""
    with advising_on_cache(manifest.dataset):
        failures = read_failures(cache_folder(manifest.dataset))
    return [image_id for image_id in manifest.image_ids("test") if image_id not in failures]


def _read_run(
    request: Request, name: str, manifest: Manifest, image_ids: Sequence[str]
) -> tuple[Evaluation, np.ndarray]:
    """Read the metrics and the logits (N, C) of a run of today's test images and labels."""
    folder = folder_of_name(request.dataset, name)
    if is_entry_folder(folder):
        raise InputError(f"--average: {name!r} is an entry.", "Average runs.")
    run = run_of_folder(folder.name)
    options = f"--dataset {request.dataset}"
    if run is not None:
        options += f" --variant {run.variant} --seed {run.seed}"
    again = f"Run `gmpipe evaluate {options}`"
    again += ", with the same `--set` options." if run is not None and run.hashed else "."
    with advising(again, MissingError, DamagedError, MismatchError):
        evaluation = read_evaluation(folder / METRICS_FILE)
        if evaluation.test_sha256 != manifest.test_sha256:
            raise MismatchError(
                f"{folder} was evaluated on other test images or labels than "
                f"{manifest_file(request.dataset)} has."
            )
        checkpoint = folder / CHECKPOINT_FILE
        if exists(checkpoint) and sha256_file(checkpoint) != evaluation.checkpoint_sha256:
            raise MismatchError(f"{folder / METRICS_FILE} is of another {CHECKPOINT_FILE}.")
        _, logits = read_logits(
            folder / PREDICTIONS_FILE,
            checkpoint_sha256=evaluation.checkpoint_sha256,
            labels=len(manifest.vocabulary),
            image_ids=image_ids,
        )
    if evaluation.metrics.mAP is None or evaluation.metrics.all is None:
        raise InputError(
            f"The scores of {name} are no probabilities that rank images, so they can't be "
            "averaged.",
            f"Leave `--average {name}` out.",
        )
    return evaluation, logits


def _write(
    request: Request,
    manifest: Manifest,
    name: str,
    source: tuple[Kind, Mapping[str, str]],
    image_ids: Sequence[str],
    logits: NDArray[np.float64],
) -> str:
    """Measure an entry, and write its files.

    Args:
        source: `kind` and `made_of` of `EntryEvaluation`.
        image_ids: N.
        logits: (N, C).
    """
    folder = entry_folder(request.dataset, name)
    _check_replaced(folder, source[1])
    truth = truth_of(manifest, image_ids)
    labels = manifest.vocabulary
    stored = logits.astype(np.float32)  # so that the metrics are those of predictions.parquet
    eleven = has_eleven_points(request.prepare.source, labels)
    metrics = measure(stored, truth, labels, voc11=eleven)
    note_without_negative(truth, manifest)
    commit, uncommitted = commit_of_checkout()
    evaluation = EntryEvaluation(
        metrics,
        name,
        *source,
        dataset=request.dataset,
        split=f"{manifest.split_name}/test",
        images=len(image_ids),
        left_out=len(manifest.image_ids("test")) - len(image_ids),
        commit=commit,
        uncommitted=uncommitted,
        test_sha256=manifest.test_sha256,
        difficult=manifest.treatments,
    )
    with folder_lock(folder):
        check_writable(folder, EVALUATION_FILES)
        tidy(folder)
        write_predictions(
            folder / PREDICTIONS_FILE,
            image_ids,
            stored,
            np.full(stored.shape, -1),
            checkpoint_sha256=evaluation.sha256,
        )
        write_json(folder / SUMMARY_FILE, metrics.summary())
        write_entry(folder / METRICS_FILE, evaluation)  # last, as for a run
    with progress_phase("interval", bootstrap.RESAMPLES, "resample") as on_resamples:
        interval = bootstrap.intervals({name: [stored]}, truth, name, on_resamples).of[name]
    numbers = ", ".join(f"{of} {shown(metrics.number(of))}" for of in ("mAP", "CF1", "OF1"))
    low, high = interval.ends
    left_out = evaluation.left_out
    ending = f"; {counted(left_out, 'image')} without regions left out" if left_out else ""
    interval_of = f"{100 * bootstrap.COVERAGE:.0f} % interval of the mAP"
    return f"{folder}: {numbers}; {interval_of} {low:.2f} to {high:.2f}{ending}"
