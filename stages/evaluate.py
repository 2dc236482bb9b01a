"""Stage `evaluate`: a run's checkpoint on the test split -> predictions and metrics."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import evaluate as measure
from pipeline.files import folder_lock, replacing, write_json
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import fill_cache, open_split
from pipeline.learning.training import Predictions, predict_split
from pipeline.shards.schema import check_same_recipe
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import CHECKPOINT_FILE, METRICS_FILE, PREDICTIONS_FILE, SUMMARY_FILE
from stages.checkout.plans import RunPlan, open_inputs
from stages.checkout.times import record_time


def evaluate(run: RunPlan) -> str:
    """Score the test split with a trained run and write predictions and metrics beside it.

    Returns:
        a line with the headline numbers.

    Raises:
        GmpipeError: there is no checkpoint, or it was trained on other regions, labels or label
            vectors than those there now.
    """
    began = time.monotonic()
    path = run.folder / CHECKPOINT_FILE
    checkpoint = load_checkpoint(path, f"Run `gmpipe train {run.options}`.")
    manifest, cache, vectors = open_inputs(run.dataset, checkpoint.settings)
    again = f"Train again: `gmpipe train {run.options}`."
    if checkpoint.vocabulary != manifest.vocabulary:
        raise GmpipeError(
            f"{path} was trained on the labels {list(checkpoint.vocabulary)}, the manifest has "
            f"{list(manifest.vocabulary)}. {again}"
        )
    if checkpoint.label_vectors_sha256 != vectors.sha256:
        raise GmpipeError(
            f"{path} was trained with label vectors {checkpoint.label_vectors_sha256}, "
            f"{vectors.source} now gives {vectors.sha256}. Restore them, or {again[0].lower()}"
            f"{again[1:]}"
        )
    check_same_recipe(
        checkpoint.recipe,
        cache.recipe,
        f"the cache that {path} was trained on",
        f"{again} Or restore the regions that it was trained on: "
        f"`{fill_cache(checkpoint.recipe, run.dataset)} --replace` with the setting or FILE of "
        "then.",
    )
    with advising_on_cache(run.dataset):
        split = open_split(cache, manifest, "test", regions=checkpoint.settings.regions)
    predictions = predict_split(checkpoint.network(), split, checkpoint.label_vectors)
    metrics = measure(
        predictions.scores,
        split.truth,
        manifest.vocabulary,
        voc11=run.dataset == "voc2007",
    )
    with folder_lock(run.folder):
        _write_predictions(run.folder / PREDICTIONS_FILE, split.image_ids, predictions)
        write_json(
            run.folder / METRICS_FILE,
            {
                **metrics,
                "dataset": run.dataset,
                "split": f"{manifest.split_name}/test",
                "variant": run.variant,
                "seed": run.seed,
                "epoch": checkpoint.epoch,
                "images": len(split),
                "left_out": split.left_out,
                "counts": manifest.counts,
                "commit": _commit(),
                "fingerprint": cache.fingerprint,
                "labels_sha256": manifest.labels_sha256,
            },
        )
        write_json(run.folder / SUMMARY_FILE, _summary(metrics))
    record_time(run.dataset, "evaluate", began, run=run.folder.name)
    left_out = f"; {split.left_out} images without regions left out" if split.left_out else ""
    return f"{run.folder}: mAP {metrics['mAP']:.2f}, OF1 {metrics['OF1']:.2f}{left_out}"


def _summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """The five numbers that `dvc metrics` shows of a run."""
    top3 = {name: metrics["top3"][name] for name in ("CF1", "OF1")}
    return {**{name: metrics[name] for name in ("mAP", "CF1", "OF1")}, "top3": top3}


def _write_predictions(path: Path, image_ids: Any, predictions: Predictions) -> None:
    """A row an image: its id, C scores, and for each label the region that won the max (14)."""
    labels = predictions.scores.shape[1]
    table = pa.table(
        {
            "image_id": pa.array(image_ids, pa.string()),
            "scores": pa.FixedSizeListArray.from_arrays(predictions.scores.ravel(), labels),
            "regions": pa.FixedSizeListArray.from_arrays(predictions.regions.ravel(), labels),
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _commit() -> str | None:
    """The checkout's commit, None outside of git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # git is not installed
        return None
    return found.stdout.strip() or None
