"""What the files of a data set say -> its manifest.

An adapter (`voc`, `coco`, `nuswide`, `table`) reads one layout of files into a `Listing`. What all
of them have in common happens here: which images are there, which are left out, and how many.

Letters: N listed images, n boxes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.datasets.manifest import (
    SPLITS,
    BoxTable,
    Manifest,
    full_counts,
    unlabelled_rows,
)
from pipeline.errors import GmpipeError
from pipeline.files import sha256_file, sha256_json
from pipeline.settings import ListedSettings, NuswideSettings, TableSettings

LISTING_VERSION = 1
"""Part of the settings' hash: raise it when the same files would be listed otherwise."""

_MOST_LOOKED_AT = 200_000
"""Files among which a missing image is looked for: more would take minutes on a far disk."""


@dataclass(frozen=True)
class Listing:
    """Every image that a data set's files list, before any of them is looked for.

    Attributes:
        vocabulary: the C label names, in the data set's order.
        split_name: which division into train and test this is, e.g. ``official``.
        sources: what the listing was read from, file or folder relative to the data set's root ->
            sha256 (see `hash_sources`); `make_manifest` adds ``settings``.
        table: a row an image, with the columns of `manifest.COLUMNS`; paths relative to the data
            set's root.
        boxes: the annotated objects, where the files have any.
    """

    vocabulary: tuple[str, ...]
    split_name: str
    sources: dict[str, str]
    table: pa.Table = field(repr=False)
    boxes: BoxTable | None = field(default=None, repr=False)


# --- for adapters --------------------------------------------------------------------------------


def read_source(path: Path, remedy: str) -> bytes:
    """The bytes of a file that a data set needs.

    Raises:
        GmpipeError: there is no such file, or it can't be read; ends with ``remedy``.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise GmpipeError(f"there is no {path}. {remedy}") from None
    except OSError as error:
        raise GmpipeError(f"{path} can't be read ({error.strerror}). {remedy}") from error


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, with their numbers from 1.

    Raises:
        GmpipeError: as `read_source`, or the file is not UTF-8.
    """
    content = read_source(path, remedy)
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise GmpipeError(f"{path}, line {number}: not UTF-8 text. {remedy}") from None
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line]


