"""How far a difference in mAP could be the luck of the test images: a paired bootstrap.

Letters: N images, C labels, R resamples, S seeds, T distinct scores that one label's positives
have.

A resample is N images drawn from the N of the split, with replacement: some are in it several
times, some not at all. It is kept as how often each image was drawn, so that nothing is repeated:
a weighted average precision gives the number that the repeated images would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import Floats, Integers

RESAMPLES = 1000
COVERAGE = 0.95
"""Share of the resampled differences that lie in the interval."""

_CHUNK = 250  # resamples at once, so that 100,000 images take 100 MB


def resampled_maps(
    runs: Sequence[Floats], truth: Integers, *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """mAP of each run on each resample of the images.

    The mAP of a resample is what `metrics.evaluate` would give for the repeated images: the mean of
    `metrics.average_precision` over the labels that have a positive in it. The resamples depend on
    ``seed`` and N alone: those of two calls are the same ones, so that results are paired.

    Args:
        runs: S times (N, C) scores, the rows of all of the same images.
        truth: (N, C) in {1, 0, -1}; entries of -1 are left out.
        resamples: R.
        seed: of the drawing.

    Returns:
        (S, R) in percent; nan where a resample has no positive at all.

    Raises:
        GmpipeError: scores of another shape than the truth.
    """
    for scores in runs:
        if scores.shape != truth.shape:
            raise GmpipeError(
                f"scores have the shape {scores.shape}, truth {truth.shape}; expected (images, "
                "labels) for both. Evaluate the runs again with `gmpipe evaluate`."
            )
    images, labels = truth.shape
    curves = [_curve(scores[:, c], truth[:, c]) for scores in runs for c in range(labels)]
    chunks = [
        np.stack([_average_precision(curve, draws) for curve in curves])
        for draws in _draws(images, resamples, seed)
    ]
    ap = np.concatenate(chunks, axis=1).reshape(len(runs), labels, resamples)
    known = ~np.isnan(ap)
    total = np.where(known, ap, 0).sum(axis=1)
    counted = known.sum(axis=1)
    maps: NDArray[np.float64] = np.full(total.shape, np.nan)
    np.divide(100 * total, counted, out=maps, where=counted > 0)
    return maps


def difference_interval(
    maps: NDArray[np.float64], base: NDArray[np.float64]
) -> tuple[float, float]:
    """Where the middle 95 % of the resampled differences lie.

    Args:
        maps, base: (S, R) of `resampled_maps`, the same seeds in the same order. Of each resample
            the difference is the mean over the seeds.

    Returns:
        its lower and upper end, ``maps`` minus ``base``.
    """
    return mean_interval(maps - base)


def mean_interval(maps: NDArray[np.float64]) -> tuple[float, float]:
    """Where the middle 95 % of the resamples lie, of each the mean over the seeds.

    Args:
        maps: (S, R) of `resampled_maps`, or a difference of two.

    Returns:
        the lower and upper end.
    """
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(maps.mean(axis=0), [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Interval:
    """What other test images would do to a variant's mAP: the middle 95 % of the resamples.

    Attributes:
        ends: of the mAP, mean over the seeds, in percent.
        difference: ends of its mAP minus that of the base, mean over the seeds, in points; None
            for the base itself, or where there is none.
    """

    ends: tuple[float, float]
    difference: tuple[float, float] | None


def intervals(
    runs: Mapping[str, Sequence[Floats]], truth: Integers, base: str
) -> dict[str, Interval]:
    """The interval of each variant.

    Args:
        runs: variant -> (N, C) scores of each of its seeds, the same seeds for all.
        truth: (N, C).
        base: the variant that the others are held against.
    """
    maps = {
        variant: resampled_maps(of_variant, truth, resamples=RESAMPLES)
        for variant, of_variant in runs.items()
    }
    return {
        variant: Interval(
            mean_interval(of_variant),
            difference_interval(of_variant, maps[base])
            if variant != base and base in maps
            else None,
        )
        for variant, of_variant in maps.items()
    }


def _draws(images: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each image is in each resample: chunks of (N, at most `_CHUNK`) float32."""
    rng = np.random.default_rng(seed)
    for first in range(0, resamples, _CHUNK):
        draws = torch.empty(images, min(_CHUNK, resamples - first))
        for column in range(draws.shape[1]):
            drawn = rng.integers(images, size=images)
            draws[:, column] = torch.from_numpy(np.bincount(drawn, minlength=images))
        yield draws


@dataclass(frozen=True)
class _Curve:
    """The images of one label by descending score, ignored ones left out, in T groups.

    A group ends with a score that a positive has: recall changes there alone, so that precision is
    looked at there alone. Images with equal scores are never parted.

    Attributes:
        order: (at most N,) images down to the last positive's score.
        starts: (T,) where each group begins in ``order``.
        positives: the positive ones of ``order``.
        positive_starts: (T,) where each group begins in ``positives``.
    """

    order: Tensor
    starts: Tensor
    positives: Tensor
    positive_starts: Tensor


def _curve(scores: Floats, truth: Integers) -> _Curve:
    kept = np.flatnonzero(truth != -1)
    order = kept[np.argsort(-scores[kept], kind="stable")]
    ascending, positive = -scores[order], truth[order] == 1
    ends = np.unique(np.searchsorted(ascending, ascending[positive], side="right"))
    starts = np.append(0, ends)[:-1]
    places = np.flatnonzero(positive)
    return _Curve(
        torch.from_numpy(order[: ends[-1]] if ends.size else order[:0]),
        torch.from_numpy(starts),
        torch.from_numpy(order[places]),
        torch.from_numpy(np.searchsorted(places, starts)),
    )


@torch.inference_mode()
def _average_precision(curve: _Curve, draws: Tensor) -> NDArray[np.float64]:
    """`metrics.average_precision` on each resample of ``draws`` (N, R): (R,), nan without any
    positive."""
    if not len(curve.positives):
        return np.full(draws.shape[1], np.nan)
    # Sums of rows, group by group, several times as fast as any other way that torch or numpy have.
    # Whole numbers below 2^24: exact in float32.
    new_hits = embedding_bag(curve.positives, draws, curve.positive_starts, mode="sum").double()
    images = embedding_bag(curve.order, draws, curve.starts, mode="sum").double().cumsum(0)
    hits = new_hits.cumsum(0)
    # Where no image was drawn down to here there are no hits either, and 0 / 0 counts nothing.
    area = (new_hits * hits / images.clamp(min=1)).sum(0)
    ap: NDArray[np.float64] = (area / hits[-1]).numpy()  # 0 / 0 is nan
    return ap
