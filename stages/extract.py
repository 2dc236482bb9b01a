"""Stage `extract`: images -> cache/<dataset>/, shard by shard, on the workers of a Dask cluster."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.datasets.manifest import SPLITS, Manifest
from pipeline.errors import GmpipeError, Stopped
from pipeline.files import NO_SPACE, begin_turn, folder_lock, in_turn, is_no_space
from pipeline.learning.splits import open_split
from pipeline.machine import cores
from pipeline.regions.detector import DetectorDescription
from pipeline.regions.extraction import (
    ShardExtractor,
    ShardOutcome,
    ViewJob,
    ViewPlan,
    extraction_recipe,
    image_digests,
    load_detector,
    rows_digest,
)
from pipeline.settings import ExtractSettings
from pipeline.shards.failures import FAILURES_NAME, Failure, write_failures
from pipeline.shards.reader import RegionCache, read_header, read_ids, whole_shards
from pipeline.shards.schema import DROP_OR_RESTORE, INDEX_NAME, Recipe, check_same_recipe
from pipeline.shards.writer import free_shard_names, update_index
from stages.checkout.detectors import detector_description
from stages.checkout.layout import cache_folder, data_root, detector_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.times import record_time
from stages.console.messages import say
from stages.console.progress import progress_bar

_PACKAGES = ("gmpipe", "torch", "torchvision", "pillow", "h5py", "numpy")


def extract(
    request: Request,
    *,
    replace: bool,
    scheduler: str | None = None,
    resources: Mapping[str, float] | None = None,
) -> str:
    """Extract what the cache lacks; whole shards of the same recipe are kept.

    Args:
        request: of the data set.
        replace: drop shards of another recipe; without it they are an error.
        scheduler: address of a Dask scheduler whose workers share this file system; None for a
            cluster on this machine, for as long as the extraction takes.
        resources: Dask's worker resources that a shard needs.

    Returns:
        a line that says what was done.

    Raises:
        GmpipeError: the cache is of another recipe, an image is missing, the detector is missing
            or damaged, the cluster can't do it, or more images than `max_failures` can't be
            decoded; what was extracted stays in any case.
    """
    began = time.monotonic()
    dataset = request.dataset
    folder, root = cache_folder(dataset), data_root(dataset)
    manifest = dataset_manifest(dataset)
    if request.detector.source == "imported":
        return _check_imported(folder, manifest)
    description = detector_description(detector_folder(dataset), dataset)
    recipe = extraction_recipe(description, request.extract)
    plan = ViewPlan(manifest, request.extract.views)
    with folder_lock(folder):
        folder.mkdir(parents=True, exist_ok=True)
        turn = begin_turn(folder)
        for leftover in folder.glob("*.tmp"):  # of a killed run
            leftover.unlink()
        with progress_bar(total=len(manifest), desc="hash images", unit="image", delay=2) as bar:
            digests = image_digests(
                manifest,
                root,
                contents=request.extract.hash_images,
                threads=cores(),
                on_images=bar.update,
            )
        there = _survey(folder, plan, digests, recipe, replace=replace)
        todo = np.flatnonzero(~there.done)
        results = _Results()
        if len(todo):
            job = _Extraction(
                dataset=dataset,
                root=root.absolute(),
                folder=folder.absolute(),
                detector=detector_folder(dataset).absolute(),
                description=description,
                settings=request.extract,
                recipe=recipe,
                turn=turn,
                versions={package: version(package) for package in _PACKAGES},
            )
            tasks = _tasks(job, plan, digests, todo, free_shard_names(folder))
            with progress_bar(
                total=len(plan), initial=len(plan) - len(todo), desc="extract", unit="image"
            ) as bar:
                results = _run(job, tasks, bar, scheduler, resources or {})
            _wait_for(folder, results.written)
            there = _survey(folder, plan, digests, recipe, replace=False)
        if there.shards:
            update_index(folder, dataset, {**recipe, "images": there.images}, there.shards)
        failures = write_failures(folder, results.failures)
    if results.error:
        raise GmpipeError(results.error)
    line = f"{folder}: {int(there.done.sum())} rows, {results.rows} of them extracted now"
    if results.busy:
        share = results.waiting / (results.busy + results.waiting)
        line += f"; the detector waited for images {share:.1%} of its time"
    if failures:
        line += f"; undecodable images: {len(failures)}, see {folder / FAILURES_NAME}"
    if results.rows:
        record_time(dataset, "extract", began, rows=results.rows)
    if len(failures) > request.extract.max_failures:
        raise GmpipeError(
            f"{line}\nThe first: {failures[0].reason}\nAll others are extracted. Mend these images "
            "and run the same command again, which tries only them; or go on without them: "
            f"`--max-failures {len(failures)}`, or `max_failures: {len(failures)}` in "
            f"`extract.{dataset}` of params.yaml, which `dvc repro` reads."
        )
    return line


def _check_imported(folder: Path, manifest: Manifest) -> str:
    """Regions that were made elsewhere are either all there, or must be imported again."""
    try:
        cache = RegionCache.open(folder)
        for split in SPLITS:
            open_split(cache, manifest, split)
    except GmpipeError as error:
        raise GmpipeError(
            f"{error} These regions are imported: `gmpipe import-regions FILE --dataset "
            f"{manifest.dataset}` writes what is missing."
        ) from error
    return f"{folder}: {len(cache)} imported rows, unchanged"


@dataclass(frozen=True)
class _Survey:
    """What a cache's folder holds of a plan.

    Attributes:
        shards: the current ones, with their fingerprints.
        done: (P,) bool, the planned rows that they hold.
        images: `rows_digest` of all that they hold.
    """

    shards: dict[Path, str]
    done: npt.NDArray[np.bool_]
    images: str


def _survey(
    folder: Path,
    plan: ViewPlan,
    digests: npt.NDArray[np.uint8],
    recipe: Recipe,
    *,
    replace: bool,
) -> _Survey:
    """Which shards are current; others are an error or, with ``replace``, dropped."""
    next_step = "It was dropped." if replace else DROP_OR_RESTORE
    done = np.zeros(len(plan), dtype=np.bool_)
    shards: dict[Path, str] = {}
    all_places: list[npt.NDArray[np.int64]] = []
    all_views: list[npt.NDArray[np.int16]] = []
    for path in whole_shards(folder):
        try:
            header = read_header(path)
            # `images` last: it differs as well where everything does.
            common = {**header.recipe, "images": None}
            check_same_recipe(common, {**recipe, "images": None}, str(path), next_step)
            image_ids, views = read_ids(path)
            places = plan.places(pa.array(image_ids))
            if (places < 0).any():
                unknown = image_ids[int(np.argmin(places))]
                raise GmpipeError(
                    f"{path} holds image {unknown!r}, which the manifest lacks. {next_step}"
                )
            images = rows_digest(digests[places], views)
            check_same_recipe(header.recipe, {**recipe, "images": images}, str(path), next_step)
        except GmpipeError as error:
            if not replace:
                raise
            say(str(error))
            path.unlink()
            (folder / INDEX_NAME).unlink(missing_ok=True)
            continue
        done[plan.rows(places, views)] = True
        shards[path] = header.fingerprint
        all_places.append(places)
        all_views.append(views)
    images = ""
    if shards:
        images = rows_digest(digests[np.concatenate(all_places)], np.concatenate(all_views))
    return _Survey(shards, done, images)


def _wait_for(folder: Path, names: set[str], patience: float = 90) -> None:
    """Until the shards that workers wrote are seen here: NFS shows new names up to a minute late.

    Raises:
        GmpipeError: one is not seen.
    """
    deadline = time.monotonic() + patience
    while missing := names - {path.name for path in whole_shards(folder)}:
        if time.monotonic() > deadline:
            raise GmpipeError(
                f"{folder}: a worker wrote {min(missing)}, and it is not seen from here. See that "
                "all machines share this folder, and run the same command again."
            )
        time.sleep(1)


@dataclass(frozen=True)
class _Extraction:
    """What the tasks of one run have in common; small, and good on any worker.

    Attributes:
        root, folder, detector: absolute, on the file system that all workers share.
        turn: of `begin_turn`.
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


