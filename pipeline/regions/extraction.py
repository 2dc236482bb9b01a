"""Extraction of a shard's regions from images, and the recipe of everything that decides them.

Letters: R rows of a shard (a row is one view of one image), m regions of a row, d feature size,
B images of a batch, S side of a view in pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection import FasterRCNN

from pipeline.ahead import begin_ahead
from pipeline.errors import DamagedError, InputError, MismatchError, MissingError
from pipeline.files import canonical_json
from pipeline.regions.detection import (
    Convolved,
    convolve,
    describe,
    find,
    prepare_for_extraction,
)
from pipeline.regions.detector import (
    WEIGHTS_FILE,
    DetectorDescription,
    build_model,
    fit_state,
    load_state,
)
from pipeline.regions.given_boxes import GivenBoxes, GivenRegions, regions_in_view
from pipeline.regions.plan import ViewJob, rows_digest
from pipeline.regions.transforms import crop_of, load_image, view_of
from pipeline.settings import ExtractSettings
from pipeline.shards.failures import Failure
from pipeline.shards.schema import (
    IMAGES,
    OF_REGIONS,
    WHOLE,
    Recipe,
    RegionRows,
    format_recipe,
    holds_whole,
)
from pipeline.shards.shard import write_shard
from pipeline.tensors import best_device, computing_in, non_finite

OnImages = Callable[[int], None]
"""Called with the number of images that were processed since the last call."""


@dataclass(frozen=True)
class _Decoding:
    """The views of a batch that are being decoded.

    Attributes:
        pixels: (B, S, S, 3) uint8 in memory that a GPU can read at any time, where there is one.
        views: for each of them, the position of its job, and the given regions in it.
    """

    pixels: torch.Tensor
    views: list[tuple[int, Future[GivenRegions | None]]]


@dataclass(frozen=True)
class _Batch:
    """The views of a batch that could be decoded, on the detector's device or on their way to it.

    Attributes:
        size: number of views that were to be decoded.
        positions: of the jobs of those that were.
        failures: of the others.
        pixels: (B, S, S, 3) uint8.
        given: the regions that are given in each view; empty where the detector finds them.
    """

    size: int
    positions: list[int]
    failures: list[Failure]
    pixels: torch.Tensor
    given: list[GivenRegions]


def _ignore(images: int) -> None:
    pass


def extraction_recipe(
    detector: DetectorDescription, settings: ExtractSettings, boxes: GivenBoxes | None = None
) -> Recipe:
    """Collect everything that decides the regions, except the images, and nothing else.

    A shard's fingerprint covers this and, as the field ``images``, the `rows_digest` of the shard's
    own rows. So a photograph that is added or replaced costs one shard. Labels, batch size and
    shard size are left out on purpose: they may change without a new extraction. How random crops
    are drawn counts only if there are any.

    Args:
        detector: that describes the regions.
        settings: of the extraction.
        boxes: at which the regions are; None where the detector finds them.
    """
    found: Recipe = {
        "score_threshold": settings.score_threshold,
        "nms_threshold": settings.nms_threshold,
    }
    if boxes is not None:
        found = {"boxes": settings.boxes, "boxes_sha256": boxes.sha256}
    crops = {"views.flip": settings.flip, "views.seed": settings.seed}
    architecture = {
        f"architecture.{name}": value if isinstance(value, int | str) else canonical_json(value)
        for name, value in detector.architecture.model_dump(mode="json").items()
    }
    return {
        **format_recipe(whole=settings.whole),
        "images.hashed_by": "content" if settings.hash_images else "size",
        "views": settings.views,
        **(crops if settings.views > 1 else {}),
        "size": settings.size,
        "regions": settings.regions,
        **found,
        "feature_dtype": settings.feature_dtype,
        "compute_dtype": settings.precision,
        "weights_sha256": detector.weights_sha256,
        **architecture,
    }


def extraction_settings(recipe: Recipe) -> ExtractSettings:
    """Recover the settings from a recipe of `extraction_recipe`.

    What it lacks gets its default, except for `whole`, which a recipe names only where it is true.

    Args:
        recipe: of regions that were extracted, not imported.
    """
    stored = {
        **recipe,
        "hash_images": recipe.get("images.hashed_by") == "content",
        "precision": recipe["compute_dtype"],
        "whole": holds_whole(recipe),
    }
    for field in ("flip", "seed"):
        if f"views.{field}" in recipe:
            stored[field] = recipe[f"views.{field}"]
    fields = ExtractSettings.model_fields.keys() & stored.keys()
    return ExtractSettings.model_validate({field: stored[field] for field in fields})


def load_detector(
    folder: Path, description: DetectorDescription, settings: ExtractSettings
) -> FasterRCNN:
    """Load the detector of a folder, in eval mode on the best device, made fast for extraction.

    Raises:
        GmpipeError: the weights can't be read or don't fit their description.
        DamagedError: some weights are nan or infinite. The detector would then find nothing.
    """
    model = build_model(
        description.architecture,
        len(description.classes),
        size=settings.size,
        regions=settings.regions,
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
    )
    weights = folder / WEIGHTS_FILE
    state = load_state(weights)
    fit_state(model, state, weights)
    if broken := non_finite(state):
        raise DamagedError(
            f"{weights}: {len(broken)} of its {len(state)} tensors hold numbers that are not "
            f"finite; the first is {broken[0]}.",
            "Restore the weights, or make the detector again.",
        )
    return prepare_for_extraction(model.to(best_device()).eval(), settings.precision)


@dataclass(frozen=True)
class ShardOutcome:
    """The result of extracting a shard.

    Attributes:
        rows: number of rows that were written; 0 if no image could be decoded: there is no file.
        failures: images that could not be decoded.
        busy, waiting: seconds in the detector, and seconds in which it waited for decoded images.
    """

    rows: int
    failures: tuple[Failure, ...]
    busy: float
    waiting: float


class ShardExtractor:
    """A process's detector, and the threads that decode images for it.

    Several threads may call `extract`. They take turns at the detector, one shard each. While one
    of them has it, the others decode their first batches and write what they have. So decoding,
    detection and writing overlap.
    """

    def __init__(self, model: FasterRCNN, settings: ExtractSettings, *, threads: int) -> None:
        """
        Args:
            model: of `load_detector`, made for the same settings.
            settings: sizes, views and batches.
            threads: images decoded at once.
        """
        self.model = model
        self.settings = settings
        self._device = next(model.parameters()).device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._turn = threading.Lock()
        # Views are copied to a GPU beside the kernels of the batch before.
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def extract(
        self,
        jobs: Sequence[ViewJob],
        digests: npt.NDArray[np.uint8],
        root: Path,
        *,
        path: Path,
        dataset: str,
        recipe: Recipe,
        on_images: OnImages = _ignore,
    ) -> ShardOutcome:
        """Decode, view, detect, and write the shard ``path``.

        Args:
            jobs: its rows, in this order; those that can't be decoded are left out.
            digests: (R, 32), of `image_digests`, for each job.
            root: the data set's root.
            path, dataset: of the shard.
            recipe: of `extraction_recipe`.
            on_images: called after each batch with its number of images.

        Raises:
            InputError: what the detector returned breaks the contract of a shard's rows.
            MismatchError: a photograph has another size than its given boxes were placed in.
        """
        rows, kept, outcome = self.detect(jobs, root, on_images)
        if rows is not None:
            images = rows_digest(digests[kept], rows.view)
            write_shard(path, rows, dataset=dataset, recipe={**recipe, IMAGES: images})
        return outcome

    def detect(
        self, jobs: Sequence[ViewJob], root: Path, on_images: OnImages = _ignore
    ) -> tuple[RegionRows | None, npt.NDArray[np.intp], ShardOutcome]:
        """Do the same as `extract` without writing.

        Returns:
            the rows of the jobs that could be decoded, None without any; the positions of these
            jobs; and the outcome.
        """
        batches = self._batches(jobs, root)
        with self._turn, computing_in(self.settings.precision):
            started = time.perf_counter()
            waiting = 0.0
            rows = blank_rows(len(jobs), self.model, self.settings)
            positions: list[int] = []
            failures: list[Failure] = []

            def next_batch() -> _Batch | None:
                nonlocal waiting
                asked = time.perf_counter()
                batch = next(batches, None)
                waiting += time.perf_counter() - asked
                return batch

            batch = next_batch()
            returning: _Returning | None = None
            while batch is not None:
                begun: Convolved | None = self._begin(batch) if batch.positions else None
                # On a GPU, that is only queued: meanwhile the batches on both sides are served.
                if returning is not None:
                    returning.fill(rows)
                upcoming = next_batch()
                at = slice(len(positions), len(positions) + len(batch.positions))
                returning = None
                if begun is not None:
                    returning = _found(rows, at, self.model, begun, batch.given)
                positions += batch.positions
                failures += batch.failures
                on_images(batch.size)
                batch = upcoming
            if returning is not None:
                returning.fill(rows)
            busy = time.perf_counter() - started - waiting
        outcome = ShardOutcome(len(positions), tuple(failures), busy, waiting)
        filled = _named(rows, [jobs[position] for position in positions]) if positions else None
        return filled, np.array(positions, dtype=np.intp), outcome

    def decode(self, jobs: Sequence[ViewJob], root: Path, on_images: OnImages = _ignore) -> None:
        """Decode the images and drop them: the work of an extraction without a detector."""
        for batch in self._decode_ahead(jobs, root):
            wait([future for _, future in batch.views])
            on_images(len(batch.views))

    def _decode_ahead(self, jobs: Sequence[ViewJob], root: Path) -> Iterator[_Decoding]:
        """The batches of ``jobs``. Decoding of the first ones begins at this call."""
        side = self.settings.size

        def begin(start: int) -> _Decoding:
            batch = range(start, min(start + self.settings.batch_size, len(jobs)))
            pixels = torch.empty(
                (len(batch), side, side, 3),
                dtype=torch.uint8,
                pin_memory=self._device.type == "cuda",
            )
            views = [
                (at, self._pool.submit(self._decode, jobs[at], root, pixels[place].numpy()))
                for place, at in enumerate(batch)
            ]
            return _Decoding(pixels, views)

        return begin_ahead(begin, range(0, len(jobs), self.settings.batch_size))

    def _batches(self, jobs: Sequence[ViewJob], root: Path) -> Iterator[_Batch]:
        """The batches of ``jobs``, each as soon as it is decoded; begins at this call."""
        return (self._sent(batch, jobs) for batch in self._decode_ahead(jobs, root))

    def _sent(self, batch: _Decoding, jobs: Sequence[ViewJob]) -> _Batch:
        """Wait for the views of a batch, and begin to copy them to the detector's device."""
        places: list[int] = []
        failures: list[Failure] = []
        given: list[GivenRegions] = []
        for place, (position, future) in enumerate(batch.views):
            try:
                regions = future.result()
            except (MissingError, InputError) as error:
                job = jobs[position]
                failures.append(Failure(job.image_id, job.path, str(error)))
            else:
                places.append(place)
                given += [] if regions is None else [regions]
        if failures:
            batch.pixels[: len(places)] = batch.pixels[places]
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            pixels = batch.pixels[: len(places)].to(self._device, non_blocking=True)
        positions = [batch.views[place][0] for place in places]
        return _Batch(len(batch.views), positions, failures, pixels, given)

    def _begin(self, batch: _Batch) -> Convolved:
        if self._copies is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._copies)
            batch.pixels.record_stream(current)  # else its memory may be used before it is read
        return convolve(self.model, to_floats(batch.pixels), rpn=not batch.given)

    def _decode(
        self, job: ViewJob, root: Path, pixels: npt.NDArray[np.uint8]
    ) -> GivenRegions | None:
        """Decode a view into ``pixels`` (S, S, 3), and return the regions that are given in it."""
        settings = self.settings
        image = load_image(root / job.path)
        drawn: dict[str, Any] = {
            "image_id": job.image_id,
            "seed": settings.seed,
            "flip": settings.flip,
        }
        pixels[:] = view_of(image, job.view, size=settings.size, **drawn)
        if job.boxes is None:
            return None
        if job.boxes.size not in (None, image.size):
            found, expected = ("{} x {}".format(*size) for size in (image.size, job.boxes.size))
            raise MismatchError(
                f"{root / job.path} has {found} pixels, expected {expected}: the file has changed "
                "since the data set was prepared, and its boxes may be of another picture.",
                "Restore the file, or prepare the data set again.",
            )
        crop = crop_of(image.size, job.view, **drawn)
        limits = {"size": settings.size, "most": settings.regions}
        return regions_in_view(job.boxes, image.size, crop, **limits)


