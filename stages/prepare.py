"""Stage `prepare`: from the files of a data set to data/<dataset>/{prepared,settings}/."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tabulate import tabulate

from pipeline.datasets.check import (
    Findings,
    ListedImage,
    check_files,
    similar_labels,
)
from pipeline.datasets.frames import place_boxes
from pipeline.datasets.label_counts import label_counts
from pipeline.datasets.listing import (
    Listing,
    find_files,
    is_current,
    listed_manifest,
    locate_missing,
    make_manifest,
)
from pipeline.datasets.manifest import (
    BoxTable,
    Manifest,
    Split,
    read_boxes,
    read_manifest,
    write_boxes,
    write_manifest,
)
from pipeline.datasets.readers.coco import read_coco
from pipeline.datasets.readers.nuswide import read_nuswide
from pipeline.datasets.readers.table import read_table
from pipeline.datasets.readers.voc import read_voc
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
from pipeline.settings import (
    CocoSettings,
    ImportedSettings,
    ListedSettings,
    NuswideSettings,
    PrepareSettings,
    ScenesSettings,
    TableSettings,
    VocSettings,
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
from stages.console.progress import progress_bar

_READERS: dict[type, Callable[[Path, Any], Listing]] = {
    VocSettings: read_voc,
    CocoSettings: read_coco,
    NuswideSettings: read_nuswide,
    TableSettings: read_table,
}

_MISSING = "missing.csv"  # beside the manifest: the images that were left out without a file
_MISSING_COLUMNS = ("image_id", "path")
_SHOWN = 5  # images or labels that a list names
_MOST_LABELS = 40  # labels of which all are shown; of more, only the rarest are
_RAREST = 10

_WITHOUT_NEGATIVE: dict[Split, str] = {
    "train": "which can't be learned",
    "val": "whose AP is 100 whatever the scores are",
    "test": "whose AP is 100 whatever the scores are",
}
"""The consequence of a label without a known negative in a split."""


def prepare(request: Request) -> str:
    """Write the manifest, unless its sources are unchanged and its images exist.

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
            imported = _imported_manifest(dataset)
            line = f"{folder}: imported, {_counts(imported)}"
            return "\n".join([line, *_labels(request, imported)])
        current = _current_manifest(dataset, source)
        if current is not None:
            line = f"{folder} ({_counts(current)}): unchanged"
            return "\n".join([line, *_labels(request, current)])
        if isinstance(source, ScenesSettings):
            manifest = _draw(dataset, source)
        else:
            manifest = _list(dataset, source)
    record_time(dataset, "prepare", began)
    return "\n".join([f"{folder}: {_counts(manifest)}", *_labels(request, manifest)])


def check(request: Request) -> tuple[str, bool]:
    """Open the header of every image. Nothing is written.

    Returns:
        which images are missing, unreadable, duplicates or unlabelled, and the labels, line by
        line; and whether every image exists and can be read.

    Raises:
        MissingError: files of the data set do not exist.
        InputError: a file breaks its format.
    """
    dataset, source = request.dataset, request.prepare
    root = data_root(dataset)
    if isinstance(source, ImportedSettings):
        manifest = _imported_manifest(dataset)
        line = f"{dataset}: {_counts(manifest)}. Its regions are imported, so it needs no images."
        return "\n".join([line, *_labels(request, manifest)]), True
    if isinstance(source, ScenesSettings):
        manifest = dataset_manifest(dataset)
    else:
        listing = _read(root, source)
        manifest = listed_manifest(listing, dataset, source)
        _place(listing, manifest, root, source)  # which notes what does not fit
    with progress_bar(total=len(manifest), desc="check", unit="image") as bar:
        findings = check_files(manifest, root, bar.update)
    *lines, verdict = _report(dataset, source, findings)
    report = "\n".join([*lines, *_labels(request, manifest), verdict])
    return report, not (findings.missing or findings.unreadable or findings.refused)


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


def _list(dataset: str, source: ListedSettings) -> Manifest:
    """Read the data set's files, and write the manifest, boxes and the missing images."""
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
    return manifest


def _read(root: Path, source: ListedSettings) -> Listing:
    return _READERS[type(source)](root, source)


def _place(
    listing: Listing, manifest: Manifest, root: Path, source: ListedSettings
) -> tuple[Manifest, BoxTable | None]:
    """The manifest with the pictures' sizes, and the boxes, if the data set can have any."""
    if listing.boxes is None or not isinstance(source, VocSettings | CocoSettings):
        return manifest, None
    with progress_bar(total=len(manifest), desc="sizes", unit="image") as bar:
        return place_boxes(listing, manifest, root, source.box_frame, bar.update)


def _imported_manifest(dataset: str) -> Manifest:
    """The manifest that came with imported regions."""
    command = f"Run `gmpipe import-regions FILE --dataset {dataset}`, which writes it."
    with advising(command, MissingError, DamagedError):
        return read_manifest(manifest_file(dataset))