@dataclass(frozen=True)
class _ShardTask:
    job: _Extraction
    name: str
    rows: list[ViewJob]
    digests: npt.NDArray[np.uint8]


@dataclass
class _Results:
    rows: int = 0
    busy: float = 0
    waiting: float = 0
    error: str | None = None

    def __post_init__(self) -> None:
        self.failures: list[Failure] = []
        self.written: set[str] = set()


def _tasks(
    job: _Extraction,
    plan: ViewPlan,
    digests: npt.NDArray[np.uint8],
    todo: npt.NDArray[np.int64],
    names: Iterator[str],
) -> Iterator[_ShardTask]:
    size = job.settings.rows_per_shard
    for start in range(0, len(todo), size):
        rows = todo[start : start + size]
        yield _ShardTask(job, next(names), plan.jobs(rows), digests[plan.image[rows]])


def _run(
    job: _Extraction,
    tasks: Iterator[_ShardTask],
    bar: Any,
    scheduler: str | None,
    resources: Mapping[str, float],
) -> _Results:
    """Run the tasks; an error that would come again ends them after those under way."""
    # Here, since a run that has nothing to do need not wait for Dask.
    from stages.workers.cluster import on_every_worker, open_cluster, run_tasks

    results = _Results()
    topic = f"gmpipe-{job.turn}"

    def until_error() -> Iterator[_ShardTask]:
        for task in tasks:
            if results.error:
                return
            yield task

    try:
        with open_cluster(scheduler, resources) as client:
            on_every_worker(client, _problem_of_worker, job)
            for task, outcome in run_tasks(
                client,
                _extract_shard,
                until_error(),
                topic=topic,
                resources=resources,
                on_message=bar.update,
            ):
                if isinstance(outcome, str):
                    results.error = outcome
                    continue
                results.rows += outcome.rows
                results.busy += outcome.busy
                results.waiting += outcome.waiting
                results.failures += outcome.failures
                if outcome.rows:
                    results.written.add(task.name)
                bar.set_postfix(failures=len(results.failures), refresh=False)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped. The shards that were finished are whole and stay in {job.folder}; the same "
            "command goes on with the rest."
        ) from None
    return results


