"""Command `sweep` over several settings: a search, which the validation part alone decides.

Each seed is a round: it trains the trials that are left. The best trial is then evaluated on the
test split. The others are not, so that nobody can choose by their test numbers.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from pipeline.datasets.manifest import Manifest
from pipeline.errors import InputError, MissingError
from pipeline.evaluation.runs import Run
from pipeline.evaluation.tables import cell
from pipeline.formats.text import counted, markdown_table
from pipeline.report.searches import SearchResults, SearchRun, Values, in_words
from stages.checkout.caches import open_cache
from stages.checkout.layout import sweep_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.plans import RunPlan, plan_run, read_checkpoint
from stages.checkout.results import load_runs
from stages.commands.compare import make_runs, try_runs
from stages.commands.searching.spaces import Space, choose_trials, read_space
from stages.commands.sweep import (
    as_override,
    check_trials,
    numbers_on_test,
    shown_value,
    write_results,
)
from stages.console.messages import note, say


def search(
    settings: Sequence[str],
    request: Request,
    variant: str,
    seeds: Sequence[int],
    *,
    trials: int | None = None,
    minutes: float | None = None,
    halving: bool = False,
    jobs: int | None = None,
) -> tuple[str, str]:
    """Train a variant with combinations of values, and evaluate the best one; reuse what exists.

    Args:
        settings: as `read_space` takes them; their keys are relative to ``train.<dataset>``.
        request: for a data set.
        variant: of the runs.
        seeds: of the runs, one for each round.
        trials: how many combinations to draw at random; None for all.
        minutes: after which no further run is begun; None for no limit.
        halving: go on with the better half of the trials after each round.
        jobs: runs at a time, as in `try_runs`.

    Returns:
        The table, and a line that says where the CSV file and the figure are.

    Raises:
        InputError: a setting can't be searched, as in `sweep`, or nothing validates the runs.
        MissingError: no trial has all of its runs.
        GmpipeError: as `make_runs` and `load_runs`.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    keys, chosen = _trials(settings, request, trials)
    named = {in_words(keys, values): changed for values, changed in chosen.items()}
    check_trials(keys, variant, named)
    manifest = dataset_manifest(request.dataset)
    _check_validated(keys, variant, named, manifest)
    say(f"{counted(len(chosen), 'trial')} of {', '.join(keys)}")
    runs = _rounds(chosen, variant, seeds, halving=halving, until=until, jobs=jobs)
    results = SearchResults(
        dataset=request.dataset,
        split=f"{manifest.split_name}/test",
        variant=variant,
        settings=keys,
        fingerprint=open_cache(request.dataset).fingerprint,
        train_sha256=manifest.train_sha256,
        test_sha256=manifest.test_sha256,
        runs=runs,
    )
    best = results.best()
    of_best = chosen[best]
    tried = [run.seed for run in results.trials()[best]]
    make_runs([plan_run(of_best, variant, seed) for seed in tried], jobs)
    tested = load_runs(of_best, [variant], tried)[variant]
    results = _with_tested(results, tested)
    shown = _shown(results, tested, of_best)
    return shown, write_results(sweep_folder(request.dataset, variant, results.setting), results)


def _trials(
    settings: Sequence[str], request: Request, trials: int | None
) -> tuple[list[str], dict[Values, Request]]:
    """The keys, and by the values of each trial its request."""
    spaces: dict[str, Space] = {}
    for setting in settings:
        key, space = read_space(setting)
        if key in spaces:
            raise InputError(
                f"{setting}: {key} is given twice.", "Write all of its values at once."
            )
        spaces[key] = space
    return list(spaces), {
        tuple(map(shown_value, values)): request.overriding(
            *(as_override(request, key, value) for key, value in zip(spaces, values, strict=True))
        )
        for values in choose_trials(spaces, trials)
    }


def _check_validated(
    keys: Sequence[str], variant: str, trials: Mapping[str, Request], manifest: Manifest
) -> None:
    """Check that all trials are validated, and on the same images.

    Raises:
        InputError: they are not.
    """
    for trial, request in trials.items():
        if "val" not in manifest.splits and not request.variant(variant).validation:
            raise InputError(
                f"{trial}: the run has no validation part, and a search over several settings is "
                "decided by nothing else.",
                f"Add `--set train.{request.dataset}.validation=0.2`.",
            )
    if own := [key for key in keys if key.rpartition(".")[2] == "validation"]:
        raise InputError(
            f"{own[0]} decides which images validate a run, so that its values can't be compared.",
            "Leave it out of the search.",
        )


