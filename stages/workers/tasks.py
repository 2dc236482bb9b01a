"""What a worker does: check that it can extract as all others do, and extract a shard."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import BusyError, GmpipeError, InputError, MismatchError
from pipeline.files import in_turn
from pipeline.regions.detector import DetectorDescription, read_description
from pipeline.regions.extraction import ShardExtractor, ShardOutcome, load_detector
from pipeline.regions.plan import PlannedImages, ViewJob
from pipeline.settings import ExtractSettings
from pipeline.shards.schema import Recipe

_PACKAGES = ("gmpipe", "torch", "torchvision", "pillow", "h5py", "numpy")
"""The packages that decide what is computed and written."""


@dataclass(frozen=True)
class ExtractionJob:
    """What all tasks of an extraction have in common: small, and valid on any worker.

    Attributes:
        dataset: name of the data set.
        root, folder, detector: its root, its cache and its detector's folder, as absolute paths on
            the file system that all workers share.
        description: of the detector.
        settings: of the extraction.
        recipe: of the cache, without `images`.
        turn: of `pipeline.files.begin_turn`.
        versions: of the packages that decide what is computed and written.
    """

    dataset: str
    root: Path
    folder: Path
    detector: Path
    description: DetectorDescription
    settings: ExtractSettings
    recipe: Recipe
    turn: str
    versions: dict[str, str]

    @property
    def topic(self) -> str:
        """Of the messages with which the tasks report their progress."""
        return f"gmpipe-{self.turn}"


@dataclass(frozen=True)
class ShardTask:
    """A shard to extract.

    Attributes:
        job: what it has in common with the others.
        name: file name of the shard.
        rows: R rows.
        digests: (R, 32) of the rows' images.
    """

    job: ExtractionJob
    name: str
    rows: list[ViewJob]
    digests: npt.NDArray[np.uint8]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed and written."""
    return {package: version(package) for package in _PACKAGES}


def shard_tasks(
    job: ExtractionJob, images: PlannedImages, rows: npt.NDArray[np.int64], names: Iterator[str]
) -> Iterator[ShardTask]:
    """Cut rows of a plan into shards, which get the next ``names``."""
    plan, size = images.plan, job.settings.rows_per_shard
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield ShardTask(job, next(names), plan.jobs(some), images.digests[plan.image[some]])


def problem_of_worker(job: ExtractionJob) -> str | None:
    """Say what keeps this worker from extracting as all others do; None if nothing does."""
    for package, expected in job.versions.items():
        if (installed := version(package)) != expected:
            return (
                f"it has {package} {installed}, and the command runs with {expected}. All workers "
                "must compute the same regions: install the same versions everywhere."
            )
    try:
        with in_turn(job.folder, job.turn):
            pass
    except (OSError, BusyError) as error:
        return (
            f"it does not see the cache {job.folder} as this machine does ({error}). All workers "
            "need the checkout, its data and its cache at the same paths of a shared file system."
        )
    for path, need in ((job.folder, os.W_OK), (job.root, os.R_OK), (job.detector, os.R_OK)):
        if not os.access(path, need):
            verb = "write to" if need == os.W_OK else "read"
            return f"it may not {verb} {path}. Give its user the permission."
    return None


_loading = threading.Lock()
_loaded: dict[tuple[object, ...], ShardExtractor] = {}


def _extractor(job: ExtractionJob, threads: int) -> ShardExtractor:
    """This process's detector, which its first task loads."""
    key = (job.detector, job.description.weights_sha256, job.settings)
    with _loading:
        if key not in _loaded:
            _loaded.clear()
            # Checked again, for workers that joined after the command had asked all of them.
            if problem := problem_of_worker(job):
                raise InputError(f"a worker that joined later: {problem}")
            if read_description(job.detector) != job.description:
                raise MismatchError(
                    f"the detector in {job.detector} was replaced while it was used.",
                    "Run the same command again.",
                )
            model = load_detector(job.detector, job.description, job.settings)
            _loaded[key] = ShardExtractor(model, job.settings, threads=threads)
        return _loaded[key]


def extract_shard(task: ShardTask) -> ShardOutcome | GmpipeError:
    """Write a shard; a Dask task. An error that would come again is returned, not raised."""
    # Here, since a command that has nothing to extract need not wait for Dask.
    from stages.workers.cluster import report_progress, threads_of_worker

    job = task.job
    threads = threads_of_worker()
    # Dask starts its workers with OMP_NUM_THREADS=1, as if each task had one core. Set at each
    # task, since OpenMP keeps the number for each thread that asks.
    torch.set_num_threads(threads)
    try:
        with in_turn(job.folder, job.turn):
            return _extractor(job, threads).extract(
                task.rows,
                task.digests,
                job.root,
                path=job.folder / task.name,
                dataset=job.dataset,
                recipe=job.recipe,
                on_images=lambda images: report_progress(job.topic, images),
            )
    except GmpipeError as error:
        return error
    except torch.OutOfMemoryError as error:
        return InputError(
            f"the detector needs more memory than the GPU has ({error}).",
            f"Set a smaller `extract.{job.dataset}.batch_size`; it is {job.settings.batch_size}.",
        )
