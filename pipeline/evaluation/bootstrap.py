"""How much a difference in mAP depends on the choice of test images: a paired bootstrap.

Letters: N images, C labels, R resamples, S seeds, T distinct scores among one label's positives.

A resample is N images drawn with replacement from the N of the split: some occur several times,
some not at all. It is stored as how often each image was drawn, so no array is repeated: a weighted
average precision gives the same number as repeated images would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from pipeline.errors import MismatchError
from pipeline.evaluation.metrics import Floats, Integers

RESAMPLES = 1000
"""R, for the intervals of tables and the page."""

COVERAGE = 0.95
"""Share of the resamples that lie in the interval."""

_CHUNK = 250  # resamples computed together; with 100,000 images they take 100 MB


def resampled_maps(
    runs: Sequence[Floats], truth: Integers, *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Compute the mAP of each run on each resample of the images.

    The mAP of a resample is what `metrics.evaluate` would give for the repeated images: the mean of
    `metrics.average_precision` over the labels that have a positive in it. The resamples depend
    only on ``seed`` and N. Two calls therefore use the same resamples, and their results are
    paired.

    Args:
        runs: S arrays of (N, C) scores; their rows are the same images.
        truth: (N, C) in {1, 0, -1}; entries of -1 are left out.
        resamples: R.
        seed: of the drawing.

    Returns:
        (S, R) in percent; nan where a resample has no positive at all.

    Raises:
        MismatchError: scores and truth differ in shape.
    """
    for scores in runs:
        if scores.shape != truth.shape:
            raise MismatchError(
                f"The scores have the shape {scores.shape} and the truth has {truth.shape}; "
                "expected (images, labels) for both.",
                "Evaluate the runs again.",
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
    """Compute the interval that holds the middle 95 % of the resampled differences.

    Args:
        maps, base: (S, R) from `resampled_maps`, with the same seeds in the same order. The
            difference of a resample is averaged over the seeds.

    Returns:
        lower and upper end of ``maps`` minus ``base``.
    """
    return mean_interval(maps - base)


def mean_interval(maps: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the interval that holds the middle 95 % of the resamples, averaged over the seeds.

    Args:
        maps: (S, R) from `resampled_maps`, or a difference of two.

    Returns:
        lower and upper end.
    """
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(maps.mean(axis=0), [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Interval:
    """How much a variant's mAP depends on the choice of test images.

    Attributes:
        ends: lower and upper end for the mAP, averaged over the seeds, in percent.
        difference: the ends for its mAP minus that of the base, averaged over the seeds, in
            points; None for the base itself, or if there is no base.
    """

    ends: tuple[float, float]
    difference: tuple[float, float] | None


def intervals(
    runs: Mapping[str, Sequence[Floats]], truth: Integers, base: str
) -> dict[str, Interval]:
    """Compute the interval of each variant from `RESAMPLES` resamples.

    Args:
        runs: variant -> (N, C) scores of each of its seeds; all variants have the same seeds.
        truth: (N, C).
        base: the variant that the others are compared with.
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
    """Yield how often each image is in each resample: chunks of (N, at most `_CHUNK`) float32."""
    rng = np.random.default_rng(seed)
    for first in range(0, resamples, _CHUNK):
        draws = torch.empty(images, min(_CHUNK, resamples - first))
        for column in range(draws.shape[1]):
            drawn = rng.integers(images, size=images)
            draws[:, column] = torch.from_numpy(np.bincount(drawn, minlength=images))
        yield draws


@dataclass(frozen=True)
class _Curve:
    """The images of one label by descending score, without ignored ones, in T groups.

    A group ends with the score of a positive. Recall changes only there, so precision is needed
    only there. Images with equal scores are in the same group.

    Attributes:
        order: (at most N,) images down to the last positive's score.
        starts: (T,) where each group begins in ``order``.
        positives: the positive images in ``order``.
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
    ranks = np.flatnonzero(positive)
    return _Curve(
        torch.from_numpy(order[: ends[-1]] if ends.size else order[:0]),
        torch.from_numpy(starts),
        torch.from_numpy(order[ranks]),
        torch.from_numpy(np.searchsorted(ranks, starts)),
    )


@torch.inference_mode()
def _average_precision(curve: _Curve, draws: Tensor) -> NDArray[np.float64]:
    """Compute `metrics.average_precision` on each resample in ``draws`` (N, R).

    Returns:
        (R,); nan where a resample has no positive.
    """
    if not len(curve.positives):
        return np.full(draws.shape[1], np.nan)
    # `embedding_bag` sums rows group by group, several times as fast as the alternatives in torch
    # and numpy. The sums are whole numbers below 2^24, so float32 is exact.
    new_hits = embedding_bag(curve.positives, draws, curve.positive_starts, mode="sum").double()
    images = embedding_bag(curve.order, draws, curve.starts, mode="sum").double().cumsum(0)
    hits = new_hits.cumsum(0)
    # Where no image was drawn so far there are no hits either: the 1 turns 0 / 0 into 0.
    area = (new_hits * hits / images.clamp(min=1)).sum(0)
    ap: NDArray[np.float64] = (area / hits[-1]).numpy()  # 0 / 0 is nan
    return ap
