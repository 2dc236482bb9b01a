"""From the files of a data set to its manifest.

An adapter (`voc`, `coco`, `nuswide`, `table`) reads one layout of files into a `Listing`. What all
adapters have in common happens here: which images exist, which are left out, and the counts.

Letters: N listed images, n annotated objects.
"""

from __future__ import annotations

import codecs
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.manifest import (
    Manifest,
    full_counts,
    splits_of,
    unlabelled_rows,
)
from pipeline.errors import InputError, MissingError
from pipeline.files import access_error, open_regular, sha256_file, sha256_json
from pipeline.settings import ListedSettings, NuswideSettings, TableSettings

LISTING_VERSION = 2
"""Part of the settings' hash: raise it when the same files would give another listing."""

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors that say that a file does not exist. Parts of names come from lists, and may be long."""

_LONGEST_PATH = 4096  # bytes, as Linux allows
_LONGEST_LABEL = 1000  # characters

_MOST_LOOKED_AT = 200_000
"""Files among which a missing image is searched: more would take minutes on a network disk."""


@dataclass(frozen=True)
class ListedBoxes:
    """The n annotated objects of a listing, in the pixels of the picture they were drawn on.

    `pipeline.datasets.frames` finds out which picture that is, and places them in the upright one.

    Attributes:
        rows: (n,) int64, the row of each object's image in `Listing.table`.
        classes: (n,) int64, class numbers from 1.
        pixels: (n, 4) float64, xyxy from the upper left corner; nan for an object without a box.
    """

    rows: np.ndarray
    classes: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Listing:
    """Every image that a data set's files list, whether it exists or not.

    Attributes:
        vocabulary: the C label names, in the data set's order.
        split_name: name of the division into train and test, e.g. ``official``.
        sources: what the listing was read from: file or folder relative to the data set's root ->
            sha256 (see `hash_sources`). `make_manifest` adds ``settings``.
        table: one row per image, with the columns of `manifest.COLUMNS`; paths are relative to the
            data set's root. Sizes are those that the files give, null where they give none.
        boxes: the annotated objects, if the files can have boxes. Class 1 is the first label.
    """

    vocabulary: tuple[str, ...]
    split_name: str
    sources: dict[str, str]
    table: pa.Table = field(repr=False)
    boxes: ListedBoxes | None = field(default=None, repr=False)


# --- for adapters --------------------------------------------------------------------------------


@contextmanager
def open_source(path: Path, remedy: str) -> Iterator[BufferedReader]:
    """Open a file that a data set needs.

    Args:
        remedy: where to get the file.

    Raises:
        MissingError: the file does not exist.
        InputError: it is no regular file.
        OSError: the system can't read it.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open_regular(path))
        except InputError as error:
            raise InputError(error.problem, remedy) from None
        except (OSError, ValueError) as error:  # ValueError: a null byte is in the name
            if isinstance(error, OSError) and error.errno not in _NO_FILE:
                raise
            raise MissingError(f"{path} does not exist.", remedy) from None
        yield stream


def read_source(path: Path, remedy: str) -> bytes:
    """Read a file that a data set needs; arguments and errors as for `open_source`."""
    with open_source(path, remedy) as stream:
        return stream.read()


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """Read the lines of a text file that are not blank, stripped, with their numbers from 1.

    Raises:
        MissingError, InputError, OSError: as `read_source`, or the file is not UTF-8.
    """
    content = read_source(path, remedy).removeprefix(codecs.BOM_UTF8)
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {number}: the text is not UTF-8.", remedy) from None
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line]


