"""Command `sweep`: train with several values of a setting; write a table, a CSV and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.drawing import missing_letters
from pipeline.errors import InputError
from pipeline.evaluation.runs import Evaluations, Run, Runs, evaluations_of
from pipeline.evaluation.tables import as_csv, caption, sweep_table
from pipeline.files import canonical_json, folder_lock, replacing, tidy
from pipeline.report.sweeps import Sweep, SweepResults, SweepRun, write_sweep
from stages.checkout.layout import (
    SWEEP_FIGURE_STEM,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    sweep_folder,
)
from stages.checkout.params import Request, unreached
from stages.checkout.plans import plan_run, why_unreached
from stages.checkout.results import load_runs
from stages.commands.compare import make_runs
from stages.commands.searching.spaces import choose_trials, read_space
from stages.console.messages import note


def sweep(
    setting: str,
    request: Request,
    variant: str,
    seeds: Sequence[int],
    *,
    jobs: int | None = None,
) -> tuple[str, str]:
    """Train and evaluate a variant with each value of a setting; reuse the runs that exist.

    Args:
        setting: as `read_space` takes it, without a `Range`; the key is relative to
            ``train.<dataset>``.
        request: for a data set.
        variant, seeds: of the runs.
        jobs: runs at a time, as in `make_runs`.

    Returns:
        The table, and a line that says where the CSV file and the figure are.

    Raises:
        InputError: the setting is unknown, a value is not one of its values, the variant does not
            take it, or two values make the same run.
        GmpipeError: as `make_runs` and `load_runs`.
    """
    key, space = read_space(setting)
    values = [value for [value] in choose_trials({key: space}, None)]
    try:
        requests = _requests(key, values, request)
    except InputError as error:
        own = f"variants.{variant}.{key}"
        with suppress(InputError):
            _requests(own, values, request)
            error = InputError(error.problem, f"Sweep `{own}`, which this variant has.")
        raise error from None
    trials = {f"{key}={value}": changed for value, changed in requests.items()}
    check_trials([key], variant, trials)
    make_runs(
        [plan_run(changed, variant, seed) for changed in requests.values() for seed in seeds], jobs
    )
    runs = {
        value: load_runs(changed, [variant], seeds)[variant] for value, changed in requests.items()
    }
    folder = sweep_folder(request.dataset, variant, key)
    results = _results(key, variant, runs, numeric=_are_numbers(values))
    return _shown(results, evaluations_of(runs)), write_results(folder, results)


def _results(key: str, variant: str, runs: Runs, *, numeric: bool) -> SweepResults:
    """Collect the numbers of a sweep.

    Args:
        key: of the setting.
        variant: of the runs.
        runs: with each value, by value.
        numeric: whether the values are numbers.
    """
    first = next(iter(runs.values()))[0].evaluation
    return SweepResults(
        dataset=first.dataset,
        split=first.split,
        variant=variant,
        setting=key,
        numeric=numeric,
        fingerprint=first.fingerprint,
        train_sha256=first.train_sha256,
        test_sha256=first.test_sha256,
        runs=[
            SweepRun(
                value=value,
                seed=run.evaluation.seed,
                **numbers_on_test(run),
                validation_mAP=run.history[run.evaluation.epoch - 1].get("validation_mAP"),
            )
            for value, seeds in runs.items()
            for run in seeds
        ],
    )


def numbers_on_test(run: Run) -> dict[str, float | None]:
    """What the results of a sweep or a search have of a run's metrics, in percent."""
    return {name: run.evaluation.metrics.number(name) for name in ("mAP", "CF1", "OF1")}


