"""A search for the settings of heads that spends the same on each of them.

    python -m benchmarks.tuning --dataset imported --heads all

It reads the training images of a data set's cache, and never its test images. They are divided into
five folds, one of which validates. For each variant it trains `TRIALS` times: first with the
variant's own settings, then with settings drawn at random from `COMMON` and, for the head's own
settings, from `OWN`: every value of a setting is drawn about equally often, and the same variant
always gets the same draws. The `FINALISTS` with the best mAP on the first fold are trained for a
second one, and the best mean of the two wins.

Every training is a row of the file `--output` (CSV). One that is listed there is not repeated, so
that a search that was stopped goes on. It prints the winner of each variant and, last, a line of
JSON with the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from pipeline.evaluation.metrics import evaluate
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import open_split
from pipeline.learning.training import known_labels, train_network
from pipeline.settings import TrainSettings, head_variants, settings_class
from stages.checkout.params import Request, read_request
from stages.checkout.plans import open_inputs

FOLDS = 5
TRIALS = 6
FINALISTS = 2
FINALS = 2
"""Folds on which a finalist is judged."""

COMMON: dict[str, Sequence[Any]] = {
    "learning_rate": (0.001, 0.003, 0.01),
    "epochs": (10, 20),
    "network.least_deviation": (0.1, 1.0),
    "network.input_dropout": (0.0, 0.3),
    "network.whole_region": (False, True),
    "network.dropout": (0.0, 0.2, 0.5),
    "network.hidden_size": (128, 256),
}
"""Setting -> what is tried. One that a head does not have is left out for it."""

OWN: dict[str, dict[str, Sequence[Any]]] = {
    "gm-mlic": {"network.latent_size": (48, 64), "network.decoder_dropout": (0.0, 0.3)},
    "csra": {"network.heads": (1, 2, 4), "network.weight": (0.3, 1.0, 3.0)},
}
"""Head -> its further settings."""

Changes = dict[str, Any]
"""Dotted key of a train setting -> value."""


@dataclass(frozen=True)
class Trial:
    """One training of a search."""

    variant: str
    changes: str
    """`Changes` as JSON."""
    fold: int


def trials(variant: str, settings: TrainSettings) -> list[Changes]:
    """The changes that are tried for a variant; the first one is none."""
    space = {**COMMON, **OWN.get(settings.network.head, {})}
    known = settings_class(settings.network.head).model_fields
    space = {
        key: values
        for key, values in space.items()
        if not key.startswith("network.") or key.removeprefix("network.") in known
    }
    draw = random.Random(variant)
    columns: dict[str, list[Any]] = {}
    for key, values in space.items():
        columns[key] = [values[number % len(values)] for number in range(TRIALS - 1)]
        draw.shuffle(columns[key])
    drawn = [
        {key: column[number] for key, column in columns.items()} for number in range(TRIALS - 1)
    ]
    return [{}, *drawn]


def changed(request: Request, variant: str, changes: Changes) -> TrainSettings:
    """The settings of a variant with changes."""
    block = f"train.{request.dataset}.variants.{variant}"
    options = [f"{block}.{key}={json.dumps(value)}" for key, value in changes.items()]
    return request.overriding(*options).variant(variant)


def fold_of(images: int, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, and those to validate on."""
    order = np.random.default_rng(0).permutation(images)
    return np.sort(order[np.arange(images) % FOLDS != fold]), np.sort(order[fold::FOLDS])


def run(dataset: str, trial: Trial) -> dict[str, Any]:
    """Train once, and return a row of the file."""
    torch.set_num_threads(1)
    settings = changed(read_request(dataset), trial.variant, json.loads(trial.changes))
    manifest, cache, vectors = open_inputs(dataset, settings)
    whole = open_split(cache, manifest, "train", regions=settings.regions)
    trained, validated = fold_of(len(whole), trial.fold)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        training = train_network(
            whole.take(trained),
            vectors,
            0,
            settings,
            state_file=Path(folder) / "state.pt",
        )
    seconds = time.monotonic() - began
    labels = known_labels(whole.take(trained), vectors, settings)
    scorer = Scorer(training.network, labels, vectors.names, name=trial.variant, batch_size=64)
    judged = whole.take(validated)
    measured = evaluate(scorer.predict(judged).logits, judged.truth, vectors.names).mAP
    # That of a set predictor is not defined, but there is nothing better to search by.
    assert measured is not None
    return {
        **vars(trial),
        "validation_mAP": round(measured, 3),
        "seconds": round(seconds, 1),
    }


def search(dataset: str, variant: str, output: Path, request: Request) -> list[dict[str, Any]]:
    """Search for one variant; returns all its rows."""
    tried = [json.dumps(one) for one in trials(variant, request.variant(variant))]
    rows = list(_made(dataset, [Trial(variant, one, 0) for one in tried], output))
    best = sorted(rows, key=lambda row: -float(row["validation_mAP"]))[:FINALISTS]
    finals = [Trial(variant, row["changes"], fold) for row in best for fold in range(1, FINALS)]
    return [*rows, *_made(dataset, finals, output)]


def _made(dataset: str, wanted: Sequence[Trial], output: Path) -> Iterator[dict[str, Any]]:
    """The rows of trials, of which only those are trained that the file lacks."""
    known = {}
    if output.exists():
        with output.open(newline="") as stream:
            known = {
                Trial(row["variant"], row["changes"], int(row["fold"])): row
                for row in csv.DictReader(stream)
            }
    for trial in dict.fromkeys(wanted):
        if trial in known:
            yield known[trial]
            continue
        row = run(dataset, trial)
        is_new = not output.exists()
        with output.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, row, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        yield row


def winner(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The changes with the best mean over the folds, among those that have all of them."""
    maps: dict[str, list[float]] = {}
    for row in rows:
        maps.setdefault(row["changes"], []).append(float(row["validation_mAP"]))
    finals = {changes: fmean(found) for changes, found in maps.items() if len(found) == FINALS}
    return max(finals.items(), key=lambda item: item[1])


def main() -> None:
    """Search for all variants that are asked for, several at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="imported")
    parser.add_argument("--heads", default="all", help="variants, or `all`")
    parser.add_argument("--output", type=Path, default=Path("trials.csv"))
    parser.add_argument("--jobs", type=int, default=2, help="variants at a time")
    options = parser.parse_args()
    request = read_request(options.dataset)
    variants = head_variants() if options.heads == "all" else options.heads.split(",")
    found: dict[str, tuple[str, float]] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        jobs = {
            variant: pool.submit(search, options.dataset, variant, options.output, request)
            for variant in variants
        }
        for variant, job in jobs.items():
            found[variant] = winner(job.result())
    print(tabulate([[name, f"{value:.2f}", how] for name, (how, value) in found.items()]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
