"""Stage `extract`: images -> cache/<dataset>/, shard by shard, on the workers of a Dask cluster."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.datasets.manifest import Manifest
from pipeline.errors import (
    DamagedError,
    GmpipeError,
    InputError,
    MismatchError,
    MissingError,
    Stopped,
    advising,
)
from pipeline.formats.text import counted
from pipeline.learning.splits import open_split
from pipeline.machine import cores
from pipeline.regions.detector import DetectorDescription
from pipeline.regions.extraction import ShardOutcome, extraction_recipe
from pipeline.regions.given_boxes import GivenBoxes
from pipeline.regions.plan import PlannedImages, ViewPlan, check_readable, image_digests
from pipeline.shards.failures import FAILURES_NAME, Failure, read_failures
from pipeline.shards.index import Index, read_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.repair import plan_repair
from pipeline.shards.schema import Recipe, check_same_recipe, without_images
from pipeline.shards.store import ShardStore, StaleShard, Survey, open_store
from pipeline.shards.verification import Damage
from stages.checkout.caches import (
    amount_of,
    drop_message,
    how_to_keep,
    reasons_of,
    recipes_of,
    shown_failures,
)
from stages.checkout.layout import cache_folder, data_root, detector_folder
from stages.checkout.manifests import check_boxes_unread, dataset_boxes, dataset_manifest
from stages.checkout.models import dataset_detector
from stages.checkout.params import Request
from stages.checkout.times import record_time
from stages.console.messages import say
from stages.console.progress import progress_bar
from stages.workers.tasks import (
    ExtractionJob,
    ShardTask,
    extract_shard,
    installed_versions,
    problem_of_worker,
    shard_tasks,
)

_TELLING_SECONDS = 10
"""Of a shorter time, the share in which the detector waited says only how it started."""


@dataclass(frozen=True)
class Workers:
    """Where an extraction runs.

    Attributes:
        scheduler: address of a Dask scheduler whose workers share this file system; None for a
            cluster on this machine that lasts as long as the extraction.
        resources: Dask's worker resources that a shard needs.
    """

    scheduler: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)


def extract(request: Request, *, replace: bool, workers: Workers = Workers()) -> str:
    """Extract what the cache lacks. Whole shards of the same recipe are kept.

    Args:
        request: of the data set.
        replace: drop shards that are stale: made with other settings, or of photographs that
            changed. Without it, stale shards are an error.
        workers: where the extraction runs.

    Returns:
        a line that says what was done.

    Raises:
        MismatchError: shards are stale; says how many, and why.
        MissingError: the manifest, the detector or an image is missing.
        WorkerError: the workers died or could not be reached.
        InputError: the workers can't do it, or more images than `max_failures` can't be decoded.
            What was extracted is kept in any case. Or the boxes can't be used, see
            `dataset_boxes`.
    """
    folder, manifest = cache_folder(request.dataset), dataset_manifest(request.dataset)
    if request.detector.source == "imported":
        check_boxes_unread(request)
        return _check_imported(folder, manifest)
    detector = dataset_detector(request.dataset)
    boxes = dataset_boxes(request, manifest)
    with open_store(folder, request.dataset) as store:
        images = hashed_images(request, manifest, boxes)
        return _complete(request, detector, store, images, workers, replace=replace)


def extract_damaged(
    request: Request, store: ShardStore, index: Index | None, damages: Sequence[Damage]
) -> str:
    """Extract again what is damaged or missing in a cache; all sound rows are kept.

    Args:
        request: of the data set, whose regions are not imported.
        store: its cache.
        index: of the cache; None if it is missing or damaged.
        damages: of the cache.

    Returns:
        a line that says what was done.

    Raises:
        MismatchError: the cache was made with other settings, another detector or other
            photographs. Nothing is changed then.
        AccessError: the system can't read a shard. Nothing is changed then.
        MissingError, DamagedError: the manifest, the detector or an image is missing or damaged.
            Nothing is changed then.
        WorkerError, InputError: as `extract`.
    """
    manifest, detector = dataset_manifest(request.dataset), dataset_detector(request.dataset)
    boxes = dataset_boxes(request, manifest)
    recipe = extraction_recipe(detector, request.extract, boxes)
    if index is not None:
        remedy = _replace_or_keep(request, detector, boxes, [index.recipe])
        check_same_recipe(without_images(index.recipe), recipe, str(store.folder), remedy)
    images = hashed_images(request, manifest, boxes)
    repair = plan_repair(store, index, damages, recipe, images)
    _refuse_to_drop(request, detector, store, repair.stale, images)
    repair.carry_out()
    return _complete(request, detector, store, images, Workers(), trust_index=False)


def hashed_images(
    request: Request, manifest: Manifest, boxes: GivenBoxes | None = None
) -> PlannedImages:
    """Hash the photographs of a data set.

    Args:
        request, manifest: of the data set.
        boxes: of `dataset_boxes`; needed only to extract.

    Returns:
        the images of its cache as their files are now.

    Raises:
        MissingError: a photograph is missing.
        InputError, OSError: one can't be read.
    """
    remedy = (
        f"Restore them, or run `gmpipe prepare --dataset {request.dataset}` if that makes or lists "
        "them again."
    )
    with (
        advising(remedy, MissingError),
        progress_bar(total=len(manifest), desc="hash images", unit="image", delay=2) as bar,
    ):
        digests = image_digests(
            manifest,
            data_root(request.dataset),
            contents=request.extract.hash_images,
            threads=cores(),
            on_images=bar.update,
        )
    return PlannedImages(ViewPlan(manifest, request.extract.views, boxes), digests)


def _complete(
    request: Request,
    detector: DetectorDescription,
    store: ShardStore,
    images: PlannedImages,
    workers: Workers,
    *,
    replace: bool = False,
    trust_index: bool = True,
) -> str:
    """Extract what the store lacks, and write its index. Raises as `extract`."""
    began = time.monotonic()
    recipe = extraction_recipe(detector, request.extract, images.plan.boxes)
    results = _Results()
    survey = store.survey(recipe, images)
    if replace:
        _check_readable(request, survey.stale, images)
    else:
        _refuse_to_drop(request, detector, store, survey.stale, images)
    rows = images.missing_rows(survey.numbers, survey.views)
    if len(rows):
        job = _job(request, detector, recipe, store)
        _run(job, images, rows, store, survey.stale, workers, results)
        if results.error:
            raise results.error
        store.wait_for(results.written)
        survey = store.survey(recipe, images)
        _refuse_to_drop(request, detector, store, survey.stale, images)
    else:
        _drop(store, survey.stale)
    failures = store.finish(recipe, survey, results.failures, trust_index=trust_index)
    if results.rows:
        record_time(request.dataset, "extract", began, rows=results.rows)
    return _summary(request, survey, results, failures, tried=len(rows) > 0)


def _check_imported(folder: Path, manifest: Manifest) -> str:
    """Check that all imported regions are there; this stage can't make them."""
    remedy = (
        f"These regions are imported: run `gmpipe import-regions FILE --dataset {manifest.dataset}`"
        ", which writes only what is missing."
    )
    with advising(remedy, MissingError, DamagedError, MismatchError):
        cache = RegionCache.open(folder)
        for split in manifest.splits:
            open_split(cache, manifest, split)
    return f"{folder}: {len(cache)} imported rows, unchanged"


