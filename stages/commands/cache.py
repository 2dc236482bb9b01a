"""Commands `cache info|verify|estimate`: what a cache holds, whether it is sound, what it costs."""

from __future__ import annotations

import time

import numpy as np
import pyarrow.compute as pc
from tabulate import tabulate

from pipeline.datasets.manifest import Manifest
from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.files import exists
from pipeline.machine import cores
from pipeline.regions.detector import DESCRIPTION_FILE
from pipeline.regions.extraction import ShardExtractor, load_detector
from pipeline.regions.plan import ViewPlan
from pipeline.shards.failures import read_failures
from pipeline.shards.index import read_index
from pipeline.shards.schema import row_bytes
from pipeline.shards.store import open_store
from pipeline.shards.verification import Damage, verify_cache
from stages.checkout.caches import advising_on_cache, open_cache
from stages.checkout.disk import free_bytes, shown_bytes
from stages.checkout.layout import cache_folder, data_root, detector_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.models import dataset_detector
from stages.checkout.params import Request
from stages.console.messages import say
from stages.console.progress import progress_bar
from stages.extract import extract


def cache_info(dataset: str) -> str:
    """Show what a cache holds and what its regions were made with."""
    cache = open_cache(dataset)
    with advising_on_cache(dataset):
        failures = read_failures(cache.folder)
    size = sum(entry.bytes for entry in cache.shards)
    rows: list[tuple[str, object]] = [
        ("rows", f"{len(cache)}, in {len(cache.shards)} shards, {shown_bytes(size)} in total"),
        ("regions of a row", cache.regions),
        ("feature", f"{cache.feature_size} x {cache.feature_dtype}"),
        ("images without regions", len(failures)),
        ("fingerprint", cache.fingerprint),
        *sorted(cache.recipe.items()),
    ]
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def verify(request: Request, *, repair: bool) -> str:
    """Name all that is damaged in a cache; with ``repair``, extract just that again.

    Returns:
        a line that says that the cache is sound, or what was repaired.

    Raises:
        DamagedError: something is damaged, and was not to be repaired or can't be; names each
            damage.
        MissingError: there is no index.
        MismatchError: a repair would extract other regions than those of the cache.
    """
    folder = cache_folder(request.dataset)
    command = f"gmpipe cache verify --dataset {request.dataset} --repair"
    try:
        with advising_on_cache(request.dataset):
            index = read_index(folder)
    except DamagedError as error:
        if not repair:
            raise
        say(error.problem)
        return extract(request, replace=False)  # which writes the index again
    with progress_bar(total=len(index.shards), desc="verify", unit="shard") as bar:
        damages = verify_cache(folder, lambda name: bar.update())
    if not damages:
        return f"{folder}: {len(index.row)} rows in {len(index.shards)} shards, all sound"
    listed = "\n".join(f"  {damage}" for damage in damages)
    if not repair:
        raise DamagedError(
            f"{folder} is damaged:\n{listed}\n",
            f"Run `{command}`, which keeps every sound row and extracts the others again.",
        )
    say(f"{folder} is damaged:\n{listed}")
    if request.detector.source == "imported":
        _drop_imported(request, damages)
    return extract(request, replace=False, damages=damages)


def _drop_imported(request: Request, damages: list[Damage]) -> None:
    """Drop the damaged shards of imported regions, which nobody can extract again.

    Raises:
        MissingError: always, since they must be imported again.
    """
    folder = cache_folder(request.dataset)
    with open_store(folder, request.dataset) as store:
        for damage in damages:
            (folder / damage.shard).unlink(missing_ok=True)
        store.drop_index()
    raise MissingError(
        f"{folder}: the damaged shards were dropped. Their regions were imported.",
        f"Run `gmpipe import-regions FILE --dataset {request.dataset}` again, which writes only "
        "those.",
    )


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
    plan = ViewPlan(manifest, request.extract.views)
    architecture = request.detector.architecture
    if exists(detector_folder(dataset) / DESCRIPTION_FILE):
        architecture = dataset_detector(dataset).architecture
    row = row_bytes(
        request.extract.regions,
        architecture.feature_size,
        request.extract.feature_dtype,
        id_width=pc.max(pc.binary_length(plan.image_ids)).as_py(),
    )
    free = free_bytes(folder)
    rows: list[tuple[str, str]] = [
        ("rows", f"{len(plan)} (views of {len(manifest)} images)"),
        ("size of the cache", f"{shown_bytes(row * len(plan))}, {row} bytes per row"),
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
        ("probe", f"{len(jobs)} images on {device}, {cores()} cores"),
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
