"""What fitted decisions change on the test split: CF1, OF1 and calibration error.

    python -m benchmarks.decisions --dataset imported --variants full,max-pool --seeds 0,1,2

It reads trained runs whose validation part is a share of the training split (`validation: 0.2`),
and trains nothing. Each run scores that part and the test split once. Every kind of calibration
and of thresholds is then fitted on the first, and measured on the second. So all kinds are compared
on the same networks. The errors are expected calibration errors: of all labels, and the mean over
labels. The last line is JSON: variant -> kind -> column -> mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product

import numpy as np
from tabulate import tabulate

from pipeline.decisions.fitting import fit_decisions
from pipeline.evaluation.diagnostics import calibration_errors
from pipeline.evaluation.metrics import six_numbers
from pipeline.evaluation.spread import mean_of
from pipeline.evaluation.tables import cell
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import open_split, split_validation
from pipeline.settings import DecisionSettings
from stages.checkout.params import Request, read_request
from stages.checkout.plans import open_inputs, plan_run, read_checkpoint

COLUMNS = ("CP", "CR", "CF1", "OP", "OR", "OF1", "error", "error by label")
KINDS = {
    f"{calibration}, {thresholds}": DecisionSettings.model_validate(
        {"calibration": calibration, "thresholds": thresholds}
    )
    for calibration, thresholds in product(
        ("none", "temperature", "platt"), ("fixed", "common", "f1", "precision")
    )
}
"""Calibration and thresholds -> their settings; `precision` asks for 0.9."""

Scored = tuple[np.ndarray, np.ndarray]
"""Logits and truth (N, C)."""


def scored(request: Request, variant: str, seed: int) -> tuple[Scored, Scored]:
    """What a run scores on its validation part and on the test split."""
    plan = plan_run(request, variant, seed)
    checkpoint = read_checkpoint(plan)
    settings = checkpoint.settings
    manifest, cache, _ = open_inputs(plan.dataset, settings)
    whole = open_split(cache, manifest, "train", plan.views, settings.regions)
    _, validation = split_validation(whole, settings.validation, seed)
    scorer = Scorer.of_checkpoint(checkpoint, plan.folder.name)
    splits = (validation, open_split(cache, manifest, "test", regions=settings.regions))
    of_validation, of_test = ((scorer.predict(split).logits, split.truth) for split in splits)
    return of_validation, of_test


def measure(validation: Scored, test: Scored) -> dict[str, list[float]]:
    """Kind -> the `COLUMNS` on the test split, in percent."""
    logits, truth = test
    rows = {}
    for kind, settings in KINDS.items():
        decisions = fit_decisions(*validation, settings)
        numbers = six_numbers(decisions.predicted(logits) & (truth != -1), truth)
        errors = calibration_errors(decisions.calibrated(logits), truth)
        rows[kind] = [*vars(numbers).values(), *errors]
    return rows


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset")
    parser.add_argument("--variants", required=True)
    parser.add_argument("--seeds", required=True)
    options = parser.parse_args(arguments)
    request = read_request(options.dataset)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    lines: list[list[str]] = []
    means: dict[str, dict[str, dict[str, float]]] = {}
    for variant in options.variants.split(","):
        runs = [measure(*scored(request, variant, seed)) for seed in seeds]
        for kind in KINDS:
            columns = list(zip(*(run[kind] for run in runs), strict=True))
            lines.append([variant, kind, *map(cell, columns)])
            numbers = [round(mean_of(column) or 0.0, 2) for column in columns]
            means.setdefault(variant, {})[kind] = dict(zip(COLUMNS, numbers, strict=True))
    say(tabulate(lines, ["variant", "calibration, thresholds", *COLUMNS], tablefmt="github"))
    say(json.dumps(means))


if __name__ == "__main__":
    main()