def _replace_or_keep(
    request: Request,
    detector: DetectorDescription,
    boxes: GivenBoxes | None,
    found: Sequence[Recipe],
) -> str:
    """The remedy for stale shards.

    Args:
        request, detector, boxes: of the data set.
        found: the recipes of those that were made with other settings.
    """
    arguments = ["--dataset", request.dataset, *request.set_options]
    settings = request.extract.model_copy(update={"whole": False})
    without_whole = extraction_recipe(detector, settings, boxes)
    restore = "To keep them, restore the former settings, detector and photographs."
    return (
        "To drop them and extract their images again, run "
        f"`gmpipe extract {shlex.join(arguments)} --replace`; `dvc repro` continues after that. "
        f"{how_to_keep(request.dataset, found, without_whole, restore)}"
    )


def _refuse_to_drop(
    request: Request,
    detector: DetectorDescription,
    store: ShardStore,
    stale: Sequence[StaleShard],
    images: PlannedImages,
) -> None:
    """Refuse an extraction that would have to drop shards.

    Raises:
        MismatchError: shards are stale.
    """
    if not stale:
        return
    remedy = _replace_or_keep(request, detector, images.plan.boxes, recipes_of(stale))
    if _suffices(store.folder, stale, images):
        remedy += (
            " Or leave the cache as it is: it has the regions of all images that the data set "
            "has now, so `gmpipe train` and `gmpipe evaluate` can read it."
        )
    raise MismatchError(
        f"{store.folder}: the extraction would have to drop {amount_of(stale)}:\n"
        f"{reasons_of(stale)}",
        remedy,
    )


def _check_readable(request: Request, stale: Sequence[StaleShard], images: PlannedImages) -> None:
    """Check that stale shards can be extracted again.

    Raises:
        MissingError: one of their photographs can't be read. (The detector was read before.)
    """
    if stale:
        numbers = np.unique(np.concatenate([shard.numbers for shard in stale]))
        check_readable(images.plan, numbers, data_root(request.dataset), threads=cores())


def _suffices(folder: Path, stale: Sequence[StaleShard], images: PlannedImages) -> bool:
    """Whether a cache only holds more images than it should, so that runs can read it."""
    if any(shard.kind != "removed" for shard in stale):
        return False
    try:
        index = read_index(folder)
    except GmpipeError:
        return False
    numbers = images.numbers([stored.decode() for stored in index.image_ids.tolist()])
    known = numbers >= 0
    missing = images.missing_rows(numbers[known], index.views[known])
    return not len(_not_failed(folder, images, missing))


