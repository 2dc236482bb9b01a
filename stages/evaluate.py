"""Stage `evaluate`: a run's checkpoint on the test split -> predictions and metrics."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

import numpy as np

from pipeline.datasets.groups import has_eleven_points
from pipeline.datasets.label_counts import LabelCounts
from pipeline.datasets.manifest import Manifest
from pipeline.errors import MismatchError, advising
from pipeline.evaluation.diagnostics import with_decisions
from pipeline.evaluation.metrics import Evaluation, shown, write_evaluation
from pipeline.evaluation.metrics import evaluate as measure
from pipeline.evaluation.predictions import write_predictions
from pipeline.files import check_writable, exists, folder_lock, tidy, write_json
from pipeline.formats.text import counted, first_few
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.prediction import NotFinite, Scorer
from pipeline.learning.splits import open_split
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import check_same_recipe
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SUMMARY_FILE,
    manifest_file,
)
from stages.checkout.plans import (
    RunPlan,
    check_training_rows,
    open_inputs,
    read_checkpoint,
    refill_command,
)
from stages.checkout.times import record_time
from stages.console.messages import note
from stages.console.progress import progress_phase


def evaluate(run: RunPlan) -> str:
    """Score the test split with a trained run, and write predictions and metrics beside it.

    Returns:
        a line with the headline numbers.

    Raises:
        MissingError, DamagedError: the checkpoint, or something else that is read, is missing or
            damaged.
        NotFinite: a score is nan or infinite.
        MismatchError: the checkpoint was trained with other settings than those asked for, or on
            other images, labels, regions or label vectors than those of today.
        BusyError: another process writes to the run's folder.
    """
    began = time.monotonic()
    with folder_lock(run.folder):  # before the checkpoint is read, which a training may replace
        if exists(run.folder):
            check_writable(run.folder, EVALUATION_FILES)
        tidy(run.folder)
        line = _evaluate(run)
    record_time(run.dataset, "evaluate", began, run=run.folder.name)
    return line


def _evaluate(run: RunPlan) -> str:
    checkpoint = read_checkpoint(run)
    manifest, cache, vectors = open_inputs(run.dataset, checkpoint.settings)
    check_same_inputs(run, checkpoint, manifest, cache, vectors)
    with advising_on_cache(run.dataset):
        split = open_split(cache, manifest, "test", regions=checkpoint.settings.regions)
    again = (
        f"Restore {run.folder / CHECKPOINT_FILE}, or train again: `gmpipe train {run.options}`. If "
        "that does not help, check the regions: `gmpipe cache verify --dataset "
        f"{run.dataset}`."
    )
    with (
        advising(again, NotFinite),
        progress_phase(f"evaluate {run.folder.name}", len(split), "image") as on_images,
    ):
        predictions = Scorer.of_checkpoint(checkpoint, str(run.folder)).predict(split, on_images)
    metrics = measure(
        predictions.logits,
        split.truth,
        manifest.vocabulary,
        voc11=has_eleven_points(run.source, manifest.vocabulary),
        ranks=checkpoint.settings.ranks,
        decides=checkpoint.settings.decides,
    )
    if checkpoint.decisions is not None:
        metrics = with_decisions(metrics, predictions.logits, split.truth, checkpoint.decisions)
    if metrics.mAP is not None:
        note_without_negative(split.truth, manifest)
    commit, uncommitted = commit_of_checkout()
    evaluation = Evaluation(
        metrics,
        dataset=run.dataset,
        split=f"{manifest.split_name}/test",
        variant=run.variant,
        seed=run.seed,
        epoch=checkpoint.epoch,
        trained_images=checkpoint.trained_images,
        images=len(split),
        left_out=split.left_out,
        counts=manifest.counts,
        commit=commit,
        uncommitted=uncommitted,
        fingerprint=cache.fingerprint,
        train_sha256=checkpoint.train_sha256,
        test_sha256=manifest.test_sha256,
        checkpoint_sha256=checkpoint.sha256,
        difficult=manifest.treatments,
    )
    write_predictions(
        run.folder / PREDICTIONS_FILE,
        split.image_ids,
        predictions.logits,
        predictions.regions,
        checkpoint_sha256=checkpoint.sha256,
    )
    write_json(run.folder / SUMMARY_FILE, metrics.summary())
    # Last: a run with metrics of its checkpoint counts as evaluated.
    write_evaluation(run.folder / METRICS_FILE, evaluation)
    return _summary(run, evaluation)


def _summary(run: RunPlan, evaluation: Evaluation) -> str:
    number, left_out = evaluation.metrics.number, evaluation.left_out
    names = ("mAP", "OF1", *(["decided OF1"] if evaluation.metrics.decided else []))
    numbers = ", ".join(f"{name} {shown(number(name))}" for name in names)
    ending = f"; {counted(left_out, 'image')} without regions left out" if left_out else ""
    return f"{run.folder}: {numbers}{ending}"


def note_without_negative(truth: np.ndarray, manifest: Manifest) -> None:
    """Print a note if labels have an AP of 100 because no test image is known to lack them."""
    labels = np.array(manifest.vocabulary)[LabelCounts.of_truth(truth).without_negative]
    if len(labels):
        have, them = ("has", "it") if len(labels) == 1 else ("have", "them")
        shown = ", ".join(labels[:3]) + (" and others" if len(labels) > 3 else "")
        note(
            f"{len(labels)} of {counted(len(manifest.vocabulary), 'label')} {have} an AP of 100 "
            f"whatever the scores are, since no image of the test split is known to lack {them}: "
            f"{shown}. That raises the mAP."
        )


def check_same_inputs(
    run: RunPlan,
    checkpoint: Checkpoint,
    manifest: Manifest,
    cache: RegionCache,
    vectors: LabelVectors,
) -> None:
    """Refuse to evaluate a run on other inputs than it was trained on. Test labels may differ."""
    path = run.folder / CHECKPOINT_FILE
    train = f"Train again: `gmpipe train {run.options}`."
    if checkpoint.vocabulary != manifest.vocabulary:
        raise MismatchError(
            f"{path} was trained on other labels than {manifest_file(run.dataset)} has now: "
            f"{_other_labels(checkpoint.vocabulary, manifest.vocabulary)}.",
            train,
        )
    check_training_rows(checkpoint, manifest, cache, path, train)
    if checkpoint.label_vectors_sha256 != vectors.sha256:
        raise MismatchError(
            f"{path} was trained with the label vectors {checkpoint.label_vectors_sha256}, but "
            f"{vectors.source} now holds {vectors.sha256}.",
            f"{train} Or restore the label vectors that it was trained with.",
        )
    restore = f"`{refill_command(checkpoint.recipe, run.dataset)} --replace`"
    check_same_recipe(
        checkpoint.recipe,
        cache.recipe,
        f"the cache that {path} was trained on",
        f"{train} Or restore the regions that it was trained on: {restore} with the settings or "
        "the FILE used at that time.",
    )


def _other_labels(used: Sequence[str], today: Sequence[str]) -> str:
    """Name the labels that only one of two vocabularies has."""
    before, now = set(used), set(today)
    words = [f"{label!r} is not there any more" for label in used if label not in now]
    words += [f"{label!r} is new" for label in today if label not in before]
    return first_few(words, "; ") or "they are in another order"


def commit_of_checkout() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether tracked files differ from it; None outside of git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    # `dvc repro` writes to dvc.lock after each of its stages.
    tracked = ("--untracked-files=no", "--", ":/", ":(exclude)dvc.lock")
    changes = _git("--no-optional-locks", "status", "--porcelain", *tracked)
    return commit, None if changes is None else changes != ""


def _git(*arguments: str) -> str | None:
    """What git prints; None if it fails, as it does outside of a repository and without commits."""
    command = ["git", *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git may not be installed
        return None
    return finished.stdout.strip()
