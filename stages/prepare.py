"""Stage `prepare`: from the files of a data set to data/<dataset>/{prepared,settings}/."""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.datasets.check import Findings, ListedImage, check_files
from pipeline.datasets.disk import find_files
from pipeline.datasets.frames import place_boxes, same_headers
from pipeline.datasets.listing import (
    Listing,
    as_on_disk,
    is_current,
    listed_manifest,
    make_manifest,
    without_missing_boxes,
)
from pipeline.datasets.manifest import (
    BoxTable,
    Manifest,
    read_boxes,
    read_manifest,
    write_boxes,
    write_manifest,
)
from pipeline.datasets.missing import locate_missing, missing_remedy
from pipeline.datasets.readers.coco import read_coco
from pipeline.datasets.readers.nuswide import read_nuswide
from pipeline.datasets.readers.table import read_table
from pipeline.datasets.readers.voc import read_voc
from pipeline.datasets.readers.yolo import read_yolo
from pipeline.datasets.scenes import make_scenes, scenes_sources
from pipeline.errors import DamagedError, MissingError, advising
from pipeline.files import (
    exists,
    folder_lock,
    read_bytes,
    replacing,
    replacing_folder,
    tidy,
)
from pipeline.formats.text import counted
from pipeline.settings import (
    CocoSettings,
    ImportedSettings,
    ListedSettings,
    NuswideSettings,
    ScenesSettings,
    TableSettings,
    VocSettings,
    YoloSettings,
    difficult_settings,
)
from stages.checkout.layout import (
    boxes_file,
    data_root,
    manifest_file,
    prepared_folder,
    settings_folder,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.resolved import write_variant_settings
from stages.checkout.times import record_time
from stages.checkout.yaml_text import load_yaml
from stages.console.labels import describe_labels
from stages.console.progress import progress_bar, progress_phase

_READERS: dict[type, Callable[[Path, Any], Listing]] = {
    VocSettings: read_voc,
    CocoSettings: read_coco,
    YoloSettings: partial(read_yolo, load_yaml=load_yaml),
    NuswideSettings: read_nuswide,
    TableSettings: read_table,
}

_MISSING = "missing.csv"  # beside the manifest: the images that were left out without a file
_MISSING_COLUMNS = ("image_id", "path")
_SHOWN = 5  # images that a list names


def prepare(request: Request) -> str:
    """Write the manifest, unless its sources are unchanged and its images exist.

    If only `difficult` changed, nothing but that is replaced in it. An imported manifest is never
    written otherwise.

    The train settings of each variant are written as well, for the stages that depend on them.

    Returns:
        a line that says what was done; the labels with their counts; and notes on labels that may
        be wrong.

    Raises:
        MissingError: files of the data set do not exist, images are missing and may not be left
            out, or the regions of an imported data set are not imported yet.
        InputError: a file breaks its format.
        BusyError: another process prepares the data set.
    """
    began = time.monotonic()
    dataset, source = request.dataset, request.prepare
    folder = prepared_folder(dataset)
    with folder_lock(folder):
        tidy(folder)
        tidy(settings_folder(dataset))
        write_variant_settings(request)
        if isinstance(source, ImportedSettings):
            imported = _treat_difficult(_imported_manifest(dataset), request)
            line = f"{folder}: imported, {_counts(imported)}"
            return "\n".join([line, *describe_labels(imported)])
        current = _current_manifest(dataset, source)
        if current is not None:
            treated = _treat_difficult(current, request)
            what = "unchanged" if treated is current else "unchanged but for `difficult`"
            line = f"{folder} ({_counts(treated)}): {what}"
            return "\n".join([line, *describe_labels(treated)])
        places: Mapping[str, str] = {}
        if isinstance(source, ScenesSettings):
            manifest = _draw(dataset, source)
        else:
            manifest, places = _list(dataset, source)
    record_time(dataset, "prepare", began)
    return "\n".join([f"{folder}: {_counts(manifest)}", *describe_labels(manifest, places)])


def check(request: Request, list_file: Path | None = None) -> tuple[str, bool]:
    """Look whether every image exists and can be read. Nothing else than ``list_file`` is written.

    Args:
        request: of the data set.
        list_file: a CSV to write of every image that is missing, unreadable or unlabelled.

    Returns:
        which images are missing, unreadable, duplicates or unlabelled, and the labels, line by
        line; and whether `prepare` and `extract` will accept the images, as the settings are.

    Raises:
        MissingError: files of the data set do not exist.
        InputError: a file breaks its format.
    """
    dataset, source = request.dataset, request.prepare
    root = data_root(dataset)
    if isinstance(source, ImportedSettings):
        manifest = _imported_manifest(dataset)
        manifest = replace(manifest, difficult=source.difficult)
        line = f"{dataset}: {_counts(manifest)}. Its regions are imported, so it needs no images."
        return "\n".join([line, *describe_labels(manifest)]), True
    places: Mapping[str, str] = {}
    if isinstance(source, ScenesSettings):
        manifest = dataset_manifest(dataset)
    else:
        listing = _read(root, source)
        manifest, places = listed_manifest(listing, dataset, source), listing.places
        manifest, _ = _place(without_missing_boxes(listing, root), manifest, root, source)
    with progress_bar(total=len(manifest), desc="check", unit="image") as bar:
        findings = check_files(manifest, root, bar.update)
    if list_file is not None:
        _write_findings(list_file, findings)
    lines = _sections(dataset, findings)
    refusals, allowed = _verdict(request, manifest, findings)
    if not refusals and not allowed:
        allowed = ["Every image exists and can be read."]
    report = "\n".join([*lines, *describe_labels(manifest, places), *allowed, *refusals])
    return report, not refusals


# --- the manifest --------------------------------------------------------------------------------


def _draw(dataset: str, source: ScenesSettings) -> Manifest:
    """Draw the scenes, and write them with their manifest and boxes."""
    folder = prepared_folder(dataset)
    with replacing_folder(folder) as temporary:
        manifest, boxes = make_scenes(
            temporary / "images",
            f"{folder.name}/images",
            dataset,
            source,
            lambda numbers: progress_bar(numbers, desc="prepare", unit="scene"),
        )
        write_boxes(temporary / boxes_file(dataset).name, boxes)
        write_manifest(temporary / manifest_file(dataset).name, manifest)
    return manifest


def _list(dataset: str, source: ListedSettings) -> tuple[Manifest, Mapping[str, str]]:
    """Read the data set's files, and write the manifest, boxes and the missing images.

    Returns:
        the manifest; and the places of labels, as in `Listing`.
    """
    root = data_root(dataset)
    listing = _read(root, source)
    manifest, missing = make_manifest(listing, dataset, root, source)
    manifest, boxes = _place(listing, manifest, root, source)
    with replacing_folder(prepared_folder(dataset)) as temporary:
        if boxes is not None:
            write_boxes(temporary / boxes_file(dataset).name, boxes)
        if missing.num_rows:
            _write_missing(temporary / _MISSING, missing)
        write_manifest(temporary / manifest_file(dataset).name, manifest)
    return manifest, listing.places


def _read(root: Path, source: ListedSettings) -> Listing:
    with progress_phase("read the lists"):
        return as_on_disk(root, _READERS[type(source)](root, source))


def _place(
    listing: Listing, manifest: Manifest, root: Path, source: ListedSettings
) -> tuple[Manifest, BoxTable | None]:
    """The manifest with the pictures' sizes and notes, and the boxes, if there can be any."""
    if listing.boxes is None or not isinstance(source, VocSettings | CocoSettings | YoloSettings):
        return manifest, None
    with progress_bar(total=len(manifest), desc="sizes", unit="image") as bar:
        return place_boxes(listing, manifest, root, source.box_frame, bar.update)


def _imported_manifest(dataset: str) -> Manifest:
    """The manifest that came with imported regions."""
    command = f"Run `gmpipe import-regions FILE --dataset {dataset}`, which writes it."
    with advising(command, MissingError, DamagedError):
        return read_manifest(manifest_file(dataset))


def _treat_difficult(manifest: Manifest, request: Request) -> Manifest:
    """Let the difficult labels of the manifest on disk count as the settings say."""
    difficult = difficult_settings(request.prepare)
    if manifest.difficult == difficult:
        return manifest
    changed = replace(manifest, difficult=difficult)
    write_manifest(manifest_file(manifest.dataset), changed)
    return changed


def _current_manifest(dataset: str, source: ScenesSettings | ListedSettings) -> Manifest | None:
    """The manifest on disk, if this run would write the same but for `difficult`; else None."""
    root = data_root(dataset)
    try:
        manifest = read_manifest(manifest_file(dataset))
        has_boxes = exists(boxes_file(dataset))
        if has_boxes:
            left_out = read_boxes(boxes_file(dataset), ()).left_out
            if not same_headers(root, left_out):
                return None
    except (MissingError, DamagedError):
        return None
    if isinstance(source, ScenesSettings):
        paths = manifest.table.column("path").to_pylist()
        current = manifest.sources == scenes_sources(source) and bool(find_files(root, paths).all())
    else:
        current = is_current(
            manifest, _read_missing(prepared_folder(dataset) / _MISSING), root, source
        )
    current = current and manifest.dataset == dataset and has_boxes == _gives_boxes(source)
    return manifest if current else None


def _gives_boxes(source: ScenesSettings | ListedSettings) -> bool:
    """Whether a source has annotated boxes."""
    if isinstance(source, VocSettings):
        return source.labels == "annotations"
    return isinstance(source, ScenesSettings | CocoSettings | YoloSettings)


def _write_missing(path: Path, rows: pa.Table) -> None:
    columns = (rows.column(name).to_pylist() for name in _MISSING_COLUMNS)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_MISSING_COLUMNS)
        writer.writerows(zip(*columns, strict=True))