def _current_manifest(dataset: str, source: ScenesSettings | ListedSettings) -> Manifest | None:
    """The manifest on disk, if this run would write the same; None if it would not."""
    root = data_root(dataset)
    try:
        manifest = read_manifest(manifest_file(dataset))
        has_boxes = exists(boxes_file(dataset))
        if has_boxes:
            read_boxes(boxes_file(dataset), ())
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
    return isinstance(source, ScenesSettings | CocoSettings)


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
    return f"{', '.join(parts)}, {len(manifest.vocabulary)} labels"


def _labels(request: Request, manifest: Manifest) -> list[str]:
    """The number of images with each label, and notes on labels that may be wrong."""
    names, counts = manifest.vocabulary, label_counts(manifest)
    train, test = counts["train"].positive, counts["test"].positive
    shown, more = np.arange(len(names)), []
    if len(names) > _MOST_LABELS:
        rarest = np.argsort(train + test, kind="stable")
        shown = rarest[:_RAREST]
        least = int((train + test)[rarest[_RAREST]])
        most = f" ({least} or more images each)" if least else ""
        more = [f"and {len(names) - _RAREST} more labels{most}"]
    rows = [
        [names[label], *(of_split.positive[label] for of_split in counts.values())]
        for label in shown
    ]
    table = tabulate(rows, ["label", *counts], tablefmt="plain", disable_numparse=[0])
    notes = [
        (
            "Labels without a test image, which get no score",
            [names[label] for label in np.flatnonzero(test == 0)],
        ),
        (
            "Labels with fewer than 2 training images, which can hardly be learned",
            [names[label] for label in np.flatnonzero(train < 2)],
        ),
        *(
            (
                f"Labels that every {split} image has or ignores, {_WITHOUT_NEGATIVE[split]}",
                [names[label] for label in np.flatnonzero(of_split.without_negative)],
            )
            for split, of_split in counts.items()
            if manifest.counts[split]["images"] > 1
        ),
        (
            "Labels that may be two spellings of one label",
            [f"{first!r} and {second!r}" for first, second in similar_labels(names)],
        ),
    ]
    lines = [f"Note: {title}: {_first_few(labels)}" for title, labels in notes if labels]
    if isinstance(request.prepare, TableSettings):
        for mark in "|,/":
            containing = sum(mark in name for name in names)
            if containing > len(names) / 2 and mark != request.prepare.separator:
                lines.append(
                    f"Note: {containing} of {len(names)} labels contain {mark!r}. If it separates "
                    f'labels, set `prepare.{request.dataset}.separator: "{mark}"`.'
                )
    return [*table.splitlines(), *more, *lines]


def _first_few(names: Sequence[str]) -> str:
    rest = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *rest])


def _report(dataset: str, source: PrepareSettings, findings: Findings) -> list[str]:
    """The lines of a check; the last says whether all is well, or what to do."""
    unreadable, refused = (
        [f"{_name(image)}: {reason}" for image, reason in images]
        for images in (findings.unreadable, findings.refused)
    )
    across: list[list[ListedImage]] = []
    within: list[list[ListedImage]] = []
    for group in findings.duplicates:
        (within if len({image.split for image in group}) == 1 else across).append(group)
    lines = [
        f"{dataset}: {findings.images} images",
        *_section("missing", len(findings.missing), [_name(image) for image in findings.missing]),
        *_section("unreadable", len(unreadable), unreadable),
        *(_section("not readable for this user", len(refused), refused) if refused else []),
        *_section(
            "duplicates across train and test", sum(map(len, across)), list(map(_equal, across))
        ),
        *_section("duplicates within a split", sum(map(len, within)), list(map(_equal, within))),
        *_section(
            "unlabelled",
            len(findings.unlabelled),
            [_name(image) for image in findings.unlabelled],
        ),
    ]
    if refused:
        steps = "give your user the right to read these files, or check their disk"
    elif not (findings.missing or findings.unreadable):
        return [*lines, "Every image exists and can be read."]
    elif isinstance(source, ScenesSettings):
        steps = f"delete {prepared_folder(dataset)}, then run `gmpipe prepare --dataset {dataset}`"
    else:
        steps = _steps(dataset, source, findings)
    return [*lines, f"To do: {steps}."]


def _steps(dataset: str, source: PrepareSettings, findings: Findings) -> str:
    """What to do about missing and unreadable images that are not drawn."""
    steps = []
    if findings.missing:
        step = f"put the missing images below {data_root(dataset)}"
        if len(findings.missing) < findings.images:
            step += f", or set `prepare.{dataset}.drop_missing: true` in params.yaml"
            step += " to leave them out"
        steps.append(step)
    if findings.unreadable:
        steps.append(
            "fix the unreadable images, or set "
            f"`extract.{dataset}.max_failures: {len(findings.unreadable)}` in params.yaml to "
            "continue without them"
        )
    if findings.missing and not isinstance(source, ScenesSettings | ImportedSettings):
        missing = [(image.image_id, image.path) for image in findings.missing]
        hint = locate_missing(data_root(dataset), missing, source)
        if hint is not None:
            steps.append(f"{hint[0].lower()}{hint[1:].removesuffix('.')}")
    return "; ".join(steps)


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
