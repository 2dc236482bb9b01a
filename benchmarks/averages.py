"""What averages of runs reach: of a variant's seeds, and of all variants.

    python -m benchmarks.averages --dataset imported --variants full,max-pool,csra --seeds 0,1,2

It reads the predictions of runs that `gmpipe compare` made, and trains nothing. The average of runs
is that of their probabilities. The table has, for each variant, the mean and spread of single runs
and the average of its seeds; its last row has the average of all runs. An average removes the part
of the error in which runs differ. What is left is shared by all heads: it comes from the regions
and the labels.

The last line is JSON: the variant, or `all`, -> mAP of single runs (mean) and of the average.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from scipy.special import expit, logit
from tabulate import tabulate

from pipeline.errors import InputError
from pipeline.evaluation.metrics import Metrics, evaluate
from pipeline.evaluation.predictions import Scores
from pipeline.evaluation.tables import cell
from stages.checkout.params import read_request
from stages.checkout.results import load_runs, load_scores

METRICS = ("mAP", "CF1", "OF1")


def average_of(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Average the probabilities of runs: (N, C) logits each -> (N, C) logits."""
    mean = np.mean([expit(logits.astype(np.float64)) for logits in runs], axis=0)
    logits: np.ndarray = logit(mean.clip(1e-12, 1 - 1e-12))
    return logits


def measured(logits: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> list[float]:
    """The `METRICS` of scores, in percent."""
    metrics: Metrics = evaluate(logits, truth, tuple(labels))
    numbers = [metrics.number(name) for name in METRICS]
    return [number for number in numbers if number is not None]  # all are defined


def measure(scores: Scores, labels: Sequence[str]) -> dict[str, list[list[float]]]:
    """Measure averages.

    Returns:
        The variant, or `all`, -> the `METRICS` of the average and then of each single run.
    """
    every = {**scores.logits, "all": [run for runs in scores.logits.values() for run in runs]}
    return {
        variant: [measured(one, scores.truth, labels) for one in (average_of(runs), *runs)]
        for variant, runs in every.items()
    }


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("dataset", "variants", "seeds"):
        parser.add_argument(f"--{name}", help="default: as in params.yaml")
    options = parser.parse_args(arguments)
    request = read_request(options.dataset)
    variants = options.variants.split(",") if options.variants else request.params.variants
    seeds = map(int, options.seeds.split(",")) if options.seeds else request.params.seeds
    runs = load_runs(request, variants, list(seeds))
    for variant, (first, *_) in runs.items():
        if first.evaluation.metrics.all is None or first.evaluation.metrics.mAP is None:
            raise InputError(
                f"The scores of {variant} are no probabilities that rank images, so they can't be "
                "averaged.",
                "Leave the variant out of `--variants`.",
            )
    labels = next(iter(runs.values()))[0].evaluation.metrics.AP
    results = measure(load_scores(request, runs), list(labels))
    lines = []
    for variant, (averaged, *single) in results.items():
        columns = zip(averaged, zip(*single, strict=True), strict=True)
        cells = [text for one, many in columns for text in (cell(many), f"{one:.1f}")]
        lines.append([variant, len(single), *cells])
    headers = [text for name in METRICS for text in (name, f"{name} of the average")]
    say(tabulate(lines, ["variant", "runs", *headers], "github", disable_numparse=True) + "\n")
    maps = {
        variant: {"single": fmean(one[0] for one in single), "average": averaged[0]}
        for variant, (averaged, *single) in results.items()
    }
    say(json.dumps(maps))


if __name__ == "__main__":
    main()
