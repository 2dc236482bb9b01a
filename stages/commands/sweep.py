"""Command `sweep`: one setting of `train` in several values -> a table, a CSV, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import GmpipeError
from pipeline.evaluation.runs import evaluations_of
from pipeline.evaluation.tables import as_csv, caption, sweep_table
from pipeline.files import canonical_json, folder_lock, replacing
from pipeline.report.figures import sweep_figure
from stages.checkout.layout import SWEEP_FIGURE_STEM, SWEEP_RESULTS_FILE, sweep_folder
from stages.checkout.params import Request
from stages.checkout.plans import RunPlan, plan_run
from stages.checkout.results import load_runs
from stages.workers.jobs import make_runs


def sweep(
    setting: str,
    request: Request,
    variant: str,
    seeds: Sequence[int],
    *,
    jobs: int | None = None,
) -> tuple[str, str]:
    """Train and evaluate a variant with each value of a setting; reuse what is there.

    Args:
        setting: ``key=value,value,...``; the key is relative to ``train.<dataset>``.
        jobs: runs at a time, as of `make_runs`.

    Returns:
        the table, and where CSV and figure are.

    Raises:
        GmpipeError: a setting or value that there is not, or two values that make the same run.
    """
    key, values = _parse(setting)
    name = request.dataset
    numeric = all(type(value) in (int, float) for value in values)
    chosen = {
        _shown(value): request.overriding(f"train.{name}.{key}={canonical_json(value)}")
        for value in (sorted(values) if numeric else values)
    }
    if len(chosen) < len(values):
        raise GmpipeError(f"{setting}: a value is named twice. Take one out.")
    plans = {
        value: [plan_run(own, variant, seed) for seed in seeds] for value, own in chosen.items()
    }
    _check_different(key, variant, plans)
    make_runs([run for runs in plans.values() for run in runs], jobs)
    runs = {
        value: evaluations_of(load_runs(own, [variant], seeds))[variant]
        for value, own in chosen.items()
    }
    folder = sweep_folder(name, variant, key)
    first = next(iter(runs.values()))[0]
    with folder_lock(folder):
        rows = [
            {"variant": variant, "setting": key, "value": value, "seed": evaluation.seed}
            | {column: evaluation.metrics.number(column) for column in ("mAP", "CF1", "OF1")}
            for value, evaluations in runs.items()
            for evaluation in evaluations
        ]
        with replacing(folder / SWEEP_RESULTS_FILE) as temporary:
            temporary.write_text(as_csv(rows))
        sweep_figure(
            folder / SWEEP_FIGURE_STEM,
            key,
            {value: [one.metrics.mAP for one in of_value] for value, of_value in runs.items()},
            title=f"{name}, {variant}, split {first.split}",
            numeric=numeric,
        )
    return (
        f"{caption(name, next(iter(runs.values())))}\n\n{sweep_table(key, runs)}",
        f"{folder}: {SWEEP_RESULTS_FILE}, {SWEEP_FIGURE_STEM}.svg, {SWEEP_FIGURE_STEM}.png",
    )


def _parse(setting: str) -> tuple[str, list[Any]]:
    key, equals, text = setting.partition("=")
    problem = (
        f"{setting}: expected KEY=VALUE,VALUE,... with a key of train.<dataset> and at least two "
        "values, e.g. `network.modules=1,2,3,4`."
    )
    try:
        values = YAML(typ="safe").load(f"[{text}]")
    except YAMLError as error:
        raise GmpipeError(problem) from error
    if not key or not equals or not isinstance(values, list) or len(values) < 2:
        raise GmpipeError(problem)
    return key, values


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def _check_different(key: str, variant: str, plans: dict[str, list[RunPlan]]) -> None:
    """A variant that sets the key itself would give the same run for every value."""
    seen: dict[str, str] = {}
    for value, runs in plans.items():
        content = runs[0].settings.model_dump_json()
        if content in seen:
            raise GmpipeError(
                f"{key}={seen[content]} and {key}={value} make the same run of {variant}, which "
                f"sets `{key}` itself. Choose another variant, or sweep `variants.{variant}.{key}`."
            )
        seen[content] = value