def _read_missing(path: Path) -> list[str]:
    """The paths of the images that were left out; empty if the file is missing or damaged.

    `is_current` compares their number with the manifest's counts.
    """
    try:
        lines = read_bytes(path).decode().splitlines(keepends=True)
        return [path for _, path in list(csv.reader(lines))[1:]]
    except (FileNotFoundError, ValueError, csv.Error):
        return []


# --- what is printed -----------------------------------------------------------------------------


def _counts(manifest: Manifest) -> str:
    """E.g. `240 train, 157 test (3 missing, 1 unlabelled and left out), 20 labels`."""
    parts = []
    for split in manifest.splits:
        counts = manifest.counts[split]
        notes = []
        if counts["missing"]:
            notes.append(f"{counts['missing']} missing")
        if counts["unlabelled"]:
            kept = counts["images"] == counts["listed"] - counts["missing"]
            notes.append(f"{counts['unlabelled']} unlabelled{'' if kept else ' and left out'}")
        parts.append(f"{counts['images']} {split}" + (f" ({', '.join(notes)})" if notes else ""))
    return f"{', '.join(parts)}, {counted(len(manifest.vocabulary), 'label')}"


def _sections(dataset: str, findings: Findings) -> list[str]:
    """The lines of a check that name images."""
    unreadable, refused = (
        [f"{_name(image)}: {reason}" for image, reason in images]
        for images in (findings.unreadable, findings.refused)
    )
    across: list[list[ListedImage]] = []
    within: list[list[ListedImage]] = []
    for group in findings.duplicates:
        (within if len({image.split for image in group}) == 1 else across).append(group)
    missing, unlabelled, doubtful = (
        list(map(_name, images))
        for images in (findings.missing, findings.unlabelled, findings.doubtful)
    )
    return [
        f"{dataset}: {counted(findings.images, 'image')}",
        *_section("missing", len(missing), missing),
        *_section("unreadable", len(unreadable), unreadable),
        *(_section("not readable for this user", len(refused), refused) if refused else []),
        *_section("duplicates across splits", sum(map(len, across)), list(map(_equal, across))),
        *_section("duplicates within a split", sum(map(len, within)), list(map(_equal, within))),
        *_section("unlabelled", len(unlabelled), unlabelled),
        *(
            _section(
                "EXIF can't be read, so the pixels are used as they are stored",
                len(doubtful),
                doubtful,
            )
            if doubtful
            else []
        ),
    ]