def hash_sources(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Hex sha256 of files below ``root``; of a folder, over its files' names and hashes."""
    found = {}
    for name in names:
        path = root / name
        if path.is_dir():
            found[name] = sha256_json(
                {f.name: sha256_file(f) for f in path.iterdir() if f.is_file()}
            )
        else:
            found[name] = sha256_file(path)
    return found


def unit_boxes(pixels: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in pixels -> boxes in [0,1] of their image, clipped to it.

    Args:
        pixels: (n, 4), xyxy, in pixels from the image's upper left corner.
        sizes: (n, 2), width and height of each box's image.

    Returns:
        (n, 4) float32, xyxy in [0,1]; and (n,) bool: which of them cover any of the image.
    """
    boxes = np.clip(pixels / np.tile(sizes, 2), 0, 1).astype(np.float32)
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


# --- what all listed data sets share -------------------------------------------------------------


def listed_manifest(listing: Listing, dataset: str, settings: ListedSettings) -> Manifest:
    """The manifest of all N listed images, as if every one were there; its rows are checked."""
    return Manifest(
        dataset=dataset,
        split_name=listing.split_name,
        vocabulary=listing.vocabulary,
        sources={**listing.sources, "settings": _settings_sha256(settings)},
        counts=full_counts(listing.table),
        table=listing.table,
    )


def make_manifest(
    listing: Listing, dataset: str, root: Path, settings: ListedSettings
) -> tuple[Manifest, pa.Table]:
    """The manifest of the listed images that are there and wanted.

    Args:
        listing: every image.
        dataset: its name in params.yaml.
        root: the folder that paths are relative to.
        settings: whether missing and unlabelled images are left out.

    Returns:
        the manifest; and the rows of `Listing.table` whose image is missing.

    Raises:
        GmpipeError: a listed row breaks the manifest's contract, images are missing and may not be
            left out, or a split has no image left.
    """
    listed = listed_manifest(listing, dataset, settings)
    table = listed.table
    there = find_files(root, table.column("path").to_pylist())
    missing = table.filter(pa.array(~there))
    if missing.num_rows and not settings.drop_missing:
        first = missing.slice(0, 1).to_pylist()[0]
        step = f"Put it at {root / first['path']} and the others likewise"
        if there.any():
            step += (
                f", or set `prepare.{dataset}.drop_missing: true` in params.yaml: then they are "
                "left out, counted, and listed in missing.csv beside the manifest"
            )
        raise GmpipeError(
            f"{missing.num_rows} of {len(listed)} images that {dataset} lists are missing; the "
            f"first is {first['image_id']!r}. {step}.{_clue(root, missing, settings)}"
        )
    unlabelled = there & unlabelled_rows(table)
    kept = there & ~unlabelled if settings.drop_unlabelled else there
    counts: dict[str, dict[str, int]] = {}
    split_column = np.asarray(table.column("split"))
    for split in SPLITS:
        rows = split_column == split
        counts[split] = {
            "listed": int(rows.sum()),
            "missing": int((rows & ~there).sum()),
            "unlabelled": int((rows & unlabelled).sum()),
            "images": int((rows & kept).sum()),
        }
        if not counts[split]["images"]:
            raise GmpipeError(
                f"{dataset}: of {counts[split]['listed']} listed images of the split {split!r} "
                f"none is left; {counts[split]['missing']} are missing below {root} and "
                f"{counts[split]['unlabelled']} have no label. Put the images there, or change "
                f"`prepare.{dataset}` in params.yaml.{_clue(root, missing, settings)}"
            )
    manifest = Manifest(
        dataset=dataset,
        split_name=listed.split_name,
        vocabulary=listed.vocabulary,
        sources=listed.sources,
        counts=counts,
        table=table.filter(pa.array(kept)),
    )
    return manifest, missing


def is_current(
    manifest: Manifest, missing: Sequence[str], root: Path, settings: ListedSettings
) -> bool:
    """Whether `make_manifest` would make this manifest again.

    Sources and settings are compared by their hashes, and every image of the manifest is looked
    for, and every one of the ``missing`` paths. Unlabelled images that were left out are not.
    """
    expected = manifest.sources
    if expected.get("settings") != _settings_sha256(settings):
        return False
    files = {name: digest for name, digest in expected.items() if name != "settings"}
    try:
        if hash_sources(root, files) != files:
            return False
    except OSError:  # the reading of the listing says what is wrong
        return False
    return (
        sum(counts["missing"] for counts in manifest.counts.values()) == len(missing)
        and bool(find_files(root, manifest.table.column("path").to_pylist()).all())
        and not find_files(root, missing).any()
    )


def find_files(root: Path, paths: Sequence[str]) -> np.ndarray:
    """(N,) bool: which of the paths below ``root`` are files.

    Every folder is listed once: a question to the file system for each of 270,000 images takes
    minutes where the disk is far.

    Raises:
        GmpipeError: a folder can't be listed.
    """
    names: dict[str, set[str]] = {}
    there = np.zeros(len(paths), dtype=bool)
    for place, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        if folder not in names:
            names[folder] = _file_names(root / folder)
        there[place] = name in names[folder]
    return there


def elsewhere(
    root: Path, missing: Sequence[tuple[str, str]], settings: ListedSettings
) -> str | None:
    """Where a file of a missing image's name lies, in upper or lower case, and what to do then.

    Args:
        root: the data set's; looked through with linked folders, up to some 200,000 files.
        missing: image id and path of each missing image, in order.

    Returns:
        a sentence about the first that is found; None if none is.
    """
    wanted: dict[str, int] = {}
    for place, (_, path) in enumerate(missing):
        wanted.setdefault(path.rpartition("/")[2].casefold(), place)
    found: tuple[int, str] | None = None
    known = {root.resolve()}  # a link can lead in circles
    looked_at = 0
    for folder, folders, names in os.walk(root, followlinks=True) if wanted else ():
        places = {name: (Path(folder) / name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, resolved in places.items() if resolved not in known]
        known.update(places.values())
        for name in sorted(names):
            hit = wanted.get(name.casefold())
            if hit is not None and (found is None or hit < found[0]):
                found = hit, (Path(folder) / name).relative_to(root).as_posix()
        looked_at += len(names) + 1
        if looked_at > _MOST_LOOKED_AT or (found is not None and found[0] == 0):
            break
    if found is None:
        return None
    image_id, path = missing[found[0]]
    if found[1].casefold() == path.casefold():
        return (
            f"There is {root / found[1]}, listed as {path!r}: correct upper and lower case in the "
            "list, or in the file's name."
        )
    folder, of_id, rest = f"/{found[1]}".casefold().rpartition(f"/{image_id}".casefold())
    if of_id and not rest and isinstance(settings, TableSettings | NuswideSettings):
        images = found[1][: max(len(folder) - 1, 0)] or "."
        return f"There is {root / found[1]}: set `prepare.{root.name}.images: {images}`."
    return f"There is {root / found[1]}: correct the path in the list, or move the file."


def _clue(root: Path, missing: pa.Table, settings: ListedSettings) -> str:
    """`elsewhere`, of rows of `Listing.table`, behind a blank; empty if there is nothing."""
    images = (missing.column(name).to_pylist() for name in ("image_id", "path"))
    found = elsewhere(root, list(zip(*images, strict=True)), settings)
    return "" if found is None else f" {found}"


def _file_names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except ValueError:  # a null byte: no folder has such a name
        return set()
    except OSError as error:
        raise GmpipeError(
            f"the folder {folder} can't be listed ({error.strerror}). Mend it or its permissions."
        ) from error


def _settings_sha256(settings: ListedSettings) -> str:
    return sha256_json({"version": LISTING_VERSION, **settings.model_dump()})
