"""The rows of a cache that is to be extracted, and what identifies their images.

Letters: N images, P rows of a whole cache (a row is one view of one image), R rows of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.manifest import Manifest
from pipeline.errors import InputError, MissingError
from pipeline.files import canonical_json, exists, open_regular, sha256_file
from pipeline.regions.given_boxes import GivenBoxes, GivenRegions

_CHUNK = 4096  # images whose files are hashed before the next ones are asked for


@dataclass(frozen=True)
class ViewJob:
    """A row to extract: one view of one image.

    Attributes:
        image_id: as in the manifest.
        path: relative to the data set's root.
        view: 0 for the whole image, else the number of a random crop.
        boxes: the boxes of the photograph at which features are pooled; None where the detector
            finds them.
    """

    image_id: str
    path: str
    view: int
    boxes: GivenRegions | None = None


class ViewPlan:
    """All P rows of a cache: ``views`` of each training image, view 0 of each test image.

    Training images come before test images, and the views of an image follow each other. Rows are
    numbered, not listed, since a large data set has millions of them. Images are numbered in the
    manifest's order.

    Attributes:
        image_ids, paths: N strings.
        boxes: at which features are pooled; None where the detector finds them.
        image: (P,) int32, the number of each row's image.
        view: (P,) int16.
    """

    def __init__(self, manifest: Manifest, views: int, boxes: GivenBoxes | None = None) -> None:
        self.image_ids: pa.Array = manifest.table.column("image_id").combine_chunks()
        self.paths: pa.Array = manifest.table.column("path").combine_chunks()
        self.boxes = boxes
        train = pc.equal(manifest.table.column("split"), "train").to_numpy()
        each = np.where(train, views, 1)
        order = np.argsort(~train, kind="stable").astype(np.int32)
        self.image: npt.NDArray[np.int32] = np.repeat(order, each[order])
        starts = np.cumsum(each[order]) - each[order]
        self.view = (np.arange(len(self)) - np.repeat(starts, each[order])).astype(np.int16)
        self._first = np.empty(len(each), np.int64)  # row of an image's view 0
        self._first[order] = starts
        self._each = each

    def __len__(self) -> int:
        """P, the number of rows."""
        return len(self.image)

    def numbers(self, image_ids: pa.Array | Sequence[str]) -> npt.NDArray[np.int64]:
        """The number of each of n images (n,), -1 for an unknown one."""
        wanted = pa.array(image_ids, pa.string())
        known = pc.index_in(wanted, value_set=self.image_ids)
        return np.asarray(pc.fill_null(known, -1), dtype=np.int64)

    def rows(
        self, numbers: npt.NDArray[np.int64], views: npt.NDArray[np.int16]
    ) -> npt.NDArray[np.int64]:
        """The row of each of n views of known images; views that are not planned are left out.

        Args:
            numbers: (n,) of the images.
            views: (n,).
        """
        planned = views < self._each[numbers]
        return self._first[numbers[planned]] + views[planned]

    def jobs(self, rows: npt.NDArray[np.int64]) -> list[ViewJob]:
        """The rows of these numbers."""
        images = self.image[rows]
        columns = (column.take(pa.array(images)) for column in (self.image_ids, self.paths))
        image_ids, paths = (column.to_pylist() for column in columns)
        views = self.view[rows].tolist()
        given = [None if self.boxes is None else self.boxes.of(image_id) for image_id in image_ids]
        return [ViewJob(*job) for job in zip(image_ids, paths, views, given, strict=True)]


class PlannedImages:
    """A plan's images as their files are now: what a cache of them should hold.

    It is a `pipeline.shards.store.WantedImages`.

    Attributes:
        plan: which views of which images.
        digests: (N, 32), of `image_digests`.
    """

    def __init__(self, plan: ViewPlan, digests: npt.NDArray[np.uint8]) -> None:
        self.plan = plan
        self.digests = digests

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.digests)

    def numbers(self, image_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """The number of each of n images (n,), -1 for an unknown one."""
        return self.plan.numbers(image_ids)

    def digest(self, numbers: npt.NDArray[np.int64], views: npt.NDArray[np.int16]) -> str:
        """The recipe's field ``images`` for a set of n rows, given by image and view."""
        return rows_digest(self.digests[numbers], views)

    def missing_rows(
        self, numbers: npt.NDArray[np.int64], views: npt.NDArray[np.int16]
    ) -> npt.NDArray[np.int64]:
        """The planned rows that are not among n rows, given by image and view."""
        done = np.zeros(len(self.plan), dtype=np.bool_)
        done[self.plan.rows(numbers, views)] = True
        return np.flatnonzero(~done)


