"""Command `verify`: whether the files of a checkout are sound and belong together.

Nothing is changed. A thing is damaged if its bytes are not those that were written, and out of date
if it is sound, but was made from something else than what params.yaml or the checkout has now. A
file without a digest, such as history.csv, is compared with one that has one; if they differ, it is
out of date, since a killed process leaves such a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.datasets.manifest import Manifest, read_boxes
from pipeline.doubts.listing import read_doubts
from pipeline.errors import DamagedError, MismatchError, MissingError, advising
from pipeline.evaluation.tables import as_csv
from pipeline.files import read_bytes
from pipeline.formats.sealed import read_sealed_json
from pipeline.formats.text import counted
from pipeline.regions.detector import DESCRIPTION_FILE
from pipeline.regions.plan import PlannedImages
from pipeline.report.sweeps import read_sweep
from pipeline.shards.failures import FAILURES_NAME, read_failures
from pipeline.shards.index import Index
from pipeline.shards.schema import IMAGES
from pipeline.shards.shard import read_header
from pipeline.tensors import load_state
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import (
    DOUBTS_FILE,
    ENTRIES,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    boxes_file,
    cache_folder,
    data_root,
    detector_folder,
    doubts_folder,
    manifest_file,
    report_folder,
    runs_folder,
    settings_folder,
    times_file,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.models import dataset_detector
from stages.checkout.params import Request
from stages.checkout.resolved import outdated_variant_settings
from stages.checkout.times import damaged_lines, read_times
from stages.commands.cache import verify as verify_cache
from stages.commands.verification.entries import entry_findings
from stages.commands.verification.findings import (
    Finding,
    Status,
    csv_rows,
    look,
    sound,
    there,
    unreadable,
)
from stages.commands.verification.runs import RunFiles, Today
from stages.console.progress import progress_bar
from stages.extract import hashed_images
from stages.report import check_doubts, check_sweep

_BAD: tuple[Status, ...] = ("damaged", "unreadable")
_ORDER: tuple[Status, ...] = ("sound", "out of date", "missing", *_BAD)


def verify(request: Request, *, images: bool) -> tuple[str, bool]:
    """Look at everything that was made for a data set.

    Args:
        request: of the data set.
        images: also hash the photographs, and compare them with the cache.

    Returns:
        a line for each thing and one for all of them; and whether nothing is damaged.
    """
    findings: list[Finding] = []
    with progress_bar(desc="verify", unit="item") as bar:
        for finding in _findings(request, images=images):
            findings.append(finding)
            bar.update()
    count = {status: sum(one.status == status for one in findings) for status in _ORDER}
    said = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    lines = [*map(str, findings), f"{request.dataset}: {said}"]
    return "\n".join(lines), not any(count[status] for status in _BAD)


def _findings(request: Request, *, images: bool) -> Iterator[Finding]:
    dataset = request.dataset
    yield from _prepared(request)
    folder = detector_folder(dataset)
    if request.detector.source != "imported":
        yield look(folder, lambda: f"sha256 {dataset_detector(dataset).weights_sha256}")
    elif there(folder):
        yield look(folder, lambda: _no_detector(folder))
    today, runs = Today(dataset), runs_folder(dataset)
    yield from _cached(request, today, images=images)
    yield from _each(runs, lambda run: RunFiles(request, today, run).findings())
    yield from _each(runs / SWEEPS, _of_sweep)
    yield from _each(runs / ENTRIES, lambda entry: entry_findings(entry, today.manifest))
    if there(doubts_folder(dataset) / DOUBTS_FILE):
        yield look(doubts_folder(dataset), lambda: _doubts(dataset))
    yield from _each(Path(".state"), _of_state)
    if there(times_file(dataset)):
        yield look(times_file(dataset), lambda: _times(dataset))
    page = report_folder(dataset)
    if there(page):
        yield look(page, lambda: _readable(page))


def _each(folder: Path, check: Callable[[Path], Iterator[Finding]]) -> Iterator[Finding]:
    """Look at each entry of a folder, if there is one."""
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield unreadable(folder, error)
        return
    for entry in entries:
        if not entry.name.startswith("."):  # locks
            yield from check(entry)


# What is made of the data set --------------------------------------------------------------------


def _prepared(request: Request) -> Iterator[Finding]:
    dataset = request.dataset

    def manifest() -> str:
        found = dataset_manifest(dataset)
        return f"{counted(len(found), 'image')}, {counted(len(found.vocabulary), 'label')}"

    yield look(manifest_file(dataset), manifest)
    prepare = f"Run `gmpipe prepare --dataset {dataset}`."
    boxes = boxes_file(dataset)
    if there(boxes):

        def of_boxes() -> str:
            with advising(prepare, MissingError, DamagedError):
                return f"{len(read_boxes(boxes, []).classes)} classes"

        yield look(boxes, of_boxes)
    folder = settings_folder(dataset)
    if there(folder):

        def settings() -> str:
            if paths := outdated_variant_settings(request):
                raise MismatchError(
                    f"Not what params.yaml describes: {counted(len(paths), 'file')}, the first is "
                    f"{paths[0].name}.",
                    prepare,
                )
            return "as params.yaml describes them"

        yield look(folder, settings)


def _cached(request: Request, today: Today, *, images: bool) -> Iterator[Finding]:
    dataset = request.dataset
    folder = cache_folder(dataset)
    yield look(folder, lambda: verify_cache(request, repair=False).removeprefix(f"{folder}: "))
    if there(folder / FAILURES_NAME):

        def failures() -> str:
            with advising_on_cache(dataset):
                return f"{counted(len(read_failures(folder)), 'image')} without regions"

        yield look(folder / FAILURES_NAME, failures)
    manifest, index = today.manifest, today.index
    extracted = request.detector.source != "imported"
    if images and extracted and manifest is not None and index is not None:
        yield look(data_root(dataset), lambda: _photographs(request, manifest, index))


def _photographs(request: Request, manifest: Manifest, index: Index) -> str:
    """Compare the photographs with those that the shards were extracted from."""
    dataset, wanted = request.dataset, hashed_images(request, manifest)
    changed = [
        shard.name
        for number, shard in enumerate(index.shards)
        if not _of_these_images(cache_folder(dataset) / shard.name, index, number, wanted)
    ]
    if changed:
        raise MismatchError(
            f"Of other photographs: {len(changed)} of {counted(len(index.shards), 'shard')}, the "
            f"first is {changed[0]}.",
            "Restore the photographs, or extract their regions again: "
            f"`gmpipe extract --dataset {dataset} --replace`.",
        )
    return f"{counted(len(manifest), 'photograph')}, those of the cache"


def _of_these_images(path: Path, index: Index, number: int, wanted: PlannedImages) -> bool:
    """Whether a shard is of these photographs, or is not sound, which the cache's line says."""
    header = sound(lambda: read_header(path))
    if header is None:
        return True
    rows = index.shard == number
    numbers = wanted.numbers([stored.decode() for stored in index.image_ids[rows].tolist()])
    recorded = header.recipe.get(IMAGES)
    return bool((numbers >= 0).all()) and wanted.digest(numbers, index.views[rows]) == recorded


