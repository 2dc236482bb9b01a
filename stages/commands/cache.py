"""Commands on a cache: what it holds, whether it is sound, what one would cost."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tabulate import tabulate

from pipeline.datasets.manifest import Manifest
from pipeline.errors import GmpipeError
from pipeline.files import begin_turn, folder_lock
from pipeline.machine import cores
from pipeline.regions.detector import DESCRIPTION_FILE
from pipeline.regions.extraction import (
    ShardExtractor,
    ViewPlan,
    image_digests,
    load_detector,
    rows_digest,
)
from pipeline.settings import ExtractSettings
from pipeline.shards.failures import read_failures
from pipeline.shards.reader import RegionCache, read_header, read_index
from pipeline.shards.schema import INDEX_NAME
from pipeline.shards.verification import Damage, salvage_shard, sound_rows, verify_cache
from stages.checkout.detectors import detector_description
from stages.checkout.disk import free_bytes, shown_bytes
from stages.checkout.layout import cache_folder, data_root, detector_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.console.messages import say
from stages.console.progress import progress_bar
from stages.extract import extract


def cache_info(dataset: str) -> str:
    """What a cache holds and what its regions were made with."""
    folder = cache_folder(dataset)
    cache = RegionCache.open(folder)
    size = sum(entry.bytes for entry in cache.shards)
    rows: list[tuple[str, object]] = [
        ("rows", f"{len(cache)}, in {len(cache.shards)} shards of together {shown_bytes(size)}"),
        ("regions of a row", cache.regions),
        ("feature", f"{cache.feature_size} x {cache.feature_dtype}"),
        ("images that can't be decoded", len(read_failures(folder))),
        ("fingerprint", cache.fingerprint),
        *sorted(cache.recipe.items()),
    ]
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def verify(request: Request, *, repair: bool) -> str:
    """Name all that is damaged in a cache; with ``repair``, extract just that again.

    Returns:
        a line that says that the cache is sound, or what was repaired.

    Raises:
        GmpipeError: something is damaged and was not to be repaired, or can't be: each damage is
            named; or there is no sound index.
    """
    dataset = request.dataset
    folder = cache_folder(dataset)
    index = read_index(folder)
    with progress_bar(total=len(index.shards), desc="verify", unit="shard") as bar:
        damages = verify_cache(folder, lambda name: bar.update())
    if not damages:
        return f"{folder}: {len(index.row)} rows in {len(index.shards)} shards, all sound"
    named = "\n".join(f"  {damage}" for damage in damages)
    if not repair:
        raise GmpipeError(
            f"{folder} is damaged:\n{named}\nRun `gmpipe cache verify --dataset {dataset} "
            "--repair`, which keeps every sound row and extracts the others again."
        )
    say(f"{folder} is damaged:\n{named}")
    _drop(request, damages)
    if request.detector.source == "imported":
        raise GmpipeError(
            f"{folder}: the damaged shards were dropped. Their regions were imported: run `gmpipe "
            f"import-regions FILE --dataset {dataset}` again, which writes just those."
        )
    return extract(request, replace=True)


def _drop(request: Request, damages: list[Damage]) -> None:
    """Remove the damaged shards but for their sound rows; the index goes as well."""
    folder = cache_folder(request.dataset)
    kinds: dict[str, set[str]] = {}
    for damage in damages:
        kinds.setdefault(damage.shard, set()).add(damage.kind)
    with folder_lock(folder):
        begin_turn(folder)
        imported = request.detector.source == "imported"
        salvaged = [
            folder / name for name, found in kinds.items() if found <= {"file", "row", "index"}
        ]
        # What can't be read, is of other request, or was imported as a whole, goes as a whole.
        for name, found in kinds.items():
            if imported or (folder / name not in salvaged and found != {"unlisted"}):
                (folder / name).unlink(missing_ok=True)
        if salvaged and not imported:
            _salvage(request, salvaged)
        (folder / INDEX_NAME).unlink(missing_ok=True)


def _salvage(request: Request, paths: list[Path]) -> None:
    """Write shards anew with their sound rows; those of photographs that changed are removed."""
    dataset = request.dataset
    index = read_index(cache_folder(dataset))
    numbers = {entry.name: number for number, entry in enumerate(index.shards)}
    manifest = dataset_manifest(dataset)
    plan = ViewPlan(manifest, request.extract.views)
    digests = image_digests(
        manifest, data_root(dataset), contents=request.extract.hash_images, threads=cores()
    )

    def digest(image_ids: pa.Array, views: npt.NDArray[np.int16]) -> str | None:
        places = plan.places(image_ids)
        return None if (places < 0).any() else rows_digest(digests[places], views)

    for path in paths:
        recipe = read_header(path).recipe
        listed = index.shard == numbers[path.name]
        all_ids = pa.array(index.image_ids[listed], pa.binary()).cast(pa.string())
        sound, image_ids, views = sound_rows(path)
        kept = digest(pa.array(image_ids, pa.string()), views)
        if digest(all_ids, index.views[listed]) != recipe["images"] or not len(sound):
            path.unlink()
        else:
            salvage_shard(path, sound, {**recipe, "images": kept})


def estimate(request: Request, *, probe: int) -> str:
    """What the cache will need: bytes and, after a probe, time.

    Args:
        request: of the data set.
        probe: images that are decoded and sent through the detector to measure; 0 for none.

    Returns:
        a table.

    Raises:
        GmpipeError: the data set was not prepared, or ``probe`` and there is no detector.
    """
    dataset = request.dataset
    folder = cache_folder(dataset)
    if request.detector.source == "imported":
        raise GmpipeError(
            f"the regions of {dataset} are imported: there is nothing to extract or "
            f"to estimate. `gmpipe cache info --dataset {dataset}` tells what is there."
        )
    manifest = dataset_manifest(dataset)
    plan = ViewPlan(manifest, request.extract.views)
    there = (detector_folder(dataset) / DESCRIPTION_FILE).is_file()
    architecture = request.detector.architecture
    if there:
        architecture = detector_description(detector_folder(dataset), dataset).architecture
    row = _row_bytes(
        request.extract,
        architecture.feature_size,
        id_width=pc.max(pc.binary_length(plan.image_ids)).as_py(),
    )
    free = free_bytes(folder)
    rows: list[tuple[str, str]] = [
        ("rows", f"{len(plan)} (views of {len(manifest)} images)"),
        ("size of the cache", f"{shown_bytes(row * len(plan))}, {row} bytes a row"),
        ("free at its place", shown_bytes(free)),
    ]
    if probe:
        rows += _probe(request, manifest, plan, probe)
    if row * len(plan) > free:
        rows.append(("", "the cache does not fit: docs/disks.md tells how it goes to another disk"))
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def _probe(
    request: Request, manifest: Manifest, plan: ViewPlan, images: int
) -> list[tuple[str, str]]:
    """Rates on this machine, and the time that one worker like it would take for all rows."""
    dataset, root = request.dataset, data_root(request.dataset)
    description = detector_description(detector_folder(dataset), dataset)
    model = load_detector(detector_folder(dataset), description, request.extract)
    extractor = ShardExtractor(model, request.extract, threads=cores())
    chosen = np.unique(np.linspace(0, len(plan) - 1, images).astype(np.int64))
    jobs = plan.jobs(chosen)
    with progress_bar(total=2 * len(jobs), desc="probe, twice", unit="image") as bar:
        extractor.detect(jobs[: request.extract.batch_size], root)  # what is slow once only
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


def _row_bytes(settings: ExtractSettings, feature_size: int, id_width: int) -> int:
    """Bytes of a row in a shard: the fields of `schema.AXES` and the checksum."""
    region = feature_size * np.dtype(settings.feature_dtype).itemsize + 4 * 4 + 4 + 2
    return settings.regions * region + 2 + id_width + 2 + 4


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
