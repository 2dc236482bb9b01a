"""Stage `prepare`: the files of the world -> data/<dataset>/prepared/."""

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
    label_counts,
    similar_labels,
)
from pipeline.datasets.coco import read_coco
from pipeline.datasets.listing import (
    Listing,
    elsewhere,
    find_files,
    is_current,
    listed_manifest,
    make_manifest,
)
from pipeline.datasets.manifest import (
    SPLITS,
    Manifest,
    read_boxes,
    read_manifest,
    write_boxes,
    write_manifest,
)
from pipeline.datasets.nuswide import read_nuswide
from pipeline.datasets.scenes import make_scenes, scenes_sources
from pipeline.datasets.table import read_table
from pipeline.datasets.voc import read_voc
from pipeline.errors import GmpipeError
from pipeline.files import folder_lock, replacing, replacing_folder
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
from stages.checkout.layout import boxes_file, data_root, manifest_file, prepared_folder
from stages.checkout.params import Request
from stages.checkout.times import record_time
from stages.console.progress import progress_bar

_READERS: dict[type, Callable[[Path, Any], Listing]] = {
    VocSettings: read_voc,
    CocoSettings: read_coco,
    NuswideSettings: read_nuswide,
    TableSettings: read_table,
}

_MISSING = "missing.csv"  # beside the manifest: which images were left out, having no file
_MISSING_COLUMNS = ("image_id", "path")
_SHOWN = 5  # images or labels of a kind that are named
_MOST_LABELS = 40  # in a whole table of labels; of more, the rarest are shown
_RAREST = 10


def prepare(request: Request) -> str:
    """Write the manifest, unless it is of the same sources and what it names is there.

    Returns:
        a line that says what was done; the labels with their counts, and what is odd about them.

    Raises:
        GmpipeError: the data set's files are missing or break their format, images are missing and
            may not be left out, or the regions of an imported data set are not imported yet.
    """
    began = time.monotonic()
    dataset, source = request.dataset, request.prepare
    folder = prepared_folder(dataset)
    if isinstance(source, ImportedSettings):
        imported = _imported_manifest(dataset)
        return "\n".join([f"{folder}: imported, {_counts(imported)}", *_labels(request, imported)])
    with folder_lock(folder):
        manifest = _current_manifest(dataset, source)
        if manifest is not None:
            said = f"{folder} ({_counts(manifest)}): unchanged"
            return "\n".join([said, *_labels(request, manifest)])
        if isinstance(source, ScenesSettings):
            manifest = _draw(dataset, source)
        else:
            manifest = _list(dataset, source)
    record_time(dataset, "prepare", began)
    return "\n".join([f"{folder}: {_counts(manifest)}", *_labels(request, manifest)])


def check(request: Request) -> tuple[str, bool]:
    """Open every image's header; nothing is written.

    Returns:
        what is missing, unreadable, duplicate and unlabelled, and the labels, line by line; and
        whether every image is there and can be read.

    Raises:
        GmpipeError: the data set's files are missing or break their format.
    """
    dataset, source = request.dataset, request.prepare
    root = data_root(dataset)
    if isinstance(source, ImportedSettings):
        manifest = _imported_manifest(dataset)
        said = (
            f"{dataset}: {_counts(manifest)}; its regions are imported, and no photograph is needed"
        )
        return "\n".join([said, *_labels(request, manifest)]), True
    if isinstance(source, ScenesSettings):
        manifest = read_manifest(manifest_file(dataset))
    else:
        manifest = listed_manifest(_read(root, source), dataset, source)
    with progress_bar(total=len(manifest), desc="check", unit="image") as bar:
        found = check_files(manifest, root, bar.update)
    *lines, verdict = _report(dataset, source, found)
    said = "\n".join([*lines, *_labels(request, manifest), verdict])
    return said, not (found.missing or found.unreadable)


# --- what is made --------------------------------------------------------------------------------


def _draw(dataset: str, source: ScenesSettings) -> Manifest:
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
    root = data_root(dataset)
    listing = _read(root, source)
    manifest, missing = make_manifest(listing, dataset, root, source)
    with replacing_folder(prepared_folder(dataset)) as temporary:
        if listing.boxes is not None:
            write_boxes(temporary / boxes_file(dataset).name, listing.boxes)
        if missing.num_rows:
            _write_missing(temporary / _MISSING, missing)
        write_manifest(temporary / manifest_file(dataset).name, manifest)
    return manifest


def _read(root: Path, source: ListedSettings) -> Listing:
    return _READERS[type(source)](root, source)


def _imported_manifest(dataset: str) -> Manifest:
    path = manifest_file(dataset)
    remedy = f"Run `gmpipe import-regions FILE --dataset {dataset}` to write it."
    if not path.exists():
        raise GmpipeError(
            f"there is no manifest at {path}: the manifest of {dataset} comes with its regions. "
            f"{remedy}"
        )
    return read_manifest(path, remedy)


def _current_manifest(dataset: str, source: ScenesSettings | ListedSettings) -> Manifest | None:
    """The manifest that is there, if this run would write the same."""
    root = data_root(dataset)
    try:
        manifest = read_manifest(manifest_file(dataset))
        has_boxes = boxes_file(dataset).exists()
        if has_boxes:
            read_boxes(boxes_file(dataset), ())
    except GmpipeError:
        return None
    if isinstance(source, ScenesSettings):
        paths = manifest.table.column("path").to_pylist()
        same = manifest.sources == scenes_sources(source) and bool(find_files(root, paths).all())
    else:
        same = is_current(
            manifest, _read_missing(prepared_folder(dataset) / _MISSING), root, source
        )
    same = same and manifest.dataset == dataset and has_boxes == _gives_boxes(source)
    return manifest if same else None