def _not_failed(
    folder: Path, images: PlannedImages, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Those of some planned rows whose image is not listed in the cache's failures."""
    try:
        failed = images.numbers(list(read_failures(folder)))
    except DamagedError:  # which is written again
        return rows
    return rows[~np.isin(images.plan.image[rows], failed)]


def _drop(store: ShardStore, stale: Sequence[StaleShard]) -> None:
    """Say what is dropped and why, and drop it."""
    if stale:
        say(drop_message(store.folder, stale))
    store.drop(stale)


@dataclass
class _Results:
    """What the tasks have returned so far.

    Attributes:
        rows: number of rows that were written.
        busy, waiting: seconds in the detector, and seconds in which it waited for decoded images.
        failures: images that could not be decoded.
        written: file names of the shards.
        error: one that ends the extraction.
    """

    rows: int = 0
    busy: float = 0
    waiting: float = 0
    failures: list[Failure] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    error: GmpipeError | None = None


def _job(
    request: Request, detector: DetectorDescription, recipe: Recipe, store: ShardStore
) -> ExtractionJob:
    return ExtractionJob(
        dataset=request.dataset,
        root=data_root(request.dataset).absolute(),
        folder=store.folder.absolute(),
        detector=detector_folder(request.dataset).absolute(),
        description=detector,
        settings=request.extract,
        recipe=recipe,
        turn=store.turn,
        versions=installed_versions(),
    )


def _run(
    job: ExtractionJob,
    images: PlannedImages,
    rows: npt.NDArray[np.int64],
    store: ShardStore,
    stale: Sequence[StaleShard],
    workers: Workers,
    results: _Results,
) -> None:
    """Extract rows of the plan on the workers. An error ends it after the tasks under way.

    Stale shards are dropped once the workers are known to be able to extract them again.
    """
    # Here, since a run that has nothing to extract need not wait for Dask.
    from stages.workers.cluster import on_every_worker, open_cluster, run_tasks

    def until_error() -> Iterator[ShardTask]:
        # Runs after stale shards were dropped, so that their names are free.
        for task in shard_tasks(job, images, rows, store.free_names()):
            if results.error:
                return
            yield task

    # A row of an image that failed before is not what an earlier extraction left undone.
    is_resumed = len(rows) < len(images.plan) and len(_not_failed(job.folder, images, rows)) > 0
    total = len(images.plan) if is_resumed else len(rows)
    unit = "image" if job.settings.views == 1 else "view"
    try:
        with (
            progress_bar(total=total, desc="extract", unit=unit) as bar,
            open_cluster(workers.scheduler, workers.resources) as client,
        ):
            if is_resumed:
                bar.resume(total - len(rows))
            on_every_worker(client, problem_of_worker, job)
            _drop(store, stale)
            for task, outcome in run_tasks(
                client,
                extract_shard,
                until_error(),
                topic=job.topic,
                resources=workers.resources,
                on_message=bar.update,
            ):
                _note(results, task, outcome)
                bar.set_postfix(failures=len(results.failures), refresh=False)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped. All shards that were finished are whole and are kept in {job.folder}.",
            "Run the same command again to continue with the rest.",
        ) from None


def _note(results: _Results, task: ShardTask, outcome: ShardOutcome | GmpipeError) -> None:
    """Add the outcome of a task to the results."""
    if isinstance(outcome, GmpipeError):
        results.error = outcome
        return
    results.rows += outcome.rows
    results.busy += outcome.busy
    results.waiting += outcome.waiting
    results.failures += outcome.failures
    if outcome.rows:
        results.written.add(task.name)


def _summary(
    request: Request,
    survey: Survey,
    results: _Results,
    failures: Sequence[Failure],
    *,
    tried: bool,
) -> str:
    """Lines that say what was done.

    Raises:
        InputError: there are more failures than `max_failures`. What was done is printed before.
    """
    dataset, folder = request.dataset, cache_folder(request.dataset)
    nothing = "" if tried else "; nothing to extract"
    rows = counted(len(survey.numbers), "row")
    lines = [f"{folder}: {rows}, {results.rows} of them extracted now{nothing}"]
    seconds = results.busy + results.waiting
    if results.rows and seconds >= _TELLING_SECONDS:
        share = results.waiting / seconds
        lines.append(f"The detector waited for images {share:.1%} of its time.")
    undecodable = (
        f"{counted(len(failures), 'image')} can't be decoded, see {folder / FAILURES_NAME}:\n"
        f"{shown_failures(failures)}"
    )
    if len(failures) > request.extract.max_failures:
        say("\n".join(lines))
        raise InputError(
            f"{undecodable}\nAll other images are extracted.",
            "Fix or replace these images and run the same command again, which tries only them. Or "
            f"tolerate them: `--max-failures {len(failures)}`, or `max_failures: {len(failures)}` "
            f"in `extract.{dataset}` of params.yaml, which `dvc repro` reads.",
        )
    if failures:
        lines.append(undecodable)
    return "\n".join(lines)
