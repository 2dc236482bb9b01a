"""Command `compare`: variants x seeds from one cache, and tables of mean, spread and difference."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.bootstrap import intervals
from pipeline.evaluation.differences import describe_detector
from pipeline.evaluation.tables import BASE, results_markdown
from stages.checkout.params import Request
from stages.checkout.plans import plan_run
from stages.checkout.results import load_runs, load_scores
from stages.workers.jobs import make_runs


def compare(
    request: Request,
    variants: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int | None = None,
) -> str:
    """Train and evaluate what is not there yet, reuse what is.

    Args:
        jobs: runs at a time, as of `make_runs`.

    Returns:
        the tables.
    """
    plans = [plan_run(request, variant, seed) for variant in variants for seed in seeds]
    make_runs(plans, jobs)
    runs = load_runs(request, variants, seeds)
    scores = load_scores(request, runs)
    detector = describe_detector(request.detector, next(iter(runs.values()))[0].recipe)
    return results_markdown(
        request.dataset,
        request.prepare.source,
        detector,
        runs,
        intervals(scores.runs, scores.truth, BASE),
    )