# All else ----------------------------------------------------------------------------------------


def _no_detector(folder: Path) -> str:
    read_sealed_json(folder / DESCRIPTION_FILE)
    return "none, since the regions are imported"


def _of_state(path: Path) -> Iterator[Finding]:
    def state() -> str:
        load_state(path)
        return "a run that was killed resumes from it"

    if path.suffix == ".pt":
        yield look(path, state)


def _times(dataset: str) -> str:
    if lines := damaged_lines(dataset):
        raise DamagedError(
            f"Without the right crc32: {counted(len(lines), 'line')}, first line {lines[0]}.",
            "Delete them, or the file: nothing but the page's table of times is made from it.",
        )
    return f"{len(read_times(dataset))} stages and runs"


def _of_sweep(folder: Path) -> Iterator[Finding]:
    path, table = folder / SWEEP_FILE, folder / SWEEP_RESULTS_FILE

    def sweep() -> str:
        with advising("Run the same `gmpipe sweep` again.", DamagedError, MismatchError):
            if there(path):
                results = read_sweep(path)
                if there(table) and read_bytes(table) != as_csv(results.rows()).encode():
                    csv_rows(table)
                    raise MismatchError(
                        f"{SWEEP_RESULTS_FILE} is not the table of {SWEEP_FILE}. A sweep that was "
                        "killed leaves such a file."
                    )
                check_sweep(results)
            return _readable(folder)

    if there(path) or there(table):
        yield look(folder, sweep)


def _doubts(dataset: str) -> str:
    path = doubts_folder(dataset) / DOUBTS_FILE
    again = f"Delete {path}, and run `gmpipe doubts --dataset {dataset}` with the same options."
    with advising(again, DamagedError):
        found = read_doubts(path)
    check_doubts(found)
    return f"{counted(len(found), 'doubtful label')}"


def _readable(folder: Path) -> str:
    """Read every file of a folder whose files have no digests."""

    def stop(error: OSError) -> None:
        raise error

    files = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=stop)
        for name in sorted(names)
    ]
    for path in files:
        read_bytes(path)
    return f"{counted(len(files), 'file')} can be read"