def _verdict(
    request: Request, manifest: Manifest, findings: Findings
) -> tuple[list[str], list[str]]:
    """What must be done before `prepare` and `extract` accept the images, and what they allow."""
    dataset, source = request.dataset, request.prepare
    if findings.refused:
        advice = "give your user the right to read these files, or check their disk"
        return [f"To do: {advice}."], []
    if isinstance(source, ScenesSettings | ImportedSettings):
        if not (findings.missing or findings.unreadable):
            return [], []
        command = f"run `gmpipe prepare --dataset {dataset}`"
        return [f"To do: delete {prepared_folder(dataset)}, then {command}."], []
    refusals: list[str] = []
    allowed: list[str] = []
    if findings.missing:
        step, may_be = _missing_step(dataset, source, manifest, findings)
        (allowed if may_be else refusals).append(step)
    most = request.extract.max_failures
    if number := len(findings.unreadable):
        images = counted(number, "unreadable image")
        setting = f"extract.{dataset}.max_failures"
        if number <= most:
            allowed.append(f"Extraction leaves out {images}, as `{setting}: {most}` allows.")
        else:
            refusals.append(
                f"To do: fix the unreadable images, or set `{setting}: {number}` in params.yaml to "
                "continue without them."
            )
    return refusals, allowed


def _missing_step(
    dataset: str, source: ListedSettings, manifest: Manifest, findings: Findings
) -> tuple[str, bool]:
    """What to do about missing images, and whether `prepare` leaves them out."""
    root = data_root(dataset)
    missing = [(image.image_id, image.path) for image in findings.missing]
    lost = Counter(image.split for image in findings.missing)
    empty = [split for split in manifest.splits if lost[split] == manifest.counts[split]["images"]]
    if source.drop_missing and not empty:
        images = counted(len(missing), "missing image")
        setting = f"`prepare.{dataset}.drop_missing: true`"
        hint = locate_missing(root, missing, source) or ""
        return f"`prepare` leaves out {images}, as {setting} says. {hint}".rstrip(), True
    remedy = missing_remedy(dataset, root, missing, source, empty[0] if empty else None)
    return f"To do: {remedy}", False