def _problem_of_worker(job: _Extraction) -> str | None:
    """What keeps this worker from extracting as the others would."""
    for package, expected in job.versions.items():
        if (found := version(package)) != expected:
            return (
                f"it has {package} {found}, the command runs with {expected}; the same regions are "
                "expected of all. Install the same versions everywhere."
            )
    try:
        with in_turn(job.folder, job.turn):
            pass
    except (OSError, GmpipeError) as error:
        return (
            f"it does not see the cache {job.folder} as this machine does ({error}). All workers "
            "need the checkout, its data and its cache at the same paths of a shared file system."
        )
    for path, need in ((job.folder, os.W_OK), (job.root, os.R_OK), (job.detector, os.R_OK)):
        if not os.access(path, need):
            verb = "write to" if need == os.W_OK else "read"
            return f"it may not {verb} {path}. Give its user the right to."
    return None


_loading = threading.Lock()
_loaded: dict[tuple[object, ...], ShardExtractor] = {}


def _extractor(job: _Extraction, threads: int) -> ShardExtractor:
    """This process's detector, loaded at its first task."""
    key = (job.detector, job.description.weights_sha256, job.settings)
    with _loading:
        if key not in _loaded:
            _loaded.clear()
            # Again, for workers that joined after the command had asked all of them.
            if problem := _problem_of_worker(job):
                raise GmpipeError(f"a worker that joined later: {problem}")
            found = detector_description(job.detector, job.dataset)
            if found != job.description:
                raise GmpipeError(
                    f"the detector in {job.detector} was replaced while it was used. Run the same "
                    "command again."
                )
            model = load_detector(job.detector, job.description, job.settings)
            _loaded[key] = ShardExtractor(model, job.settings, threads=threads)
        return _loaded[key]


def _extract_shard(task: _ShardTask) -> ShardOutcome | str:
    """A task: write one shard. Errors that another attempt would meet as well are returned."""
    from stages.workers.cluster import tell, threads_of_worker

    job = task.job
    threads = threads_of_worker()
    # Dask starts its workers with OMP_NUM_THREADS=1, as if each task had one core. At each task,
    # since OpenMP keeps the number for each thread that asks.
    torch.set_num_threads(threads)
    topic = f"gmpipe-{job.turn}"
    try:
        with in_turn(job.folder, job.turn):
            return _extractor(job, threads).extract(
                task.rows,
                task.digests,
                job.root,
                path=job.folder / task.name,
                dataset=job.dataset,
                recipe=job.recipe,
                on_images=lambda images: tell(topic, images),
            )
    except GmpipeError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return (
            f"the detector needs more memory than the GPU has ({error}). Set a smaller "
            f"`extract.{job.dataset}.batch_size`, now {job.settings.batch_size}."
        )
    except OSError as error:
        if is_no_space(error):
            return NO_SPACE.format(where=f" while writing {job.folder / task.name}", error=error)
        raise
