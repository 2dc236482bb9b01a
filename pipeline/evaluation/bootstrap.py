"""How much an mAP depends on the choice of test images: a paired bootstrap, corrected for its bias.

Letters: N images, C labels, R resamples, S seeds, T distinct scores among one label's positives.

A resample is N images drawn with replacement from the N of the split: some occur several times,
some not at all. It is stored as how often each image was drawn, so no array is repeated: a weighted
average precision gives the same number as repeated images would.

An average precision from few positives is too high: on average, that of a split lies above that of
many images, and that of a resample lies above that of its split by about as much again. So the
middle of the resamples is off by twice their bias, and the interval is moved back by that. The
labels of a resample are those with a positive in it, as in any split. `benchmarks.intervals`
measures the bias and how often the interval holds the true value, against the interval that is not
moved and against one that keeps all labels in every resample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Share of the resamples that lie in the interval before it is moved."""

FEW = 10
"""With fewer positives per label, on average, intervals are too narrow, and the mAP is too high."""

_CHUNK = 250  # resamples computed together; with 100,000 images they take 100 MB


@dataclass(frozen=True)
class Maps:
    """The mAP of S runs, or the difference of two such, in percent.

    Attributes:
        split: (S,) on the split itself.
        resamples: (S, R) on each resample; nan where a resample has no positive at all.
    """

    split: NDArray[np.float64]
    resamples: NDArray[np.float64]

    def minus(self, base: Maps) -> Maps:
        """Subtract the mAP of other runs on the same resamples, seed by seed."""
        return Maps(self.split - base.split, self.resamples - base.resamples)

    def interval(self) -> tuple[float, float]:
        """Compute the interval of the mean over the seeds.

        It is that of the middle 95 % of the resamples, lowered by twice the amount by which they
        lie above the split on average.

        Returns:
            lower and upper end.
        """
        means = self.resamples.mean(axis=0)
        tail = (1 - COVERAGE) / 2
        low, high = np.nanquantile(means, [tail, 1 - tail])
        moved = 2 * (np.nanmean(means) - self.split.mean())
        return float(low - moved), float(high - moved)


def resample(
    runs: Sequence[Floats],
    truth: Integers,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    on_resamples: Callable[[int], object] = lambda resamples: None,
) -> Maps:
    """Compute the mAP of each run on the split, and on each resample of its images.

    The mAP of a resample is what `metrics.evaluate` would give for the repeated images: the mean of
    `metrics.average_precision` over the labels that have a positive in it. The resamples depend
    only on ``seed`` and N. Two calls therefore use the same resamples, and their results are
    paired.

    Args:
        runs: S arrays of (N, C) scores; their rows are the same images.
        truth: (N, C) in {1, 0, -1}; entries of -1 are left out.
        resamples: R.
        seed: of the drawing.
        on_resamples: called with the number of resamples whenever some are computed.

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
    once = torch.ones(images, 1)
    chunks = [np.stack([_average_precision(curve, once) for curve in curves])]
    for draws in _draws(images, resamples, seed):
        chunks.append(np.stack([_average_precision(curve, draws) for curve in curves]))
        on_resamples(draws.shape[1])
    ap = np.concatenate(chunks, axis=1).reshape(len(runs), labels, 1 + resamples)
    known = ~np.isnan(ap)
    total = np.where(known, ap, 0).sum(axis=1)
    counted = known.sum(axis=1)
    maps: NDArray[np.float64] = np.full(total.shape, np.nan)
    np.divide(100 * total, counted, out=maps, where=counted > 0)
    return Maps(maps[:, 0], maps[:, 1:])


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


@dataclass(frozen=True)
class Intervals:
    """The intervals of a data set's variants.

    Attributes:
        of: by variant.
        about: what they are, in words; a phrase that begins with "95 % interval".
        weak: whether the labels have too few positives for them, as ``about`` then says.
    """

    of: Mapping[str, Interval]
    about: str
    weak: bool


def intervals(
    runs: Mapping[str, Sequence[Floats]],
    truth: Integers,
    base: str,
    on_resamples: Callable[[int], object] = lambda resamples: None,
) -> Intervals:
    """Compute the interval of each variant from `RESAMPLES` resamples.

    Args:
        runs: variant -> (N, C) scores of each of its seeds; all variants have the same seeds. An
            entry has one array, which is compared with the mean over the seeds of ``base``.
            Variants whose scores do not rank have no mAP, and are left out by the caller.
        truth: (N, C).
        base: the variant that the others are compared with.
        on_resamples: as in `resample`, for one variant after another.
    """
    maps = {
        variant: resample(of_variant, truth, resamples=RESAMPLES, on_resamples=on_resamples)
        for variant, of_variant in runs.items()
    }
    found = {}
    for variant, of_variant in maps.items():
        low, high = np.clip(of_variant.interval(), 0, 100)
        difference = None
        if variant != base and base in maps:
            difference = of_variant.minus(maps[base]).interval()
        found[variant] = Interval((float(low), float(high)), difference)
    positives = (truth == 1).sum(axis=0)
    mean = float(positives[positives > 0].mean()) if positives.any() else 0.0
    return Intervals(found, _about(len(truth), mean), mean < FEW)


def _about(images: int, positives: float) -> str:
    """Say what the intervals are, for a number of images and a mean number of positives."""
    counted = f"the {images:,} test images" if images > 1 else "the one test image"
    text = (
        f"{100 * COVERAGE:.0f} % interval from {RESAMPLES:,} resamples of {counted} (paired "
        "bootstrap, corrected for its bias; a label without a positive in a resample is left out "
        "of it). It shows how much the result depends on the choice of test images, not on the seed"
    )
    if positives < FEW:
        text += (
            f". The labels have {positives:.1f} positives on average: with fewer than {FEW}, "
            "intervals are too narrow and the mAP is too high"
        )
    return text


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
