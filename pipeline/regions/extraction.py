"""Images -> shards of regions; and the recipe that says what decided them.

Letters: N images, P rows of a whole cache (a row is one view of one image), R rows of a shard,
m regions, d feature size.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchvision.models.detection import FasterRCNN

from pipeline.datasets.manifest import Manifest
from pipeline.errors import GmpipeError
from pipeline.files import canonical_json, sha256_file
from pipeline.regions.detection import Detections, detect, prepare_for_extraction
from pipeline.regions.detector import (
    WEIGHTS_FILE,
    DetectorDescription,
    build_model,
    fit_state,
    load_state,
)
from pipeline.regions.transforms import load_image, view_of
from pipeline.settings import ExtractSettings
from pipeline.shards.failures import Failure
from pipeline.shards.schema import FORMAT_VERSION, OF_REGIONS, Recipe, RegionRows
from pipeline.shards.writer import write_shard
from pipeline.tensors import best_device

_CHUNK = 4096  # images whose files are hashed before the next ones are asked for
_BATCHES_AHEAD = 3  # batches that are decoded while the detector works on one


@dataclass(frozen=True)
class ViewJob:
    """A row to extract: one view of one image.

    Attributes:
        image_id: as in the manifest.
        path: relative to the data set's root.
        view: 0 for the whole image, else the number of a random crop.
    """

    image_id: str
    path: str
    view: int


class ViewPlan:
    """All P rows of a cache: ``views`` of each training image, view 0 of each test image.

    Train comes before test, and the views of an image follow each other. Rows are numbered, not
    listed: a large data set has millions of them.

    Attributes:
        image_ids, paths: N strings, in the manifest's order.
        image: (P,) int32, the place of each row's image in those.
        view: (P,) int16.
    """

    def __init__(self, manifest: Manifest, views: int) -> None:
        self.image_ids: pa.Array = manifest.table.column("image_id").combine_chunks()
        self.paths: pa.Array = manifest.table.column("path").combine_chunks()
        train = pc.equal(manifest.table.column("split"), "train").to_numpy()
        each = np.where(train, views, 1)
        order = np.argsort(~train, kind="stable").astype(np.int32)
        self.image: npt.NDArray[np.int32] = np.repeat(order, each[order])
        starts = np.cumsum(each[order]) - each[order]
        self.view = (np.arange(len(self)) - np.repeat(starts, each[order])).astype(np.int16)
        self._first = np.empty(len(each), np.int64)  # number of an image's view 0
        self._first[order] = starts
        self._each = each

    def __len__(self) -> int:
        """P, the number of rows."""
        return len(self.image)

    def places(self, image_ids: pa.Array) -> npt.NDArray[np.int64]:
        """The place of each of n images in `image_ids` (n,), -1 for an unknown one."""
        found = pc.index_in(image_ids, value_set=self.image_ids)
        return np.asarray(pc.fill_null(found, -1), dtype=np.int64)

    def rows(
        self, places: npt.NDArray[np.int64], views: npt.NDArray[np.int16]
    ) -> npt.NDArray[np.int64]:
        """The numbers of those of n rows that are planned, by image's place and view."""
        planned = views < self._each[places]
        return self._first[places[planned]] + views[planned]

    def jobs(self, rows: npt.NDArray[np.int64]) -> list[ViewJob]:
        """The rows of these numbers."""
        images = self.image[rows]
        columns = (column.take(pa.array(images)) for column in (self.image_ids, self.paths))
        image_ids, paths = (column.to_pylist() for column in columns)
        views = self.view[rows].tolist()
        return [ViewJob(*job) for job in zip(image_ids, paths, views, strict=True)]


def check_images(manifest: Manifest, root: Path, *, threads: int) -> None:
    """See that every image is there before hours are spent on the others.

    Args:
        threads: files looked for at once; on a network's file system each takes a round trip.

    Raises:
        GmpipeError: images are missing; says how many and names the first.
    """
    missing = 0
    first: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for batch in manifest.table.select(["image_id", "path"]).to_batches(_CHUNK):
            rows = batch.to_pylist()
            there = pool.map(lambda row: (root / row["path"]).is_file(), rows)
            lacking = [row for row, found in zip(rows, there, strict=True) if not found]
            missing += len(lacking)
            first = first or next(iter(lacking), {})
    if missing:
        raise GmpipeError(
            f"{missing} of {len(manifest)} images of {manifest.dataset} are missing; the first is "
            f"{first['image_id']!r} at {root / first['path']}. Put them there, or run "
            f"`gmpipe prepare --dataset {manifest.dataset}` if they should be made anew."
        )


