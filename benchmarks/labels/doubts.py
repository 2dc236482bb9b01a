"""How many of the labels that were made wrong on purpose are among the most doubtful ones.

    python -m benchmarks.labels.doubts --dataset imported --variant max-pool --seeds 0,1,2

Some labels of the training split are flipped, and those that `gmpipe doubts` would list are looked
for, with folds and networks of the same seed. Nothing is written. There are two protocols:

    any    a share of all labels of all images is flipped, so that most flips add a label
    equal  the same share of the labels that are given is removed, and as many are added

Ignored labels, such as VOC's difficult ones, are not flipped, and not judged. Of a list, the first
N are looked at, with N the number of flips that it could find. Chance is the share of flips among
the labels that it could list. The data set's own mistakes count against the list.

The table has the mean over the seeds, with the sample standard deviation. The last line is JSON:
protocol, kind -> the share that was found (mean, in percent), and chance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import expit
from tabulate import tabulate

from pipeline.doubts.folds import divide, score_fold, without_choice
from pipeline.doubts.ranking import Thresholds, find_doubtful
from pipeline.evaluation.tables import cell
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.splits import SplitData, open_split
from pipeline.settings import TrainSettings
from stages.checkout.params import read_request
from stages.checkout.plans import open_inputs, plan_run

KINDS = {"together": (1, 0), "given": (1,), "not given": (0,)}
"""Part of the list -> what its labels are in the flipped truth."""


def flip(truth: np.ndarray, protocol: str, share: float, seed: int) -> np.ndarray:
    """Flip labels.

    Args:
        truth: (N, C) in {1, 0, -1}.
        protocol: `any` or `equal`.
        share: of all labels, or of those that are given.

    Returns:
        the flipped truth.
    """
    rng = np.random.default_rng([seed, 7])
    pools = [np.argwhere(truth >= 0)]
    if protocol == "equal":
        pools = [np.argwhere(truth == 1), np.argwhere(truth == 0)]
    flipped = truth.copy()
    for pool in pools:
        chosen = pool[rng.choice(len(pool), round(share * len(pools[0])), replace=False)]
        flipped[tuple(chosen.T)] = 1 - flipped[tuple(chosen.T)]
    return flipped


def probabilities(
    split: SplitData, vectors: LabelVectors, settings: TrainSettings, *, folds: int, seed: int
) -> np.ndarray:
    """(N, C) probabilities by networks that were not trained on the image."""
    fold, scores = divide(split.image_ids, folds, seed), np.zeros(split.truth.shape)
    for number in range(folds):
        with tempfile.TemporaryDirectory() as folder:
            [logits] = score_fold(
                split,
                fold == number,
                [],
                vectors,
                seed,
                without_choice(settings),
                state_file=Path(folder) / "state.pt",
                name=f"fold {number}",
            )
        scores[fold == number] = expit(logits.astype(np.float64))
    return scores


def found(truth: np.ndarray, flipped: np.ndarray, scores: np.ndarray) -> dict[str, list[float]]:
    """Part of the list -> percent of flips among its first N, N, and percent by chance."""
    images, labels = find_doubtful(scores, flipped, Thresholds.of(scores, flipped))
    wrong = truth != flipped
    results = {}
    for kind, values in KINDS.items():
        listed = np.isin(flipped[images, labels], values)
        possible = np.isin(flipped, values)
        number = int((wrong & possible).sum())
        first = wrong[images[listed], labels[listed]][:number]
        results[kind] = [100 * first.sum() / number, number, 100 * number / possible.sum()]
    return results


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", help="default: as in params.yaml")
    parser.add_argument("--variant", default="max-pool")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--protocols", default="any,equal")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args(arguments)
    run = plan_run(read_request(options.dataset), options.variant, 0)
    manifest, cache, vectors = open_inputs(run.dataset, run.settings)
    split = open_split(cache, manifest, "train", run.views, run.settings.regions)
    results: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for protocol in options.protocols.split(","):
        for seed in map(int, options.seeds.split(",")):
            flipped = flip(split.truth, protocol, options.share, seed)
            scores = probabilities(
                replace(split, truth=flipped), vectors, run.settings, folds=options.folds, seed=seed
            )
            for kind, numbers in found(split.truth, flipped, scores).items():
                results[protocol, kind].append(numbers)
    lines = []
    for key, seeds in results.items():
        shares, flips, chances = zip(*seeds, strict=True)
        lines.append([*key, f"{np.mean(flips):.0f}", cell(shares), f"{np.mean(chances):.2f}"])
    headers = ["protocol", "list", "flips N", "flips among the first N (%)", "by chance (%)"]
    say(tabulate(lines, headers, "github", disable_numparse=True) + "\n")
    summary = {
        ", ".join(key): {
            "found": float(np.mean([one[0] for one in seeds])),
            "chance": float(np.mean([one[2] for one in seeds])),
            "seeds": [round(one[0], 2) for one in seeds],
        }
        for key, seeds in results.items()
    }
    say(json.dumps(summary))


if __name__ == "__main__":
    main()
