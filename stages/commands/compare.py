"""Command `compare`: train variants x seeds from one cache, and tabulate mean, spread, differences.

Also `make_runs` and `try_runs`, which make the missing runs for every command that needs many.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.datasets.label_counts import LabelCounts
from pipeline.errors import (
    DamagedError,
    GmpipeError,
    MismatchError,
    MissingError,
    Stopped,
    advising,
)
from pipeline.evaluation import bootstrap
from pipeline.evaluation.metrics import read_evaluation
from pipeline.evaluation.runs import Runs, evaluations_of, ranking
from pipeline.evaluation.tables import default_base, results_markdown
from pipeline.files import access_error
from pipeline.formats.text import counted
from pipeline.learning.checkpoint import Checkpoint
from pipeline.machine import cores
from pipeline.regions.detector import detector_of_regions
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import fingerprint
from stages.checkout.layout import METRICS_FILE, detector_folder
from stages.checkout.params import Request
from stages.checkout.plans import (
    RunPlan,
    check_run_regions,
    open_inputs,
    plan_run,
    read_checkpoint,
)
from stages.checkout.results import load_entries, load_runs, load_scores
from stages.checkout.times import read_times
from stages.console.messages import say
from stages.console.progress import progress_bar, progress_phase
from stages.evaluate import evaluate
from stages.train import train
from stages.workers.jobs import Outcome, run_jobs

_log = logging.getLogger(__name__)

_STAGES: dict[str, Callable[[RunPlan], str | None]] = {"train": train, "evaluate": evaluate}
"""The stages of a run, in order."""


def compare(
    request: Request,
    variants: Sequence[str],
    seeds: Sequence[int],
    *,
    base: str | None = None,
    jobs: int | None = None,
) -> str:
    """Train and evaluate the runs that are missing; reuse those that exist.

    Args:
        request: for a data set.
        variants, seeds: of the runs.
        base: the variant that the others are compared with; None for `default_base`.
        jobs: runs at a time, as in `make_runs`.

    Returns:
        The tables.
    """
    # A predictor of sets has no mAP that others could be compared with.
    base = base or default_base([v for v in variants if request.variant(v).ranks] or variants)
    plans = [plan_run(request, variant, seed) for variant in variants for seed in seeds]
    make_runs(plans, jobs)
    runs = load_runs(request, variants, seeds)
    entries, scores = load_entries(request, load_scores(request, runs))
    ranked = {name: scores.logits[name] for name in ranking(evaluations_of(runs, entries))}
    recipe = next(iter(runs.values()))[0].recipe
    with advising(f"Run `gmpipe detector --dataset {request.dataset}`.", DamagedError):
        detector = detector_of_regions(detector_folder(request.dataset), recipe)
    with progress_phase("intervals", len(ranked) * bootstrap.RESAMPLES, "resample") as on_resamples:
        of_runs = bootstrap.intervals(ranked, scores.truth, base, on_resamples)
    source, seconds = request.prepare.source, _training_seconds(request.dataset, runs)
    positives = LabelCounts.of_truth(scores.truth).positive.tolist()
    return results_markdown(
        request.dataset, source, detector, runs, of_runs, base, positives, seconds, entries
    )


def _training_seconds(dataset: str, runs: Runs) -> dict[str, list[float | None]]:
    """Variant -> how long the training of each of its runs took; None where it is not known."""
    taken = {entry.run: entry.seconds for entry in read_times(dataset) if entry.stage == "train"}
    return {variant: [taken.get(run.name) for run in seeds] for variant, seeds in runs.items()}


def make_runs(runs: Sequence[RunPlan], jobs: int | None) -> None:
    """Train and evaluate the runs that are missing, as `try_runs` does.

    Raises:
        GmpipeError: as `open_inputs`.
        MissingError: some of the runs failed; the others were made.
    """
    if problems := try_runs(runs, jobs):
        listed = "\n".join(f"{folder}: {problem}" for folder, problem in problems.items())
        raise MissingError(
            f"{len(problems)} of {counted(len(runs), 'run')} failed.\n{listed}\n",
            "All other runs are finished and kept. Fix the problems above, and run the same "
            "command again.",
        )


def try_runs(
    runs: Sequence[RunPlan],
    jobs: int | None,
    *,
    stages: Collection[str] = tuple(_STAGES),
    until: float = math.inf,
) -> dict[Path, str | None]:
    """Make the runs that are missing, and print a line about each.

    A run that is trained but not evaluated is only evaluated. Several runs at a time are made in
    processes with one thread each; a run alone uses all threads. The number of threads changes how
    sums are rounded, and so the last digits of a run's numbers, but nothing else.

    Args:
        runs: the plans.
        jobs: runs at a time; None for one per core, or one on a GPU.
        stages: that are wanted, of `train` and `evaluate`.
        until: the time, on `time.monotonic`'s clock, from which no further run is begun.

    Returns:
        By folder, why a run is not made; None if the time was over before.

    Raises:
        GmpipeError: as `open_inputs`.
    """
    missing = {
        run.folder: (run, wanted)
        for run, lacking in zip(runs, _missing_stages(runs), strict=True)
        if (wanted := [stage for stage in lacking if stage in stages])
    }
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else cores()
    if 0 < len(missing) < len(runs):
        finished = f"{len(runs) - len(missing)} of {len(runs)} runs"
        say(f"finished already: {finished}; made now: {len(missing)}")
    if not missing:
        return {}
    make = _make_in_processes if min(jobs, len(missing)) > 1 else _make_here
    not_made: dict[Path, str | None] = dict.fromkeys(missing)
    for folder, outcome in make(missing, jobs, until):
        if outcome.problem:
            not_made[folder] = outcome.problem
        else:
            del not_made[folder]
            say(outcome.output)
    return not_made


_Missing = Mapping[Path, tuple[RunPlan, Sequence[str]]]
"""By folder, a run and the stages that are missing of it."""


def _make_in_processes(
    missing: _Missing, at_once: int, until: float
) -> Iterator[tuple[Path, Outcome]]:
    jobs = {
        str(folder): [(stage, *run.arguments) for stage in stages]
        for folder, (run, stages) in missing.items()
    }
    for folder, outcome in run_jobs(jobs, at_once, until):
        yield Path(folder), outcome


def _make_here(missing: _Missing, _: int, until: float) -> Iterator[tuple[Path, Outcome]]:
    with progress_bar(total=len(missing), desc="runs", unit="run", smoothing=0) as bar:
        for folder, (run, stages) in missing.items():
            if time.monotonic() >= until:
                return
            try:
                outcome = Outcome("\n".join(str(_STAGES[stage](run)) for stage in stages))
            except Stopped:
                raise
            except (GmpipeError, OSError) as error:
                _log.info("%s failed", folder, exc_info=True)
                known = access_error(error) if isinstance(error, OSError) else error
                outcome = Outcome("", str(known))
            bar.update(1)
            yield folder, outcome


def _missing_stages(runs: Sequence[RunPlan]) -> list[list[str]]:
    """Find out which stages of each run are missing, for its settings and the current cache.

    Raises:
        GmpipeError: an input of the runs is missing or damaged.
        InputError: the cache holds fewer regions than a run uses.
    """
    inputs: dict[str, tuple[RegionCache, _Today]] = {}
    missing: list[list[str]] = []
    for run in runs:
        key = run.settings.label_vectors
        if key not in inputs:
            manifest, cache, vectors = open_inputs(run.dataset, run.settings)
            hashes = (manifest.train_sha256, manifest.test_sha256)
            inputs[key] = cache, _Today(cache.fingerprint, vectors.sha256, *hashes)
            check_run_regions(runs, cache)  # before hours are spent on some of them
        cache, today = inputs[key]
        checkpoint = _trained(run, today)
        if checkpoint is None:
            missing.append(["train", "evaluate"])
        elif not _is_evaluated(run, checkpoint, today):
            missing.append(["evaluate"])
        else:
            missing.append([])
    return missing


@dataclass(frozen=True)
class _Today:
    """What runs are made from: hashes of regions, label vectors, and both splits' labels."""

    fingerprint: str
    vectors: str
    train: str
    test: str


def _trained(run: RunPlan, today: _Today) -> Checkpoint | None:
    """The checkpoint of a run that was trained with its settings on the inputs of today."""
    try:
        checkpoint = read_checkpoint(run)
    except (MissingError, DamagedError, MismatchError):
        return None
    fits = (
        fingerprint(checkpoint.recipe) == today.fingerprint
        and checkpoint.label_vectors_sha256 == today.vectors
        and checkpoint.train_sha256 == today.train
    )
    return checkpoint if fits else None


def _is_evaluated(run: RunPlan, checkpoint: Checkpoint, today: _Today) -> bool:
    """Whether a run has metrics of this checkpoint and of the test labels of today."""
    try:
        evaluation = read_evaluation(run.folder / METRICS_FILE)
    except (MissingError, DamagedError):
        return False
    return (
        evaluation.checkpoint_sha256 == checkpoint.sha256 and evaluation.test_sha256 == today.test
    )
