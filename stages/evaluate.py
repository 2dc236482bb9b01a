"""Stage `evaluate`: a run's checkpoint on the test split -> predictions and metrics."""

from __future__ import annotations

import subprocess
import time

from pipeline.datasets.manifest import Manifest
from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.evaluation.metrics import Evaluation, write_evaluation
from pipeline.evaluation.metrics import evaluate as measure
from pipeline.evaluation.predictions import write_predictions
from pipeline.files import folder_lock, write_json
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.prediction import predict_split
from pipeline.learning.splits import open_split
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import check_same_recipe
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import CHECKPOINT_FILE, METRICS_FILE, PREDICTIONS_FILE, SUMMARY_FILE
from stages.checkout.plans import RunPlan, open_inputs, refill_command
from stages.checkout.remedies import advising
from stages.checkout.times import record_time


def evaluate(run: RunPlan) -> str:
    """Score the test split with a trained run, and write predictions and metrics beside it.

    Returns:
        a line with the headline numbers.

    Raises:
        MissingError, DamagedError: the checkpoint, or something else that is read, is missing or
            damaged.
        MismatchError: the checkpoint was trained on other regions, labels or label vectors than
            those of today.
    """
    began = time.monotonic()
    path = run.folder / CHECKPOINT_FILE
    with advising(f"Run `gmpipe train {run.options}`.", MissingError, DamagedError, MismatchError):
        checkpoint = load_checkpoint(path)
    manifest, cache, vectors = open_inputs(run.dataset, checkpoint.settings)
    _check_same_inputs(run, checkpoint, manifest, cache, vectors)
    with advising_on_cache(run.dataset):
        split = open_split(cache, manifest, "test", regions=checkpoint.settings.regions)
    predictions = predict_split(checkpoint.network(), split, checkpoint.label_vectors)
    metrics = measure(
        predictions.scores,
        split.truth,
        manifest.vocabulary,
        voc11=run.dataset == "voc2007",
    )
    evaluation = Evaluation(
        metrics,
        dataset=run.dataset,
        split=f"{manifest.split_name}/test",
        variant=run.variant,
        seed=run.seed,
        epoch=checkpoint.epoch,
        images=len(split),
        left_out=split.left_out,
        counts=manifest.counts,
        commit=_commit(),
        fingerprint=cache.fingerprint,
        labels_sha256=manifest.labels_sha256,
    )
    with folder_lock(run.folder):
        write_predictions(
            run.folder / PREDICTIONS_FILE, split.image_ids, predictions.scores, predictions.regions
        )
        write_evaluation(run.folder / METRICS_FILE, evaluation)
        write_json(run.folder / SUMMARY_FILE, metrics.summary())
    record_time(run.dataset, "evaluate", began, run=run.folder.name)
    left_out = f"; {split.left_out} images without regions left out" if split.left_out else ""
    return f"{run.folder}: mAP {metrics.mAP:.2f}, OF1 {metrics.all.OF1:.2f}{left_out}"


def _check_same_inputs(
    run: RunPlan,
    checkpoint: Checkpoint,
    manifest: Manifest,
    cache: RegionCache,
    vectors: LabelVectors,
) -> None:
    """Refuse to evaluate a run on other labels, label vectors or regions than it was trained on."""
    path = run.folder / CHECKPOINT_FILE
    train = f"Train again: `gmpipe train {run.options}`."
    if checkpoint.vocabulary != manifest.vocabulary:
        raise MismatchError(
            f"{path} was trained on the labels {list(checkpoint.vocabulary)}, the manifest has "
            f"{list(manifest.vocabulary)}.",
            train,
        )
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


def _commit() -> str | None:
    """The checkout's commit; None outside of git."""
    try:
        finished = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # git is not installed
        return None
    return finished.stdout.strip() or None