def hash_sources(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Hex sha256 of files below ``root``; of a folder, over the names and hashes of its files."""
    digests = {}
    for name in names:
        path = root / name
        if path.is_dir():
            digests[name] = sha256_json(
                {f.name: sha256_file(f) for f in path.iterdir() if f.is_file()}
            )
        else:
            digests[name] = sha256_file(path)
    return digests


# --- what all listed data sets share -------------------------------------------------------------


def check_lengths(table: pa.Table, vocabulary: Sequence[str], name: str) -> None:
    """Refuse ids, paths and labels of such a length that they must be a mistake.

    Args:
        table: with the columns of `manifest.COLUMNS`.
        vocabulary: the labels.
        name: of the data set or the file, for the message.

    Raises:
        InputError: the first that is too long, with its row.
    """
    for column in ("image_id", "path"):
        lengths = pc.binary_length(table.column(column))
        row = pc.index(pc.greater(lengths, _LONGEST_PATH), True).as_py()
        if row >= 0:
            found = table.column(column)[row].as_py()
            raise InputError(
                f"{name}, row {row}: the {column} {found[:100]!r}... has {lengths[row]} bytes, "
                f"expected at most {_LONGEST_PATH}.",
                "Fix the files that the data set is read from.",
            )
    for label in vocabulary:
        if len(label) > _LONGEST_LABEL:
            raise InputError(
                f"{name}: the label {label[:100]!r}... has {len(label)} characters, expected at "
                f"most {_LONGEST_LABEL}.",
                "Fix the files that the data set is read from, or the separator of labels.",
            )


def listed_manifest(listing: Listing, dataset: str, settings: ListedSettings) -> Manifest:
    """Make a manifest of all N listed images, as if every one existed. Its rows are checked."""
    check_lengths(listing.table, listing.vocabulary, dataset)
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
    """Make the manifest of the listed images that exist and that the settings keep.

    Args:
        listing: every image.
        dataset: its name in params.yaml.
        root: the folder that paths are relative to.
        settings: whether missing and unlabelled images are left out.

    Returns:
        the manifest; and the rows of `Listing.table` whose image is missing.

    Raises:
        InputError: a listed row breaks the manifest's contract, or a split has no image left.
        MissingError: images are missing and may not be left out.
    """
    listed = listed_manifest(listing, dataset, settings)
    table = listed.table
    exists = find_files(root, table.column("path").to_pylist())
    missing = table.filter(pa.array(~exists))
    if missing.num_rows and not settings.drop_missing:
        raise _missing_images(listed, missing, root, settings)
    unlabelled = exists & unlabelled_rows(table)
    kept = exists & ~unlabelled if settings.drop_unlabelled else exists
    counts: dict[str, dict[str, int]] = {}
    split_column = np.asarray(table.column("split"))
    for split in splits_of(table):
        rows = split_column == split
        counts[split] = {
            "listed": int(rows.sum()),
            "missing": int((rows & ~exists).sum()),
            "unlabelled": int((rows & unlabelled).sum()),
            "images": int((rows & kept).sum()),
        }
        if not counts[split]["images"]:
            raise InputError(
                f"{dataset}: none of the {counts[split]['listed']} listed images of the split "
                f"{split!r} is left. {counts[split]['missing']} are missing below {root}, and "
                f"{counts[split]['unlabelled']} have no label.",
                f"Put the images there, or change `prepare.{dataset}` in params.yaml."
                f"{_location_hint(root, missing, settings)}",
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


def _missing_images(
    listed: Manifest, missing: pa.Table, root: Path, settings: ListedSettings
) -> MissingError:
    """The error about images that may not be left out; ``missing`` has their rows."""
    first = missing.slice(0, 1).to_pylist()[0]
    remedy = f"Put it at {root / first['path']}, and the others accordingly"
    if missing.num_rows < len(listed):
        remedy += (
            f", or set `prepare.{listed.dataset}.drop_missing: true` in params.yaml to leave them "
            "out; they are then counted, and listed in missing.csv beside the manifest"
        )
    return MissingError(
        f"{missing.num_rows} of {len(listed)} images that {listed.dataset} lists are missing. The "
        f"first is {first['image_id']!r}.",
        f"{remedy}.{_location_hint(root, missing, settings)}",
    )


def is_current(
    manifest: Manifest, missing: Sequence[str], root: Path, settings: ListedSettings
) -> bool:
    """Whether `make_manifest` would make this manifest again.

    The hashes of sources and settings must be equal, every image of the manifest must exist, and
    none of the ``missing`` paths. Unlabelled images that were left out are not looked for.
    """
    expected = manifest.sources
    if expected.get("settings") != _settings_sha256(settings):
        return False
    files = {name: digest for name, digest in expected.items() if name != "settings"}
    try:
        if hash_sources(root, files) != files:
            return False
    except OSError:  # reading the listing says what is wrong
        return False
    return (
        sum(counts["missing"] for counts in manifest.counts.values()) == len(missing)
        and bool(find_files(root, manifest.table.column("path").to_pylist()).all())
        and not find_files(root, missing).any()
    )


def find_files(root: Path, paths: Sequence[str]) -> np.ndarray:
    """(N,) bool: which of the paths below ``root`` are files.

    Every folder is listed once. Asking the file system about each of 270,000 images would take
    minutes on a network disk.

    Raises:
        InputError: a folder can't be read.
    """
    names: dict[str, set[str]] = {}
    exists = np.zeros(len(paths), dtype=bool)
    for row, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        if folder not in names:
            names[folder] = file_names(root / folder)
        exists[row] = name in names[folder]
    return exists


def locate_missing(
    root: Path, missing: Sequence[tuple[str, str]], settings: ListedSettings
) -> str | None:
    """Search for files that have the name of a missing image, in upper or lower case.

    Args:
        root: the data set's root. It is searched with linked folders, up to some 200,000 files.
        missing: image id and path of each missing image, in order.

    Returns:
        a sentence that says where the first image with such a file is, and what to change; None
        if there is no such file.
    """
    rows: dict[str, int] = {}
    for row, (_, path) in enumerate(missing):
        rows.setdefault(path.rpartition("/")[2].casefold(), row)
    located = _first_located(root, rows)
    if located is None:
        return None
    row, relative = located
    image_id, path = missing[row]
    location = f"There is a file {root / relative}"
    if relative.casefold() == path.casefold():
        return (
            f"{location}, but the list has {path!r}: correct upper and lower case in the list, or "
            "in the file's name."
        )
    folder, id_part, rest = f"/{relative}".casefold().rpartition(f"/{image_id}".casefold())
    if id_part and not rest and isinstance(settings, TableSettings | NuswideSettings):
        images = relative[: max(len(folder) - 1, 0)] or "."
        return f"{location}: set `prepare.{root.name}.images: {images}` in params.yaml."
    return f"{location}: correct the path in the list, or move the file."


def _first_located(root: Path, rows: dict[str, int]) -> tuple[int, str] | None:
    """The lowest row whose file name exists below ``root``, and the file's path there.

    Args:
        rows: file name in lower case -> row of the missing image.
    """
    first: tuple[int, str] | None = None
    visited = {root.resolve()}  # a link can lead in circles
    looked_at = 0
    for folder, folders, names in os.walk(root, followlinks=True) if rows else ():
        resolved = {name: (Path(folder) / name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, target in resolved.items() if target not in visited]
        visited.update(resolved.values())
        for name in sorted(names):
            row = rows.get(name.casefold())
            if row is not None and (first is None or row < first[0]):
                first = row, (Path(folder) / name).relative_to(root).as_posix()
        looked_at += len(names) + 1
        if looked_at > _MOST_LOOKED_AT or (first is not None and first[0] == 0):
            break
    return first


def _location_hint(root: Path, missing: pa.Table, settings: ListedSettings) -> str:
    """`locate_missing` for rows of `Listing.table`, after a blank; empty if there is no file."""
    images = (missing.column(name).to_pylist() for name in ("image_id", "path"))
    hint = locate_missing(root, list(zip(*images, strict=True)), settings)
    return "" if hint is None else f" {hint}"


def file_names(folder: Path) -> set[str]:
    """The names of the files in a folder; empty if there is no such folder.

    Raises:
        InputError: the folder can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except ValueError:  # a null byte, which no folder's name has
        return set()
    except OSError as error:
        raise access_error(error, folder) from error


def _settings_sha256(settings: ListedSettings) -> str:
    return sha256_json({"version": LISTING_VERSION, **settings.model_dump()})