def _shown(results: SweepResults, evaluations: Evaluations) -> str:
    """The table, and which value is the best, which values tie, or why none is."""
    key, best = results.setting, results.best()
    first = next(iter(evaluations.values()))
    about = caption(results.dataset, first)
    table = sweep_table(key, evaluations, results.validation_maps(), best)
    if not best:
        _note_no_choice(results)
        return f"{about}\n\n{table}"
    chosen = f"The best value by validation mAP is {key}={best[0]}."
    if len(best) > 1:
        several = f"{', '.join(best[:-1])} and {best[-1]}"
        chosen = (
            f"The values {several} of {key} tie: their validation mAP is the same, and the best."
        )
    return f"{about}\n\n{table}\n\n{chosen} The numbers of the test split do not decide."


def _note_no_choice(results: SweepResults) -> None:
    """Say that these runs can't decide between the values, and which ones can."""
    if all(run.validation_mAP is not None for run in results.runs):
        note(
            f"no value of `{results.setting}` is marked as the best: the runs were validated on "
            "different images."
        )
        return
    note(
        "no value is marked as the best: these runs have no validation part, and a choice by the "
        "test split would make its numbers too good. To choose a value, run the same sweep with "
        f"`--set train.{results.dataset}.validation=0.2`."
    )


def write_results(folder: Path, results: Sweep) -> str:
    """Write the CSV file, the figure, and the numbers for the page; return a line that says so."""
    with folder_lock(folder):
        tidy(folder)
        with replacing(folder / SWEEP_RESULTS_FILE) as temporary:
            temporary.write_text(as_csv(results.rows()), encoding="utf-8")
        missing_letters(results.texts())
        results.draw(folder / SWEEP_FIGURE_STEM)
        write_sweep(folder / SWEEP_FILE, results)
    return f"{folder}: {SWEEP_RESULTS_FILE}, {SWEEP_FIGURE_STEM}.svg, {SWEEP_FIGURE_STEM}.png"


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _requests(key: str, values: Sequence[Any], request: Request) -> dict[str, Request]:
    """By value, as it is shown, the request with that value; numbers in ascending order."""
    return {
        shown_value(value): request.overriding(as_override(request, key, value))
        for value in (sorted(values) if _are_numbers(values) else values)
    }


def shown_value(value: Any) -> str:
    """A value of a setting as tables show it."""
    return value if isinstance(value, str) else canonical_json(value)


def as_override(request: Request, key: str, value: Any) -> str:
    """The `--set` option that gives a train setting a value."""
    return f"train.{request.dataset}.{key}={canonical_json(value)}"


def check_trials(keys: Sequence[str], variant: str, trials: Mapping[str, Request]) -> None:
    """Check that trials can be compared: the variant takes their values, and no two are the same.

    Args:
        keys: of the settings that the trials give values to.
        variant: of the runs.
        trials: the trial, as messages name it -> its request.

    Raises:
        InputError: the variant does not take one, because it has another head or sets the key
            itself; two trials make the same run, as those do of a key of another variant; or a key
            belongs to the decisions, which change no mAP.
    """
    for key in keys:
        if key.removeprefix(f"variants.{variant}.").partition(".")[0] == "decisions":
            raise InputError(
                f"{key} changes how scores become decisions, but not how images rank, so that all "
                "of its values have the same mAP.",
                "Set it in params.yaml. `python -m benchmarks.decisions` compares all kinds of "
                "thresholds and calibration on trained runs.",
            )
    for trial, request in trials.items():
        for key in set(keys).intersection(unreached(request, variant)):
            why, remedy = why_unreached(request, variant, key)
            of_several = f" ({key})" if len(keys) > 1 else ""
            raise InputError(
                f"{trial}{of_several} has no effect on the variant {variant}, which {why}.",
                remedy or f"Choose another variant, or sweep `variants.{variant}.{key}`.",
            )
    trial_of: dict[str, str] = {}
    for trial, request in trials.items():
        settings = request.variant(variant).model_dump_json()
        if settings in trial_of:
            raise InputError(
                f"{trial_of[settings]} and {trial} make the same run of {variant}.",
                "Choose another variant, or sweep another setting.",
            )
        trial_of[settings] = trial
