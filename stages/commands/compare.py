"""Command `compare`: variants x seeds from one cache, and tables of mean, spread and difference."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.bootstrap import intervals
from stages.checkout.params import DatasetSettings
from stages.checkout.results import BASE, load_runs, load_scores, tables
from stages.train import plan_run
from stages.workers.jobs import make_runs


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
    scores = load_scores(settings, results)
    return tables(settings, results, intervals(scores.runs, scores.truth, BASE))
