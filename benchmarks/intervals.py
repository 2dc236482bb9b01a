"""How often the intervals of `pipeline.evaluation.bootstrap` hold the true value, by simulation.

`python -m benchmarks.intervals` prints a table and, last, a line of JSON with its numbers. Each row
is a share of positives and a number of test images. For each split that is drawn:

- 20 labels are positive at random, independently of each other;
- the scores of a label are normal with deviation 1, and higher by its own separation, 1.5 to 3.5,
  for positives. So the true average precision of each label is known: an integral;
- a second network scores the same images, with a correlation of 0.8 on each side, and with
  separations that are 1.05 times as large (`near`) or half as large (`far`).

The true mAP is that of the labels with a positive in the split. `off` says by how much the mAP of a
split lies above it on average, and `resamples` by how much the resamples lie above the split. Then
follows how often, in percent, each interval holds the true value, which should be 95: that of the
middle of the resamples (`plain`), the one in use, which is moved by twice the bias (`moved`), and a
moved one in which a label without a positive in a resample counts with its value on the split
(`fixed`). With 300 splits these shares have a standard error of 1 to 3.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from tabulate import tabulate

from pipeline.evaluation.bootstrap import Maps, resample

SEPARATIONS = np.linspace(1.5, 3.5, 20)
SHARES = (0.005, 0.015, 0.05, 0.2)
IMAGES = (200, 1000, 5000)
OTHERS = {"near": 1.05, "far": 0.5}

Array = NDArray[np.float64]


@functools.cache
def true_ap(share: float, separation: float) -> float:
    """The average precision of infinitely many images: the integral of precision over recall."""
    threshold = np.linspace(-12, 14, 100_001)
    recall = norm.sf(threshold - separation)
    hits = share * recall
    precision = hits / np.maximum(hits + (1 - share) * norm.sf(threshold), 1e-300)
    return float(np.trapezoid(precision[::-1], recall[::-1]))


@dataclass(frozen=True)
class Split:
    """A split that was drawn: (N, C) truth, and by network the scores and the true mAP."""

    truth: NDArray[np.int64]
    scores: dict[str, Array]
    true: dict[str, float]


def draw_splits(share: float, images: int, repeats: int, seed: int) -> Iterator[Split]:
    """Draw splits that have a positive."""
    rng = np.random.default_rng([seed, images, round(share * 10_000)])
    factors = {"own": 1.0, **OTHERS}
    true = {
        name: np.array([true_ap(share, factor * each) for each in SEPARATIONS])
        for name, factor in factors.items()
    }
    shape = images, len(SEPARATIONS)
    for _ in range(repeats):
        truth = (rng.random(shape) < share).astype(np.int64)
        noise = rng.standard_normal(shape)
        other = 0.8 * noise + 0.6 * rng.standard_normal(shape)
        counted = truth.any(axis=0)
        if counted.any():
            yield Split(
                truth,
                {
                    name: (noise if name == "own" else other) + factor * SEPARATIONS * truth
                    for name, factor in factors.items()
                },
                {name: 100 * float(ap[counted].mean()) for name, ap in true.items()},
            )


def plain(maps: Maps) -> tuple[float, float]:
    """The interval of the middle of the resamples."""
    low, high = np.nanquantile(maps.resamples.mean(axis=0), [0.025, 0.975])
    return float(low), float(high)


def fixed(scores: Array, truth: NDArray[np.int64], resamples: int, seed: int) -> Maps:
    """The mAP over all labels of the split: one that a resample lacks has its value on the split.

    `resample` leaves such a label out, so each label is resampled alone here.
    """
    alone = [
        resample([scores[:, [c]]], truth[:, [c]], resamples=resamples, seed=seed)
        for c in np.flatnonzero(truth.any(axis=0))
    ]
    filled = [np.where(np.isnan(one.resamples), one.split, one.resamples) for one in alone]
    return Maps(np.mean([one.split for one in alone], axis=0), np.mean(filled, axis=0))


def measure(
    share: float, images: int, *, repeats: int, resamples: int, seed: int = 0
) -> dict[str, float]:
    """Measure one row of the table."""
    off, bias = [], []
    held: dict[str, list[bool]] = {}

    def count(what: str, true: float, interval: tuple[float, float]) -> None:
        held.setdefault(what, []).append(interval[0] <= true <= interval[1])

    for number, split in enumerate(draw_splits(share, images, repeats, seed)):
        maps = {
            name: resample([scores], split.truth, resamples=resamples, seed=number)
            for name, scores in split.scores.items()
        }
        own, true = maps["own"], split.true["own"]
        off.append(own.split.mean() - true)
        bias.append(np.nanmean(own.resamples) - own.split.mean())
        count("mAP plain", true, plain(own))
        count("mAP moved", true, own.interval())
        kept = own
        if split.truth.sum(axis=0).min() < 30:  # with more, e^-30 of the resamples have none
            kept = fixed(split.scores["own"], split.truth, resamples, number)
        count("mAP fixed", true, kept.interval())
        for name in OTHERS:
            difference = maps[name].minus(own)
            count(f"{name} plain", split.true[name] - true, plain(difference))
            count(f"{name} moved", split.true[name] - true, difference.interval())
    return {
        "off": float(np.mean(off)),
        "resamples": float(np.mean(bias)),
        **{what: 100 * float(np.mean(shares)) for what, shares in held.items()},
    }


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=300, help="splits to draw for each row")
    parser.add_argument("--resamples", type=int, default=300, help="resamples of each split")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for share in SHARES:
        for images in options.images:
            row = measure(
                share,
                images,
                repeats=options.repeats,
                resamples=options.resamples,
                seed=options.seed,
            )
            rows.append({"positives %": 100 * share, "images": images, **row})
    say(tabulate(rows, headers="keys", floatfmt=".1f", tablefmt="github"))
    say(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