def image_digests(
    manifest: Manifest,
    root: Path,
    *,
    contents: bool,
    threads: int,
    on_images: Callable[[int], None] = lambda images: None,
) -> npt.NDArray[np.uint8]:
    """What identifies the N images: (N, 32), a sha256 of id, path and file each.

    Args:
        contents: whether a file counts by its content; else by its size.
        threads: files read at once.
        on_images: called now and then with the number of images that were hashed since.

    Raises:
        GmpipeError: a file is missing.
    """
    check_images(manifest, root, threads=threads)

    def digest(image_id: str, path: str) -> bytes:
        file = root / path
        try:
            content = sha256_file(file) if contents else file.stat().st_size
        except OSError as error:
            # Decoding will fail as well and put the image among the failures; should it succeed,
            # the row is redone once the file can be read.
            content = f"unreadable: {error.strerror}"
        return hashlib.sha256(canonical_json([image_id, path, content]).encode()).digest()

    digests = np.empty((len(manifest), 32), dtype=np.uint8)
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for batch in manifest.table.select(["image_id", "path"]).to_batches(_CHUNK):
            columns = [column.to_pylist() for column in batch.columns]
            hashed = b"".join(pool.map(digest, *columns))
            digests[done : done + len(batch)] = np.frombuffer(hashed, np.uint8).reshape(-1, 32)
            done += len(batch)
            on_images(len(batch))
    return digests


def rows_digest(digests: npt.NDArray[np.uint8], views: npt.NDArray[np.int16]) -> str:
    """Hex sha256 over a set of n rows, whatever their order: the recipe's field ``images``.

    Args:
        digests: (n, 32), of `image_digests`.
        views: (n,).
    """
    rows = np.empty((len(views), 34), dtype=np.uint8)
    rows[:, :32] = digests
    rows[:, 32:] = views.astype("<i2").view(np.uint8).reshape(-1, 2)
    rows.view("S34").ravel().sort()  # in place: the copies would add up for millions of rows
    return hashlib.sha256(rows.data).hexdigest()


def extraction_recipe(detector: DetectorDescription, settings: ExtractSettings) -> Recipe:
    """All that decides the regions but the images, and nothing else.

    What the fingerprint of a shard is taken of is this and, as the field ``images``, the
    `rows_digest` of the shard's own rows: a photograph that is added or mended costs one shard.
    Labels, batch size and shard size are left out on purpose: they may change without a new
    extraction. How random crops are drawn counts only where there are any.
    """
    crops = {"views.flip": settings.flip, "views.seed": settings.seed}
    architecture = {
        f"architecture.{name}": value if isinstance(value, int | str) else canonical_json(value)
        for name, value in detector.architecture.model_dump(mode="json").items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "images.hashed_by": "content" if settings.hash_images else "size",
        "views": settings.views,
        **(crops if settings.views > 1 else {}),
        "size": settings.size,
        "regions": settings.regions,
        "score_threshold": settings.score_threshold,
        "nms_threshold": settings.nms_threshold,
        "feature_dtype": settings.feature_dtype,
        "compute_dtype": "float32",
        "weights_sha256": detector.weights_sha256,
        **architecture,
    }


def extraction_settings(recipe: Recipe) -> ExtractSettings:
    """The settings that `extraction_recipe` made a recipe of; what it leaves out is as default.

    Args:
        recipe: of regions that were extracted, not imported.
    """
    stored = {**recipe, "hash_images": recipe.get("images.hashed_by") == "content"}
    for field in ("flip", "seed"):
        if f"views.{field}" in recipe:
            stored[field] = recipe[f"views.{field}"]
    fields = ExtractSettings.model_fields.keys() & stored.keys()
    return ExtractSettings.model_validate({field: stored[field] for field in fields})


def load_detector(
    folder: Path, description: DetectorDescription, settings: ExtractSettings
) -> FasterRCNN:
    """The detector of a folder, in eval mode on the best device, made fast for extraction.

    Raises:
        GmpipeError: the weights can't be read or don't fit their description.
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
    fit_state(model, load_state(weights), weights)
    return prepare_for_extraction(model.to(best_device()).eval())


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard's rows.

    Attributes:
        rows: rows that were written; 0 if none could be decoded, and then there is no file.
        failures: images that could not be decoded.
        busy, waiting: seconds in the detector, and seconds in which it waited for decoded images.
    """

    rows: int
    failures: tuple[Failure, ...]
    busy: float
    waiting: float


