"""Extraction of a shard's regions from images, and the recipe of everything that decides them.

Letters: R rows of a shard (a row is one view of one image), m regions of a row, d feature size,
B images of a batch, S side of a view in pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection import FasterRCNN

from pipeline.ahead import begin_ahead
from pipeline.errors import DamagedError, InputError, MismatchError, MissingError
from pipeline.files import canonical_json
from pipeline.regions.detection import detect, detect_at, prepare_for_extraction
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
    Recipe,
    RegionRows,
    format_recipe,
    holds_whole,
)
from pipeline.shards.shard import write_shard
from pipeline.tensors import best_device, non_finite

OnImages = Callable[[int], None]
"""Called with the number of images that were processed since the last call."""


class _View(NamedTuple):
    """A decoded view: its pixels (S, S, 3), and the given regions in it."""

    pixels: npt.NDArray[np.uint8]
    regions: GivenRegions | None


_Decoding = list[tuple[int, Future[_View]]]
"""The views of a batch that are being decoded, each with the position of its job."""


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
        "compute_dtype": "float32",
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
    return prepare_for_extraction(model.to(best_device()).eval())


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
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._turn = threading.Lock()

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
        settings, device = self.settings, next(self.model.parameters()).device
        decoding = self._decode_ahead(jobs, root)
        with self._turn:
            started = time.perf_counter()
            waiting = 0.0
            rows = blank_rows(len(jobs), self.model, settings)
            positions: list[int] = []
            failures: list[Failure] = []
            for batch in decoding:
                asked = time.perf_counter()
                views, decoded, failed = _collected(batch, jobs)
                positions += decoded
                failures += failed
                waiting += time.perf_counter() - asked
                if views:
                    at = slice(len(positions) - len(views), len(positions))
                    pixels = to_floats([view.pixels for view in views], device)
                    given = [view.regions for view in views if view.regions is not None]
                    fill_rows(rows, at, self.model, pixels, given)
                on_images(len(batch))
            busy = time.perf_counter() - started - waiting
        outcome = ShardOutcome(len(positions), tuple(failures), busy, waiting)
        filled = _named(rows, [jobs[position] for position in positions]) if positions else None
        return filled, np.array(positions, dtype=np.intp), outcome

    def decode(self, jobs: Sequence[ViewJob], root: Path, on_images: OnImages = _ignore) -> None:
        """Decode the images and drop them: the work of an extraction without a detector."""
        for batch in self._decode_ahead(jobs, root):
            wait([future for _, future in batch])
            on_images(len(batch))

    def _decode_ahead(self, jobs: Sequence[ViewJob], root: Path) -> Iterator[_Decoding]:
        """The batches of ``jobs``. Decoding of the first ones begins at this call."""

        def begin(start: int) -> _Decoding:
            batch = range(start, min(start + self.settings.batch_size, len(jobs)))
            return [(at, self._pool.submit(self._decode, jobs[at], root)) for at in batch]

        return begin_ahead(begin, range(0, len(jobs), self.settings.batch_size))

    def _decode(self, job: ViewJob, root: Path) -> _View:
        settings = self.settings
        image = load_image(root / job.path)
        drawn: dict[str, Any] = {
            "image_id": job.image_id,
            "seed": settings.seed,
            "flip": settings.flip,
        }
        pixels = view_of(image, job.view, size=settings.size, **drawn)
        if job.boxes is None:
            return _View(pixels, None)
        if job.boxes.size not in (None, image.size):
            found, expected = ("{} x {}".format(*size) for size in (image.size, job.boxes.size))
            raise MismatchError(
                f"{root / job.path} has {found} pixels, expected {expected}: the file has changed "
                "since the data set was prepared, and its boxes may be of another picture.",
                "Restore the file, or prepare the data set again.",
            )
        crop = crop_of(image.size, job.view, **drawn)
        limits = {"size": settings.size, "most": settings.regions}
        return _View(pixels, regions_in_view(job.boxes, image.size, crop, **limits))


def _collected(
    batch: _Decoding, jobs: Sequence[ViewJob]
) -> tuple[list[_View], list[int], list[Failure]]:
    """Wait for a batch: its views, the positions of their jobs, and what could not be decoded."""
    views: list[_View] = []
    positions: list[int] = []
    failures: list[Failure] = []
    for position, future in batch:
        try:
            views.append(future.result())
            positions.append(position)
        except (MissingError, InputError) as error:
            job = jobs[position]
            failures.append(Failure(job.image_id, job.path, str(error)))
    return views, positions, failures


def _named(rows: RegionRows, jobs: Sequence[ViewJob]) -> RegionRows:
    """The first R rows, with the ids and views of R jobs."""
    return RegionRows(
        **{field: getattr(rows, field)[: len(jobs)] for field in ("count", *OF_REGIONS)},
        image_id=np.array([job.image_id.encode() for job in jobs]),
        view=np.array([job.view for job in jobs], dtype=np.int16),
        whole=None if rows.whole is None else rows.whole[: len(jobs)],
    )


def to_floats(views: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    """Turn B views (S, S, 3) uint8 into (B, 3, S, S) float32 in [0, 1] on a device."""
    batch = torch.from_numpy(np.stack(views)).to(device)
    return batch.permute(0, 3, 1, 2).contiguous().float().div_(255)


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


def fill_rows(
    rows: RegionRows,
    at: slice,
    model: FasterRCNN,
    views: torch.Tensor,
    given: Sequence[GivenRegions] = (),
) -> None:
    """Put the regions of views into blank rows, in the types that a cache stores.

    Args:
        rows: of `blank_rows`. The vectors of whole views are computed if these have room for them.
        at: the rows to fill, one for each view.
        model, views: as `detect` takes them.
        given: the regions of each view; empty where the detector finds them.
    """
    whole = rows.whole is not None
    detections = (
        detect_at(model, views, given, whole=whole) if given else detect(model, views, whole=whole)
    )
    rows.count[at] = [len(one.scores) for one in detections]
    real = np.arange(rows.boxes.shape[1]) < rows.count[at, None]
    for field in OF_REGIONS:
        # One copy from the device per batch, not one per image.
        values = torch.cat([getattr(one, field) for one in detections]).cpu()
        getattr(rows, field)[at][real] = values
    if rows.whole is not None:
        wholes = [one.whole for one in detections if one.whole is not None]
        rows.whole[at] = torch.stack(wholes).cpu()