def _rounds(
    trials: Mapping[Values, Request],
    variant: str,
    seeds: Sequence[int],
    *,
    halving: bool,
    until: float,
    jobs: int | None,
) -> list[SearchRun]:
    """Train round by round.

    Returns:
        The runs of all finished rounds, and those that were made of an unfinished first one.

    Raises:
        MissingError: no trial has all of its runs.
    """
    runs: list[SearchRun] = []
    problems: list[str] = []
    maps: dict[Values, list[float]] = {values: [] for values in trials}
    for seed in seeds:
        plans = {values: plan_run(trials[values], variant, seed) for values in maps}
        not_made = try_runs(list(plans.values()), jobs, stages=["train"], until=until)
        late = [values for values, plan in plans.items() if not_made.get(plan.folder, "") is None]
        problems += [f"{folder}: {why}" for folder, why in not_made.items() if why]
        if late:
            note(f"the time was over before {counted(len(late), 'run')} of seed {seed} began.")
        if late and runs:
            break  # trials of an unfinished round can't be compared
        for values, plan in plans.items():
            measured = None if plan.folder in not_made else _validation_map(plan)
            if measured is None:
                del maps[values]
            else:
                maps[values].append(measured)
            if values not in late:
                runs.append(SearchRun(values=values, seed=seed, validation_mAP=measured))
        if late or not maps:
            break
        if halving:
            ranked = sorted(maps.items(), key=lambda trial: -fmean(trial[1]))
            maps = dict(ranked[: -(-len(ranked) // 2)])
    failed = {run.values for run in runs if run.validation_mAP is None}
    if all(run.values in failed for run in runs):
        raise MissingError(
            "\n".join(["No trial has all of its runs.", *problems, ""]),
            "Run the same command again, with more `--minutes` or other values.",
        )
    for problem in problems:
        note(problem)
    return runs


def _validation_map(plan: RunPlan) -> float:
    """The validation mAP of a trained run, in percent, after the epoch whose weights it has."""
    checkpoint = read_checkpoint(plan)
    return checkpoint.history[checkpoint.epoch - 1]["validation_mAP"]


def _with_tested(results: SearchResults, tested: Sequence[Run]) -> SearchResults:
    """The results, with the test numbers of the best trial's runs."""
    best = results.best()
    numbers = {run.evaluation.seed: numbers_on_test(run) for run in tested}
    runs = [
        run.model_copy(update=numbers[run.seed]) if run.values == best else run
        for run in results.runs
    ]
    return results.model_copy(update={"runs": runs})


def _shown(results: SearchResults, tested: Sequence[Run], request: Request) -> str:
    """The table of the trials, which one is the best, and its numbers on the test split."""
    best, trials = results.best(), results.trials()
    several = len({run.seed for run in results.runs}) > 1
    rows = [
        [
            *values,
            cell(run.validation_mAP for run in trials[values]) + " (best)" * (values == best)
            if mean is not None
            else "failed",
            *([str(len(trials[values]))] if several else []),
        ]
        for values, mean in results.ranking().items()
    ]
    header = [*results.settings, "validation mAP", *(["seeds"] if several else [])]
    metrics = [run.evaluation.metrics for run in tested]
    numbers = ", ".join(
        f"{name} {cell(one.number(name) for one in metrics)}" for name in ("mAP", "CF1", "OF1")
    )
    options = " ".join(
        f"--set {shlex.quote(override)}" for override in request.overrides[-len(results.settings) :]
    )
    words = in_words(results.settings, best)
    return (
        f"{results.dataset}, {results.variant}, in percent\n\n{markdown_table(header, rows)}\n\n"
        f"The best trial by validation mAP is {words}. On the test split it has {numbers}.\n"
        "This search evaluated no other trial on it.\n"
        f"To use its values, write them to params.yaml, or add {options}"
    )