class ShardExtractor:
    """One process's detector, and the threads that decode for it.

    Several threads may call `extract`: they take turns at the detector, a shard each, and while
    one has it, the others decode their first batches and write what they have. So decoding, the
    detector and writing overlap.
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
        on_images: Callable[[int], None] = lambda images: None,
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
            GmpipeError: what the detector gave breaks the shard's contract.
        """
        rows, kept, outcome = self.detect(jobs, root, on_images)
        if rows is not None:
            images = rows_digest(digests[kept], rows.view)
            write_shard(path, rows, dataset=dataset, recipe={**recipe, "images": images})
        return outcome

    def detect(
        self,
        jobs: Sequence[ViewJob],
        root: Path,
        on_images: Callable[[int], None] = lambda images: None,
    ) -> tuple[RegionRows | None, npt.NDArray[np.intp], ShardOutcome]:
        """`extract` without writing.

        Returns:
            the rows of the jobs that could be decoded, None without any; their places among the
            jobs; and what became of the others.
        """
        settings, device = self.settings, next(self.model.parameters()).device
        decoded = self._decode_ahead(jobs, root)
        with self._turn:
            started = time.perf_counter()
            waiting = 0.0
            rows = blank_rows(len(jobs), self.model, settings)
            places: list[int] = []
            failures: list[Failure] = []
            for futures in decoded:
                asked = time.perf_counter()
                views = []
                for place, future in futures:
                    try:
                        views.append(future.result())
                        places.append(place)
                    except GmpipeError as error:
                        job = jobs[place]
                        failures.append(Failure(job.image_id, job.path, str(error)))
                waiting += time.perf_counter() - asked
                if views:
                    at = slice(len(places) - len(views), len(places))
                    fill_rows(rows, at, detect(self.model, to_floats(views, device)))
                on_images(len(futures))
            busy = time.perf_counter() - started - waiting
        n = len(places)
        outcome = ShardOutcome(n, tuple(failures), busy, waiting)
        kept = np.array(places, dtype=np.intp)
        if not n:
            return None, kept, outcome
        done = [jobs[place] for place in places]
        filled = RegionRows(
            **{field: getattr(rows, field)[:n] for field in ("count", *OF_REGIONS)},
            image_id=np.array([job.image_id.encode() for job in done]),
            view=np.array([job.view for job in done], dtype=np.int16),
        )
        return filled, kept, outcome

    def decode(
        self,
        jobs: Sequence[ViewJob],
        root: Path,
        on_images: Callable[[int], None] = lambda images: None,
    ) -> None:
        """Decode and forget: what an extraction would take without a detector."""
        for futures in self._decode_ahead(jobs, root):
            wait([future for _, future in futures])
            on_images(len(futures))

    def _decode_ahead(
        self, jobs: Sequence[ViewJob], root: Path
    ) -> Iterator[list[tuple[int, Future[npt.NDArray[np.uint8]]]]]:
        """Batches of views being decoded, with their places; the first are begun at once."""
        size = self.settings.batch_size
        batches = (
            [
                (place, self._pool.submit(self._decode, jobs[place], root))
                for place in range(start, min(start + size, len(jobs)))
            ]
            for start in range(0, len(jobs), size)
        )
        ahead = deque(next(batches, []) for _ in range(_BATCHES_AHEAD))

        def hand_out() -> Iterator[Any]:
            while ahead:
                ahead.append(next(batches, []))
                if futures := ahead.popleft():
                    yield futures
                else:
                    return

        return hand_out()

    def _decode(self, job: ViewJob, root: Path) -> npt.NDArray[np.uint8]:
        return view_of(
            load_image(root / job.path),
            job.view,
            size=self.settings.size,
            image_id=job.image_id,
            seed=self.settings.seed,
            flip=self.settings.flip,
        )


def to_floats(views: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    """B views (S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1], on a device."""
    batch = torch.from_numpy(np.stack(views)).to(device)
    return batch.permute(0, 3, 1, 2).contiguous().float().div_(255)


def blank_rows(rows: int, model: FasterRCNN, settings: ExtractSettings) -> RegionRows:
    """Rows for `fill_rows`: all zero, and of images without a name."""
    m, d = settings.regions, model.roi_heads.box_head.fc7.out_features
    return RegionRows(
        features=np.zeros((rows, m, d), dtype=settings.feature_dtype),
        boxes=np.zeros((rows, m, 4), dtype=np.float32),
        scores=np.zeros((rows, m), dtype=np.float32),
        classes=np.zeros((rows, m), dtype=np.int16),
        count=np.zeros(rows, dtype=np.int16),
        image_id=np.zeros(rows, dtype="S1"),
        view=np.zeros(rows, dtype=np.int16),
    )


def fill_rows(rows: RegionRows, at: slice, found: Sequence[Detections]) -> None:
    """Put what was detected into the blank rows ``at``, in the types that a cache stores."""
    rows.count[at] = [len(one.scores) for one in found]
    real = np.arange(rows.boxes.shape[1]) < rows.count[at, None]
    for field in OF_REGIONS:
        # One copy off the device for a batch, not one for an image.
        values = torch.cat([getattr(one, field) for one in found]).cpu()
        getattr(rows, field)[at][real] = values
