"""A split of a data set: its rows in the region cache, and its labels.

Letters: N images of the split, V views of an image, B images of a batch, R rows, M instances,
m regions of a row in the cache, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.datasets.manifest import Manifest, Split
from pipeline.errors import InputError, MismatchError
from pipeline.heads.contract import LabelSet, RegionBatch
from pipeline.labels.vectors import LabelVectors
from pipeline.settings import TrainSettings
from pipeline.shards.failures import FAILURES_NAME, read_failures
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import OF_REGIONS, RegionRows


@dataclass(frozen=True)
class SplitData:
    """The rows and labels of one split.

    Attributes:
        cache: the regions.
        image_ids: N ids, in the manifest's order.
        rows: (N, V) int64, row numbers in the cache of each image's V views.
        truth: (N, C) int8: 1 positive, 0 negative, -1 ignored.
        regions: M, the number of an image's best regions that are used.
        left_out: further images of the split that have no regions, according to failures.parquet.
    """

    cache: RegionCache
    image_ids: Sequence[str]
    rows: np.ndarray
    truth: np.ndarray
    regions: int
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, images: np.ndarray) -> SplitData:
        """Select images by their indices."""
        return replace(
            self,
            image_ids=[self.image_ids[image] for image in images],
            rows=self.rows[images],
            truth=self.truth[images],
            left_out=0,
        )

    def instances(self, images: np.ndarray, views: np.ndarray | int = 0) -> RegionBatch:
        """Read one view of each of B images; the features keep the type they are stored in.

        Args:
            images: (B,) indices.
            views: (B,) view of each image, or one view for all.
        """
        return instance_batch(self.cache.gather(self.rows[images, views]), self.regions)


def open_split(
    cache: RegionCache,
    manifest: Manifest,
    split: Split,
    views: int = 1,
    regions: int | None = None,
) -> SplitData:
    """Find the rows of a split in the cache.

    Images that failures.parquet lists are left out and counted.

    Args:
        cache, manifest: of one data set.
        split: ``train``, ``val`` or ``test``.
        views: V, the first views of every image.
        regions: M, the number of an image's best regions to use; None for all that are cached.

    Raises:
        MissingError: any other image of the split is not in the cache.
        InputError: no image is left, or the cache holds fewer than ``regions`` regions per image.
        MismatchError: cache and manifest are of two data sets.
    """
    if cache.dataset != manifest.dataset:
        raise MismatchError(
            f"{cache.folder} holds the regions of the data set {cache.dataset!r}, but the manifest "
            f"is of {manifest.dataset!r}.",
            "Name the cache and the manifest of one data set.",
        )
    check_regions(cache, manifest.dataset, regions)
    failures = read_failures(cache.folder)
    listed = manifest.image_ids(split)
    kept = [image for image, image_id in enumerate(listed) if image_id not in failures]
    if not kept:
        imported = "imported_from" in cache.recipe
        raise InputError(
            f"{cache.folder}: none of the {len(listed)} images of the {split} split has regions; "
            f"{FAILURES_NAME} gives the reason for each.",
            "Import regions of these images."
            if imported
            else "Fix the images, and extract their regions again.",
        )
    image_ids = [listed[image] for image in kept]
    rows = np.stack([cache.lookup(image_ids, view) for view in range(views)], axis=1)
    truth = manifest.truth(split)[kept]
    return SplitData(
        cache, image_ids, rows, truth, regions or cache.regions, left_out=len(listed) - len(kept)
    )


def split_validation(split: SplitData, share: float, seed: int) -> tuple[SplitData, SplitData]:
    """Divide the training split into a part to train on and a part to validate on.

    Args:
        split: the training split, of at least two images.
        share: of the images that go to the validation part; each part gets at least one.
        seed: of the choice.

    Returns:
        The part to train on, with the count of what was left out, and the validation part; both in
        the split's order.
    """
    order = np.random.default_rng([seed, 2]).permutation(len(split))
    size = validation_size(len(split), share)
    trained = replace(split.take(np.sort(order[size:])), left_out=split.left_out)
    return trained, split.take(np.sort(order[:size]))


def validation_size(images: int, share: float) -> int:
    """How many of the training split's images `split_validation` validates on."""
    return min(max(1, round(share * images)), images - 1)


def training_part(split: SplitData, share: float, seed: int) -> SplitData:
    """Draw the images to train on. Of one seed, those of a smaller share are among a larger one's.

    Args:
        split: the images that could be trained on, without those that validate.
        share: of the images that are drawn, without replacement; at least one is.
        seed: of the choice.

    Returns:
        The drawn images in the split's order, with the count of what was left out of the split.
    """
    order = np.random.default_rng([seed, 3]).permutation(len(split))
    part = split.take(np.sort(order[: training_size(len(split), share)]))
    return replace(part, left_out=split.left_out)