def _named(rows: RegionRows, jobs: Sequence[ViewJob]) -> RegionRows:
    """The first R rows, with the ids and views of R jobs."""
    return RegionRows(
        **{field: getattr(rows, field)[: len(jobs)] for field in ("count", *OF_REGIONS)},
        image_id=np.array([job.image_id.encode() for job in jobs]),
        view=np.array([job.view for job in jobs], dtype=np.int16),
        whole=None if rows.whole is None else rows.whole[: len(jobs)],
    )


def to_floats(views: torch.Tensor) -> torch.Tensor:
    """Turn B views (B, S, S, 3) uint8 into (B, 3, S, S) float32 in [0, 1]."""
    return views.permute(0, 3, 1, 2).float().div_(255)


def blank_rows(rows: int, model: FasterRCNN, settings: ExtractSettings) -> RegionRows:
    """Make rows for `fill_rows`: all zero, of images without a name."""
    m, d = settings.regions, model.roi_heads.box_head.fc7.out_features
    return RegionRows(
        features=np.zeros((rows, m, d), dtype=settings.feature_dtype),
        boxes=np.zeros((rows, m, 4), dtype=np.float32),
        scores=np.zeros((rows, m), dtype=np.float32),
        classes=np.zeros((rows, m), dtype=np.int16),
        count=np.zeros(rows, dtype=np.int16),
        image_id=np.zeros(rows, dtype="S1"),
        view=np.zeros(rows, dtype=np.int16),
        whole=np.zeros((rows, d), dtype=settings.feature_dtype) if settings.whole else None,
    )


