"""Command `compare`: variants x seeds from one cache, and a table of mean and spread."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.errors import GmpipeError
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.shards.schema import fingerprint
from stages.evaluate import METRICS_FILE, evaluate
from stages.params import DatasetSettings
from stages.report import load_runs, tables
from stages.train import CHECKPOINT_FILE, RunPlan, open_inputs, plan_run, train


def compare(settings: DatasetSettings, variants: Sequence[str], seeds: Sequence[int]) -> str:
    """Train and evaluate what is not there yet, reuse what is.

    Returns:
        the tables.
    """
    for variant in variants:
        for seed in seeds:
            run = plan_run(settings, variant, seed)
            if not _is_current(run):
                print(train(run), flush=True)
                print(evaluate(run), flush=True)
    return tables(settings, load_runs(settings, variants, seeds))


def _is_current(run: RunPlan) -> bool:
    """Whether a run was trained and evaluated with these settings on this cache."""
    try:
        checkpoint = load_checkpoint(run.folder / CHECKPOINT_FILE)
        metrics = json.loads((run.folder / METRICS_FILE).read_text())
        used = fingerprint(checkpoint.recipe), metrics["fingerprint"], metrics["labels_sha256"]
    except (GmpipeError, FileNotFoundError, ValueError, KeyError):
        return False
    manifest, cache, vectors = open_inputs(run.dataset, run.settings)
    return (
        checkpoint.settings == run.settings
        and checkpoint.labels_sha256 == manifest.labels_sha256
        and checkpoint.label_vectors_sha256 == vectors.sha256
        and used == (cache.fingerprint, cache.fingerprint, manifest.labels_sha256)
    )