def _is_file(path: Path) -> bool:
    """Whether there is a regular file; raises an `OSError` if the system can't say."""
    return exists(path) and path.is_file()


def check_images(manifest: Manifest, root: Path, *, threads: int) -> None:
    """Check that every image exists, before hours are spent on the others.

    Args:
        manifest: of the data set.
        root: folder that the manifest's paths are relative to.
        threads: files looked for at once; on a network file system each takes a round trip.

    Raises:
        MissingError: images are missing. Says how many, and names the first.
    """
    missing = 0
    first: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for batch in manifest.table.select(["image_id", "path"]).to_batches(_CHUNK):
            rows = batch.to_pylist()
            there = pool.map(lambda row: _is_file(root / row["path"]), rows)
            lacking = [row for row, is_there in zip(rows, there, strict=True) if not is_there]
            missing += len(lacking)
            first = first or next(iter(lacking), {})
    if missing:
        raise MissingError(
            f"{missing} of {len(manifest)} images of {manifest.dataset} "
            f"{'is' if missing == 1 else 'are'} missing; the first is "
            f"{first['image_id']!r} at {root / first['path']}.",
            "Restore them.",
        )


def check_readable(
    plan: ViewPlan, numbers: npt.NDArray[np.int64], root: Path, *, threads: int
) -> None:
    """Check that the files of some images can be read, before their regions are dropped.

    Args:
        plan: which knows the images.
        numbers: (n,) of the images.
        root: folder that the plan's paths are relative to.
        threads: files opened at once.

    Raises:
        MissingError: a file can't be read. Says how many, and names the first.
    """

    def problem(path: str) -> str:
        try:
            with open_regular(root / path) as stream:
                stream.read(1)
        except OSError as error:
            return f"{root / path} ({error.strerror})"
        except InputError as error:
            return error.problem
        return ""

    problems: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(numbers), _CHUNK):
            paths = plan.paths.take(pa.array(numbers[start : start + _CHUNK])).to_pylist()
            problems += filter(None, pool.map(problem, paths))
    if problems:
        raise MissingError(
            f"{len(problems)} of {len(numbers)} images can't be read, so their regions can't be "
            f"extracted again; the first is {problems[0]}. Nothing was dropped.",
            "Make them readable first.",
        )


def image_digests(
    manifest: Manifest,
    root: Path,
    *,
    contents: bool,
    threads: int,
    on_images: Callable[[int], None] = lambda images: None,
) -> npt.NDArray[np.uint8]:
    """Compute what identifies each of the N images: (N, 32), a sha256 of id, path and file.

    Args:
        manifest: of the data set.
        root: folder that the manifest's paths are relative to.
        contents: whether a file is identified by its content, else by its size.
        threads: files read at once.
        on_images: called now and then with the number of images that were hashed since.

    Raises:
        MissingError: a file is missing.
        OSError: a file can't be read. Its regions in a cache would be taken for those of another.
    """
    check_images(manifest, root, threads=threads)

    def digest(image_id: str, path: str) -> bytes:
        file = root / path
        content = sha256_file(file) if contents else file.stat().st_size
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
    rows.view("S34").ravel().sort()  # in place: copies would add up for millions of rows
    return hashlib.sha256(rows.data).hexdigest()