def fill_rows(rows: RegionRows, model: FasterRCNN, views: torch.Tensor) -> None:
    """Put the regions that the detector finds in views into blank rows, one for each view.

    Args:
        rows: of `blank_rows`. The vectors of whole views are computed if these have room for them.
        model: of `load_detector`.
        views: (B, S, S, 3) uint8.
    """
    pixels = views.to(next(model.parameters()).device)
    _found(rows, slice(None), model, convolve(model, to_floats(pixels))).fill(rows)


@dataclass(frozen=True)
class _Returning:
    """The regions of views on their way to the CPU's memory, in the types that a cache stores.

    Attributes:
        fields: of the rows, with as many regions as the batch has.
        at: the rows to fill, one for each view.
        copied: happens when all are there; None if they are.
    """

    fields: dict[str, torch.Tensor]
    at: slice
    copied: torch.cuda.Event | None

    def fill(self, rows: RegionRows) -> None:
        """Put them into blank rows."""
        if self.copied is not None:
            self.copied.synchronize()
        for name, values in self.fields.items():
            part = getattr(rows, name)[self.at]
            if name in OF_REGIONS:
                part = part[:, : values.shape[1]]
            part[:] = values.numpy()


def _found(
    rows: RegionRows,
    at: slice,
    model: FasterRCNN,
    begun: Convolved,
    given: Sequence[GivenRegions] = (),
) -> _Returning:
    """Find the regions of views, or describe those that are given; for these places of the rows."""
    whole = rows.whole is not None
    regions = (
        describe(model, begun, given, whole=whole) if given else find(model, begun, whole=whole)
    )
    copies = {}
    for name in (*OF_REGIONS, "count", *([WHOLE] if whole else [])):
        stored = getattr(torch, getattr(rows, name).dtype.name)
        # Copied to pinned memory, without waiting.
        copies[name] = getattr(regions, name).to(stored).to("cpu", non_blocking=True)
    copied = None
    if regions.count.is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return _Returning(copies, at, copied)
