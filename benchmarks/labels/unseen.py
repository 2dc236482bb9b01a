"""What scores of labels are worth that a network was not trained with (`gmpipe predict --labels`).

    python -m benchmarks.labels.unseen --dataset imported --variant full --seeds 0,1,2

For each seed, some labels are drawn and left out, and a network is trained on the others, with the
same images. It then scores the test images for the labels left out, given only their vectors:
`added` to those that it was trained with, as `predict --labels` does, or `alone`. Beside it stand a
network of the first seed that was trained on all labels, and the share of test images that have the
label, which is the average precision of scores that say nothing. Nothing is written.

The table has the AP of each label left out, in percent, then the mean and sample standard deviation
over all of them, and the mAP of the labels that were trained. The last line is JSON with the means.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from pipeline.errors import InputError
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.tables import cell
from pipeline.heads.contract import Head, LabelSet
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import SplitData, open_split, training_part
from pipeline.learning.training import train_network
from pipeline.settings import TrainSettings
from stages.checkout.params import read_request
from stages.checkout.plans import open_inputs, plan_run

COLUMNS = ("added", "alone", "trained", "chance")


def of_labels(vectors: LabelVectors, labels: np.ndarray) -> LabelVectors:
    """The vectors of some labels, given by their numbers."""
    names = tuple(vectors.names[label] for label in labels.tolist())
    return LabelVectors(names, vectors.vectors[labels], vectors.source)


def trained_on(
    split: SplitData, vectors: LabelVectors, settings: TrainSettings, labels: np.ndarray, seed: int
) -> Head:
    """Train a network on some labels of the images that `training_share` draws."""
    part = training_part(split, settings.training_share, seed)
    part = replace(part, truth=part.truth[:, labels])
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.pt"
        return train_network(
            part, of_labels(vectors, labels), seed, settings, state_file=state
        ).network


def average_precisions(
    network: Head, test: SplitData, vectors: LabelVectors, labels: np.ndarray
) -> dict[str, float]:
    """AP of labels in percent by name, of a network that is given the vectors of just these."""
    asked = of_labels(vectors, labels)
    known = LabelSet(torch.from_numpy(asked.vectors), torch.zeros(len(labels)))
    scorer = Scorer(network, known, asked.names, name="the network", batch_size=64)
    found = evaluate(scorer.predict(test).logits, test.truth[:, labels], asked.names).AP
    return {name: value for name, value in found.items() if value is not None}


def measure(
    split: SplitData,
    test: SplitData,
    vectors: LabelVectors,
    settings: TrainSettings,
    seeds: Sequence[int],
    left_out: int,
) -> tuple[list[list[object]], dict[str, list[float]]]:
    """Train the networks, and measure them.

    Returns:
        a row for each seed and label left out, with the numbers of `COLUMNS`; and the mAP of the
        trained labels, `before` and `after` the others were added, for each seed.
    """
    every = np.arange(len(vectors.names))
    of_all = average_precisions(
        trained_on(split, vectors, settings, every, seeds[0]), test, vectors, every
    )
    rows: list[list[object]] = []
    of_trained: dict[str, list[float]] = {"before": [], "after": []}
    for seed in seeds:
        new = np.sort(np.random.default_rng([seed, 8]).choice(every, left_out, replace=False))
        kept = np.setdiff1d(every, new)
        network = trained_on(split, vectors, settings, kept, seed)
        added = average_precisions(network, test, vectors, np.concatenate([kept, new]))
        alone = average_precisions(network, test, vectors, new)
        before = average_precisions(network, test, vectors, kept)
        of_trained["before"].append(float(np.mean(list(before.values()))))
        of_trained["after"].append(float(np.mean([added[name] for name in before])))
        for label in new.tolist():
            name, truth = vectors.names[label], test.truth[:, label]
            chance = 100 * float((truth == 1).sum() / (truth >= 0).sum())
            rows.append([seed, name, added[name], alone[name], of_all[name], chance])
    return rows, of_trained


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", help="default: as in params.yaml")
    parser.add_argument("--variant", default="full")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--left-out", type=int, default=4, help="number of labels")
    parser.add_argument("--set", action="append", default=[], help="as of `gmpipe train`")
    options = parser.parse_args(arguments)
    run = plan_run(read_request(options.dataset, tuple(options.set)), options.variant, 0)
    settings, seeds = run.settings, [int(seed) for seed in options.seeds.split(",")]
    if not settings.network.scores_new_labels:
        raise InputError(
            f"The head of {options.variant}, `{settings.network.head}`, scores no new labels.",
            "Take `full`, or `ml-decoder` with `network.queries: vectors`.",
        )
    manifest, cache, vectors = open_inputs(run.dataset, settings)
    split = open_split(cache, manifest, "train", run.views, settings.regions)
    test = open_split(cache, manifest, "test", regions=settings.regions)
    rows, of_trained = measure(split, test, vectors, settings, seeds, options.left_out)
    columns = dict(zip(COLUMNS, list(zip(*rows, strict=True))[2:], strict=True))
    lines = [[seed, name, *(f"{value:.1f}" for value in values)] for seed, name, *values in rows]
    lines.append(["all", "mean", *(cell(columns[name]) for name in COLUMNS)])
    say(tabulate(lines, ["seed", "label left out", *COLUMNS], "github", disable_numparse=True))
    trained = {name: cell(values) for name, values in of_trained.items()}
    say(
        f"\nmAP of the labels that were trained: {trained['before']}, and {trained['after']} with "
        "the others added.\n"
    )
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    say(json.dumps({**means, **{name: float(np.mean(v)) for name, v in of_trained.items()}}))


if __name__ == "__main__":
    main()
