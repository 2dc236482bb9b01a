"""Command `sweep`: train with several values of a setting; write a table, a CSV and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.drawing import missing_letters
from pipeline.errors import InputError
from pipeline.evaluation.runs import Evaluations, Runs, evaluations_of
from pipeline.evaluation.tables import as_csv, caption, sweep_table
from pipeline.files import canonical_json, folder_lock, replacing, tidy
from pipeline.report.sweeps import SweepResults, SweepRun, write_sweep
from stages.checkout.layout import (
    SWEEP_FIGURE_STEM,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    sweep_folder,
)
from stages.checkout.params import Request, unreached
from stages.checkout.plans import RunPlan, plan_run, why_unreached
from stages.checkout.results import load_runs
from stages.checkout.yaml_text import load_yaml
from stages.commands.compare import make_runs
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
        setting: ``key=value,value,...``; the key is relative to ``train.<dataset>``.
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
    key, values = _parse(setting)
    try:
        requests = _requests(setting, key, values, request)
    except InputError as error:
        own = f"variants.{variant}.{key}"
        with suppress(InputError):
            _requests(setting, own, values, request)
            error = InputError(error.problem, f"Sweep `{own}`, which this variant has.")
        raise error from None
    _check_reached(key, variant, requests)
    plans = {
        value: [plan_run(changed, variant, seed) for seed in seeds]
        for value, changed in requests.items()
    }
    _check_different(key, variant, plans)
    make_runs([plan for of_value in plans.values() for plan in of_value], jobs)
    runs = {
        value: load_runs(changed, [variant], seeds)[variant] for value, changed in requests.items()
    }
    folder = sweep_folder(request.dataset, variant, key)
    results = _results(key, variant, runs, numeric=_are_numbers(values))
    _write(folder, results)
    return (
        _shown(results, evaluations_of(runs)),
        f"{folder}: {SWEEP_RESULTS_FILE}, {SWEEP_FIGURE_STEM}.svg, {SWEEP_FIGURE_STEM}.png",
    )


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
                mAP=run.evaluation.metrics.number("mAP"),
                CF1=run.evaluation.metrics.number("CF1"),
                OF1=run.evaluation.metrics.number("OF1"),
                validation_mAP=run.history[run.evaluation.epoch - 1].get("validation_mAP"),
            )
            for value, seeds in runs.items()
            for run in seeds
        ],
    )


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


def _write(folder: Path, results: SweepResults) -> None:
    """Write the CSV file, the figure, and the numbers for the page."""
    with folder_lock(folder):
        tidy(folder)
        with replacing(folder / SWEEP_RESULTS_FILE) as temporary:
            temporary.write_text(as_csv(results.rows()), encoding="utf-8")
        missing_letters(results.numbers())
        results.draw(folder / SWEEP_FIGURE_STEM)
        write_sweep(folder / SWEEP_FILE, results)


def _parse(setting: str) -> tuple[str, list[Any]]:
    """Split ``key=value,value,...`` into the key and its values, which are YAML."""
    key, equals, text = setting.partition("=")
    error = InputError(
        f"{setting}: expected KEY=VALUE,VALUE,... with a key of train.<dataset> and at least two "
        "values.",
        "An example is `network.modules=1,2,3,4`.",
    )
    try:
        values = load_yaml(f"[{text}]", setting, error.remedy)
    except InputError:
        raise error from None
    if not key or not equals or not isinstance(values, list) or len(values) < 2:
        raise error
    if not all(map(math.isfinite, filter(_is_number, values))):
        raise InputError(f"{setting}: a value is not a finite number.", error.remedy)
    return key, values


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _requests(
    setting: str, key: str, values: Sequence[Any], request: Request
) -> dict[str, Request]:
    """By value, as it is shown, the request with that value; numbers in ascending order."""
    requests = {
        value if isinstance(value, str) else canonical_json(value): request.overriding(
            f"train.{request.dataset}.{key}={canonical_json(value)}"
        )
        for value in (sorted(values) if _are_numbers(values) else values)
    }
    if len(requests) < len(values):
        raise InputError(f"{setting}: a value occurs twice.", "Remove one of the two.")
    return requests


def _check_different(key: str, variant: str, plans: Mapping[str, Sequence[RunPlan]]) -> None:
    """Check that each value makes another run, which it does not for a key of another variant.

    Raises:
        InputError: two values make the same run.
    """
    value_of: dict[str, str] = {}
    for value, runs in plans.items():
        settings = runs[0].settings.model_dump_json()
        if settings in value_of:
            raise InputError(
                f"{key}={value_of[settings]} and {key}={value} make the same run of {variant}.",
                "Choose another variant, or sweep another setting.",
            )
        value_of[settings] = value


def _check_reached(key: str, variant: str, requests: Mapping[str, Request]) -> None:
    """Check that the variant takes each value, and does not set the key itself.

    Raises:
        InputError: it does not take one.
    """
    for value, request in requests.items():
        if key in unreached(request, variant):
            why, remedy = why_unreached(request, variant, key)
            raise InputError(
                f"{key}={value} has no effect on the variant {variant}, which {why}.",
                remedy or f"Choose another variant, or sweep `variants.{variant}.{key}`.",
            )