def _write_findings(path: Path, findings: Findings) -> None:
    """Write the images of a check that the report only counts."""
    rows: list[tuple[str, ListedImage, str]] = [
        *(("missing", image, "") for image in findings.missing),
        *(("unreadable", image, reason) for image, reason in findings.unreadable),
        *(("not readable for this user", image, reason) for image, reason in findings.refused),
        *(("unlabelled", image, "") for image in findings.unlabelled),
    ]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("kind", "image_id", "path", "split", "reason"))
        writer.writerows(
            (kind, image.image_id, image.path, image.split, reason) for kind, image, reason in rows
        )


def _section(title: str, images: int, entries: Sequence[str]) -> list[str]:
    lines = [f"{title}: {images}", *(f"  {entry}" for entry in entries[:_SHOWN])]
    if len(entries) > _SHOWN:
        lines.append(f"  and {len(entries) - _SHOWN} more")
    return lines


def _name(image: ListedImage) -> str:
    name = f"{image.image_id} ({image.split})"
    return name if image.path == image.image_id else f"{name}, {image.path}"


def _equal(group: Sequence[ListedImage]) -> str:
    """The names of images with equal content."""
    names = [_name(image) for image in group[:_SHOWN]]
    if len(group) > _SHOWN:
        names.append(f"{len(group) - _SHOWN} more")
    return " = ".join(names)
