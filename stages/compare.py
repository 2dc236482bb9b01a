"""Command `compare`: variants x seeds from one cache, and tables of mean, spread and difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.manifest import Manifest
from pipeline.errors import GmpipeError
from pipeline.evaluation.bootstrap import RESAMPLES, difference_interval, resampled_maps
from pipeline.evaluation.tables import differences_table
from stages.jobs import make_runs
from stages.layout import PREDICTIONS_FILE
from stages.manifests import dataset_manifest
from stages.params import DatasetSettings
from stages.report import Result, Results, load_runs, tables
from stages.train import plan_run

BASE = "full"
"""The variant that all others are held against."""


def compare(
    settings: DatasetSettings,
    variants: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    *,
    jobs: int | None = None,
) -> str:
    """Train and evaluate what is not there yet, reuse what is.

    Args:
        overrides: the `--set` options that ``settings`` were read with.
        jobs: runs at a time, as of `make_runs`.

    Returns:
        the tables.
    """
    plans = [plan_run(settings, variant, seed, overrides) for variant in variants for seed in seeds]
    make_runs(plans, jobs)
    results = load_runs(settings, variants, seeds, overrides)
    return tables(settings, results) + _differences(settings, results)


def _differences(settings: DatasetSettings, results: Results) -> str:
    """The section on the differences to `full`; empty where it was not run, or alone."""
    if BASE not in results or len(results) == 1:
        return ""
    manifest = dataset_manifest(settings.dataset)
    image_ids = _image_ids(results[BASE][0])
    truth = _truth(manifest, image_ids)
    maps = {
        variant: resampled_maps(
            [_scores(run, image_ids) for run in runs], truth, resamples=RESAMPLES
        )
        for variant, runs in results.items()
    }
    rows = {}
    for variant, runs in results.items():
        if variant != BASE:
            pairs = zip(runs, results[BASE], strict=True)
            differences = [run.metrics["mAP"] - base.metrics["mAP"] for run, base in pairs]
            interval = difference_interval(maps[variant], maps[BASE])
            rows[variant] = (float(np.mean(differences)), *interval)
    return (
        f"\n## Difference to {BASE}\n\nPoints of mAP, mean over the seeds. The interval is that of "
        f"{RESAMPLES:,} resamples of the {len(image_ids):,} test images (paired bootstrap): what "
        f"other test images would do, not other seeds.\n\n{differences_table(rows)}\n"
    )


def _truth(manifest: Manifest, image_ids: Sequence[str]) -> np.ndarray:
    """(N, C) of some of the test images; those without regions are in no prediction."""
    places = {image_id: place for place, image_id in enumerate(manifest.image_ids("test"))}
    return manifest.truth("test")[[places[image_id] for image_id in image_ids]]


def _image_ids(run: Result) -> list[str]:
    ids: list[str] = _read(run.plan.folder / PREDICTIONS_FILE).column("image_id").to_pylist()
    return ids


def _scores(run: Result, image_ids: Sequence[str]) -> np.ndarray:
    """(N, C)."""
    path = run.plan.folder / PREDICTIONS_FILE
    table = _read(path)
    if table.column("image_id").to_pylist() != image_ids:
        raise GmpipeError(
            f"{path} is of other images than those of the first run of {BASE}. Delete it, "
            f"{path.parent} with it, and run the same command again."
        )
    column = table.column("scores").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(image_ids), -1)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise GmpipeError(
            f"{path} can't be read ({error}). Delete its folder, and run the same command again."
        ) from error
