"""Commands `cache info|verify|estimate`: what a cache holds, whether it is sound, what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from tabulate import tabulate

from pipeline.datasets.manifest import Manifest
from pipeline.errors import AccessError, DamagedError, InputError, MismatchError, MissingError
from pipeline.files import exists
from pipeline.formats.text import counted
from pipeline.machine import cores
from pipeline.regions.detector import DESCRIPTION_FILE
from pipeline.regions.extraction import ShardExtractor, load_detector
from pipeline.regions.plan import ViewPlan
from pipeline.shards.failures import read_failures
from pipeline.shards.index import INDEX_NAME, Index, read_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.repair import plan_repair
from pipeline.shards.schema import (
    Recipe,
    check_same_recipe,
    format_recipe,
    holds_whole,
    row_bytes,
    without_images,
)
from pipeline.shards.shard import read_header, whole_shards
from pipeline.shards.store import ImagesById, ShardStore, open_store
from pipeline.shards.verification import Damage, verify_cache
from stages.checkout.caches import advising_on_cache, check_dataset, open_cache, reasons_of
from stages.checkout.disk import free_bytes, shown_bytes
from stages.checkout.layout import cache_folder, data_root, detector_folder
from stages.checkout.manifests import dataset_boxes, dataset_manifest
from stages.checkout.models import dataset_detector
from stages.checkout.params import Request
from stages.console.messages import say
from stages.console.progress import progress_bar
from stages.extract import extract_damaged


def cache_info(dataset: str) -> str:
    """Show what a cache holds and what its regions were made with."""
    cache = open_cache(dataset)
    with advising_on_cache(dataset):
        failures = read_failures(cache.folder)
    size = sum(entry.bytes for entry in cache.shards)
    rows: list[tuple[str, object]] = [
        (
            "rows",
            f"{len(cache)}, in {counted(len(cache.shards), 'shard')}, {shown_bytes(size)} in total",
        ),
        ("regions of a row", cache.regions),
        ("feature", f"{cache.feature_size} x {cache.feature_dtype}"),
        ("vector of the whole view", _shown_whole(cache)),
        ("images without regions", len(failures)),
        ("fingerprint", cache.fingerprint),
        *sorted(cache.recipe.items()),
    ]
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def _shown_whole(cache: RegionCache) -> str:
    """Whether a cache holds the vectors of whole views, and what they take."""
    if not cache.has_whole:
        return "none"
    size = _whole_bytes(cache.feature_size, cache.feature_dtype)
    return f"{shown_bytes(size)} a row, {shown_bytes(size * len(cache))} in total"


def _whole_bytes(feature_size: int, feature_dtype: str) -> int:
    return feature_size * np.dtype(feature_dtype).itemsize


def verify(request: Request, *, repair: bool) -> str:
    """List everything damaged in a cache; with ``repair``, extract only that again.

    Returns:
        a line that says that the cache is sound, or what was repaired.

    Raises:
        DamagedError: something is damaged, and was not to be repaired; names each damage.
        AccessError: the system can't read a shard, and nothing was to be repaired.
        MissingError: there is no index; for a repair, no shard either.
        GmpipeError: as `extract_damaged`, or as `_keep_imported` for imported regions. What a
            repair refuses, it has not touched.
    """
    folder, dataset = cache_folder(request.dataset), request.dataset
    if not repair:
        with advising_on_cache(dataset):
            index = read_index(folder)
        check_dataset(index.dataset, dataset)
        damages = _damages(folder, index)
        found = _listed([*damages, *_damaged_failures(folder)])
        if any(damage.kind == "inaccessible" for damage in damages):
            raise AccessError(
                f"{folder} can't be read as a whole:\n{found}\n",
                "Give your user the right to read these files, or check the disk, and run the same "
                "command again.",
            )
        if found:
            raise DamagedError(
                f"{folder} is damaged:\n{found}\n",
                f"Run `gmpipe cache verify --dataset {dataset} --repair`, which keeps every sound "
                "row and extracts the others again.",
            )
        return _sound(folder, index)
    if not (folder / INDEX_NAME).exists() and not whole_shards(folder):
        with advising_on_cache(dataset):
            read_index(folder)
    with open_store(folder, dataset) as store:
        known: Index | None = None
        try:
            known = read_index(folder)
        except (MissingError, DamagedError) as error:
            say(error.problem)
        if known:
            check_dataset(known.dataset, dataset)
        damages = _damages(folder, known)
        found = _listed([*damages, *_damaged_failures(folder)])
        if known and not found:
            return _sound(folder, known)
        if found:
            say(f"{folder} is damaged:\n{found}")
        again = _keep_imported if request.detector.source == "imported" else extract_damaged
        return again(request, store, known, damages)


def _damages(folder: Path, index: Index | None) -> list[Damage]:
    """Find all damages of a cache, with a bar."""
    total = len(index.shards) if index else None
    with progress_bar(total=total, desc="verify", unit="shard") as bar:
        return verify_cache(folder, index, lambda name: bar.update())


def _damaged_failures(folder: Path) -> list[str]:
    """What is wrong with the list of images without regions, if anything is."""
    try:
        read_failures(folder)
    except DamagedError as error:
        return [error.problem]
    return []


def _listed(damages: Sequence[Damage | str]) -> str:
    return "\n".join(f"  {damage}" for damage in damages)


def _sound(folder: Path, index: Index) -> str:
    rows, shards = counted(len(index.row), "row"), counted(len(index.shards), "shard")
    return f"{folder}: {rows} in {shards}, all sound"


def _keep_imported(
    request: Request, store: ShardStore, index: Index | None, damages: Sequence[Damage]
) -> str:
    """Keep the sound rows of imported regions. The others must be imported again.

    The index stays until they are. It is written again here only if no row is missing. If the list
    of images without regions is damaged, these count as missing: an import lists them again.

    Args:
        request, store, index, damages: as `extract_damaged`.

    Returns:
        a line that says what was done.

    Raises:
        MismatchError: params.yaml asks for other regions than those of the cache, or the manifest
            lacks an image. Nothing is changed then.
        AccessError, DamagedError: something can't be read. Nothing is changed then.
        MissingError: the manifest is missing, or rows must be imported again; says how.
    """
    folder, dataset = store.folder, request.dataset
    command = f"gmpipe import-regions FILE --dataset {dataset}"
    images = ImagesById(dataset_manifest(dataset).table.column("image_id").to_pylist())
    failures = {} if _damaged_failures(folder) else read_failures(folder)
    recipe = _imported_recipe(folder, index, command)
    wanted = {**recipe, "feature_dtype": request.extract.feature_dtype}
    if int(recipe["regions"] or 0) > request.extract.regions:  # an import may bring fewer
        wanted["regions"] = request.extract.regions
    if holds_whole(recipe) and not request.extract.whole:  # nor need it have these vectors
        del wanted["whole"]
        wanted |= format_recipe(whole=False)
    restore = f"Restore the former settings in params.yaml, or import again: `{command} --replace`."
    check_same_recipe(recipe, wanted, str(folder), restore)
    repair = plan_repair(store, index, damages, recipe, images)
    if repair.stale:
        raise MismatchError(
            f"{folder}: these shards are not of this import:\n{reasons_of(repair.stale)}", restore
        )
    repair.carry_out()
    survey = store.survey(recipe, images)
    lacking = len(images) - len({*survey.numbers.tolist(), *images.numbers(list(failures))})
    if lacking:
        raise MissingError(
            f"{folder}: {counted(len(survey.numbers), 'sound row')} kept, but without regions: "
            f"{counted(lacking, 'image')}. Imported regions can't be extracted again.",
            f"Run `{command}` again, which writes only those that are missing.",
        )
    store.finish(recipe, survey, failures.values(), trust_index=False)
    return f"{folder}: {len(survey.numbers)} imported rows, all sound"


def _imported_recipe(folder: Path, index: Index | None, command: str) -> Recipe:
    """The recipe of imported regions, without `images`: that of the index, or else of a shard.

    Raises:
        MismatchError: the regions were extracted.
        DamagedError: no shard can be read.
    """
    recipe = None if index is None else index.recipe
    for path in whole_shards(folder) if recipe is None else ():
        with suppress(DamagedError):
            recipe = read_header(path).recipe
            break
    if recipe is None:
        raise DamagedError(
            f"{folder}: neither the index nor a shard can be read.",
            f"Import the regions again: `{command} --replace`.",
        )
    if "imported_from" not in recipe:
        raise MismatchError(
            f"{folder} holds regions that were extracted, but params.yaml says that they are "
            "imported.",
            f"Restore `detector` in params.yaml, or replace them: `{command} --replace`.",
        )
    return without_images(recipe)


def estimate(request: Request, *, probe: int) -> str:
    """Estimate the size of a cache and, with a probe, the time that its extraction takes.

    Args:
        request: of the data set.
        probe: number of images that are decoded and sent through the detector to measure; 0 for
            none.

    Returns:
        a table.

    Raises:
        InputError: the regions are imported.
        MissingError: the data set was not prepared, or ``probe`` needs a detector that does not
            exist.
    """
    dataset = request.dataset
    folder = cache_folder(dataset)
    if request.detector.source == "imported":
        raise InputError(
            f"the regions of {dataset} are imported: there is nothing to extract or to estimate.",
            f"`gmpipe cache info --dataset {dataset}` shows what the cache holds.",
        )
    manifest = dataset_manifest(dataset)
    plan = ViewPlan(manifest, request.extract.views, dataset_boxes(request, manifest))
    architecture = request.detector.architecture
    if exists(detector_folder(dataset) / DESCRIPTION_FILE):
        architecture = dataset_detector(dataset).architecture
    row = row_bytes(
        request.extract.regions,
        architecture.feature_size,
        request.extract.feature_dtype,
        id_width=pc.max(pc.binary_length(plan.image_ids)).as_py(),
        whole=request.extract.whole,
    )
    whole = "none"
    if request.extract.whole:
        size = _whole_bytes(architecture.feature_size, request.extract.feature_dtype)
        whole = f"{shown_bytes(size)} of each row, `extract.{dataset}.whole`"
    free = free_bytes(folder)
    rows: list[tuple[str, str]] = [
        ("rows", f"{len(plan)} (views of {counted(len(manifest), 'image')})"),
        ("size of the cache", f"{shown_bytes(row * len(plan))}, {row} bytes per row"),
        ("vector of the whole view", whole),
        ("free on its disk", shown_bytes(free)),
    ]
    if probe:
        rows += _probe(request, manifest, plan, probe)
    if row * len(plan) > free:
        rows.append(("", "the cache does not fit: docs/disks.md shows how to use another disk"))
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def _probe(
    request: Request, manifest: Manifest, plan: ViewPlan, images: int
) -> list[tuple[str, str]]:
    """Rates on this machine, and the time that one worker like it would take for all rows."""
    dataset, root = request.dataset, data_root(request.dataset)
    description = dataset_detector(dataset)
    model = load_detector(detector_folder(dataset), description, request.extract)
    extractor = ShardExtractor(model, request.extract, threads=cores())
    chosen = np.unique(np.linspace(0, len(plan) - 1, images).astype(np.int64))
    jobs = plan.jobs(chosen)
    with progress_bar(total=2 * len(jobs), desc="probe, twice", unit="image") as bar:
        extractor.detect(jobs[: request.extract.batch_size], root)  # warms up
        began = time.perf_counter()
        extractor.decode(jobs, root, bar.update)
        decoding = len(jobs) / (time.perf_counter() - began)
        began = time.perf_counter()
        _, _, outcome = extractor.detect(jobs, root, bar.update)
        together = len(jobs) / (time.perf_counter() - began)
    device = next(model.parameters()).device
    slower = "decoding" if decoding < 1.2 * together else "the detector"
    return [
        ("probe", f"{counted(len(jobs), 'image')} on {device}, {counted(cores(), 'core')}"),
        ("decoding alone", f"{decoding:.1f} images/s"),
        ("decoding and detector", f"{together:.1f} images/s; the bottleneck is {slower}"),
        ("time on this machine", f"{_duration(len(plan) / together)}, and some seconds to start"),
        ("undecodable in the probe", str(len(outcome.failures))),
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