def _gives_boxes(source: ScenesSettings | ListedSettings) -> bool:
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
    """The paths of the images that were left out; none where the file is missing or damaged.

    The manifest's counts say how many there must be.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return [path for _, path in list(csv.reader(stream))[1:]]
    except (OSError, ValueError, csv.Error):
        return []


# --- what is said --------------------------------------------------------------------------------


def _counts(manifest: Manifest) -> str:
    """E.g. `240 train, 157 test (3 missing, 1 unlabelled and left out), 20 labels`."""
    parts = []
    for split in SPLITS:
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
    """How many images have each label, and notes on what may be wrong with labels."""
    names, counts = manifest.vocabulary, label_counts(manifest)
    train, test = (counts[split] for split in SPLITS)
    shown, more = np.arange(len(names)), []
    if len(names) > _MOST_LABELS:
        rarest = np.argsort(train + test, kind="stable")
        shown = rarest[:_RAREST]
        least = int((train + test)[rarest[_RAREST]])
        more = [f"and {len(names) - _RAREST} labels more, each of {least} images at least"]
    rows = [[names[place], train[place], test[place]] for place in shown]
    table = tabulate(rows, ["label", *SPLITS], tablefmt="plain", disable_numparse=[0])
    notes = [
        ("without an image in test, so not scored", [names[p] for p in np.flatnonzero(test == 0)]),
        (
            "with fewer than 2 images in train, so hardly learned",
            [names[place] for place in np.flatnonzero(train < 2)],
        ),
        (
            "that may be one, spelled in two ways",
            [f"{one!r} and {other!r}" for one, other in similar_labels(names)],
        ),
    ]
    lines = [f"note: labels {title}: {_some(found)}" for title, found in notes if found]
    if isinstance(request.prepare, TableSettings):
        for mark in "|,/":
            holding = sum(mark in name for name in names)
            if holding > len(names) / 2 and mark != request.prepare.separator:
                lines.append(
                    f"note: {holding} of {len(names)} labels contain {mark!r}. Is that what "
                    f'separates labels? Then set `prepare.{request.dataset}.separator: "{mark}"`.'
                )
    return [*table.splitlines(), *more, *lines]


def _some(names: Sequence[str]) -> str:
    rest = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *rest])


def _report(dataset: str, source: PrepareSettings, found: Findings) -> list[str]:
    unreadable = [f"{_name(image)}: {reason}" for image, reason in found.unreadable]
    across: list[list[ListedImage]] = []
    within: list[list[ListedImage]] = []
    for group in found.duplicates:
        (within if len({image.split for image in group}) == 1 else across).append(group)
    lines = [
        f"{dataset}: {found.images} images are listed",
        *_section("missing", len(found.missing), [_name(image) for image in found.missing]),
        *_section("unreadable", len(unreadable), unreadable),
        *_section(
            "duplicates, with an image in train and one in test",
            sum(map(len, across)),
            [_alike(group) for group in across],
        ),
        *_section(
            "duplicates within a split", sum(map(len, within)), [_alike(group) for group in within]
        ),
        *_section(
            "unlabelled", len(found.unlabelled), [_name(image) for image in found.unlabelled]
        ),
    ]
    if not (found.missing or found.unreadable):
        return [*lines, "Every image is there and can be read."]
    if isinstance(source, ScenesSettings):
        step = f"delete {prepared_folder(dataset)} and run `gmpipe prepare --dataset {dataset}`"
    else:
        step = _steps(dataset, source, found)
    return [*lines, f"To do: {step}."]


def _steps(dataset: str, source: PrepareSettings, found: Findings) -> str:
    """What to do about missing and unreadable images that are not drawn."""
    steps = []
    if found.missing:
        step = f"put the missing images below {data_root(dataset)}"
        if len(found.missing) < found.images:
            step += f", or leave them out: `prepare.{dataset}.drop_missing: true` in params.yaml"
        steps.append(step)
    if found.unreadable:
        steps.append(
            "mend the unreadable images, or go on without them: "
            f"`extract.{dataset}.max_failures: {len(found.unreadable)}` in params.yaml"
        )
    if found.missing and not isinstance(source, ScenesSettings | ImportedSettings):
        missing = [(image.image_id, image.path) for image in found.missing]
        clue = elsewhere(data_root(dataset), missing, source)
        if clue is not None:
            steps.append(f"{clue[0].lower()}{clue[1:].removesuffix('.')}")
    return "; ".join(steps)


def _section(title: str, images: int, entries: Sequence[str]) -> list[str]:
    lines = [f"{title}: {images}", *(f"  {entry}" for entry in entries[:_SHOWN])]
    if len(entries) > _SHOWN:
        lines.append(f"  and {len(entries) - _SHOWN} more")
    return lines


def _name(image: ListedImage) -> str:
    name = f"{image.image_id} ({image.split})"
    return name if image.path == image.image_id else f"{name}, {image.path}"


def _alike(group: Sequence[ListedImage]) -> str:
    names = [_name(image) for image in group[:_SHOWN]]
    if len(group) > _SHOWN:
        names.append(f"{len(group) - _SHOWN} more")
    return " = ".join(names)