def training_size(images: int, share: float) -> int:
    """How many of so many images `training_part` draws."""
    return max(1, round(share * images))


def repeat_factors(truth: np.ndarray, threshold: float) -> np.ndarray:
    r"""How many times as often as others each image should be drawn, for the sake of rare labels.

    .. math:: r_i = \max_{c \in i} \max(1, \sqrt{t / f_c})

    over the positive labels c of image i; f_c is the share of the images that have c, and t the
    threshold: the repeat factor sampling of LVIS (Gupta et al., CVPR 2019).

    Args:
        truth: (N, C), of the images that are trained on.
        threshold: t, above 0.

    Returns:
        (N,) float64, at least 1.
    """
    positive = truth == 1
    of_labels = np.sqrt(threshold / np.maximum(positive.mean(axis=0), 1 / len(truth)))
    factors: np.ndarray = np.where(positive, of_labels, 1.0).max(axis=1, initial=1.0)
    return factors


def repeated(factors: np.ndarray, offset: float) -> np.ndarray:
    """Draw N of N images, in proportion to factors (systematic sampling).

    An image whose share of the N draws is x is drawn floor(x) or ceil(x) times.

    Args:
        factors: (N,), positive.
        offset: random, uniform in [0, 1).

    Returns:
        (N,) indices, ascending.
    """
    ends = np.cumsum(factors)
    ticks = (np.arange(len(factors)) + offset) / len(factors) * ends[-1]
    drawn: np.ndarray = np.searchsorted(ends, ticks, side="right")
    return drawn.clip(max=len(factors) - 1)  # a tick may be rounded up to the last end


def check_regions(cache: RegionCache, dataset: str, regions: int | None) -> None:
    """Check that a cache holds as many regions per image as a run uses.

    Raises:
        InputError: it holds fewer.
    """
    if regions is not None and regions > cache.regions:
        raise InputError(
            f"train.{dataset}.regions is {regions}, but {cache.folder} holds only the best "
            f"{cache.regions} regions of an image.",
            f"Lower train.{dataset}.regions to {cache.regions}, or raise "
            f"extract.{dataset}.regions and extract the regions again.",
        )


def check_whole(cache: RegionCache, dataset: str, variants: Mapping[str, TrainSettings]) -> None:
    """Check that a cache holds the vectors of whole views if a variant's head reads them.

    Args:
        cache, dataset: which are trained on.
        variants: name of each variant that is to be trained -> its settings.

    Raises:
        InputError: it holds none. Names all variants that read them.
    """
    reading = [name for name, settings in variants.items() if settings.network.needs_whole]
    if reading and not cache.has_whole:
        heads = dict.fromkeys(f"`{variants[name].network.head}`" for name in reading)
        raise InputError(
            f"The variant{'s'[: len(reading) > 1]} {', '.join(f'`{name}`' for name in reading)} "
            f"(head{'s'[: len(heads) > 1]} {', '.join(heads)}) read{'s'[len(reading) > 1 :]} the "
            f"vector of the whole view, but {cache.folder} holds only regions.",
            f"Set extract.{dataset}.whole to true and extract the regions again, or import a file "
            "that has the array `whole`.",
        )


def instance_batch(rows: RegionRows, regions: int | None = None) -> RegionBatch:
    """Convert rows of the cache to tensors, in the types they are stored in.

    Args:
        rows: R rows of m regions, the best first.
        regions: M, how many of the m regions to use; None for all.
    """
    best = {name: torch.from_numpy(getattr(rows, name)[:, :regions]) for name in OF_REGIONS}
    numbers = np.arange(best["boxes"].shape[1])
    mask = torch.from_numpy(numbers < rows.count[:, None])
    whole = None if rows.whole is None else torch.from_numpy(rows.whole)
    return RegionBatch(**best, mask=mask, whole=whole)


def label_set(split: SplitData, vectors: LabelVectors, *, conditional: bool) -> LabelSet:
    """What the images that are trained on tell about the labels, with the labels' vectors.

    Args:
        split: the images that are trained on, without those that validate.
        vectors: of the C labels.
        conditional: whether to count the co-occurrence, which takes C x C numbers.
    """
    positive = split.truth == 1
    ratio = torch.from_numpy(positive.mean(axis=0)).float()
    together = None
    if conditional:
        both = torch.from_numpy(positive).double()
        counts = both.T @ both
        images = counts.diagonal().clone()
        together = (counts / images.clamp(min=1)[:, None]).fill_diagonal_(0).float()
    return LabelSet(torch.from_numpy(vectors.vectors), ratio, together)
