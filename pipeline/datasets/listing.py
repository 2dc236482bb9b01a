"""From the files of a data set to its manifest.

An adapter (`voc`, `coco`, `yolo`, `nuswide`, `table`) reads one layout of files into a `Listing`.
What all adapters have in common happens here: which images exist, which are left out, and the
counts.

Letters: N listed images, n annotated objects.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.disk import Disk, note_on_names
from pipeline.datasets.manifest import (
    REQUIRED_SPLITS,
    Manifest,
    Split,
    full_counts,
    repeats,
    splits_of,
    unlabelled_rows,
)
from pipeline.datasets.missing import locate_missing, missing_remedy
from pipeline.errors import InputError, MissingError
from pipeline.files import open_regular, sha256_file, sha256_json
from pipeline.formats.encodings import not_utf8
from pipeline.formats.text import composed
from pipeline.images import files_below, suffixes
from pipeline.settings import ListedSettings, TableSettings, difficult_settings

LISTING_VERSION = 3
"""Part of the settings' hash: raise it when the same files would give another listing."""

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors that say that a file does not exist. Parts of names come from lists, and may be long."""

_LONGEST_PATH = 4096  # bytes, as Linux allows
_LONGEST_LABEL = 1000  # characters


@dataclass(frozen=True)
class ListedBoxes:
    """The n annotated objects of a listing, in the pixels of the picture they were drawn on.

    `pipeline.datasets.frames` finds out which picture that is, and places them in the upright one.

    Attributes:
        rows: (n,) int64, the row of each object's image in `Listing.table`.
        classes: (n,) int64, class numbers from 1.
        pixels: (n, 4) float64, xyxy from the upper left corner; nan for an object without a box.
        relative: (n,) bool, which boxes are in [0,1] of the picture instead of pixels; None for
            none of them.
    """

    rows: np.ndarray
    classes: np.ndarray
    pixels: np.ndarray
    relative: np.ndarray | None = None

    def take(self, kept: np.ndarray) -> ListedBoxes:
        """The objects of some rows: (n,) bool, or their numbers."""
        relative = None if self.relative is None else self.relative[kept]
        return ListedBoxes(self.rows[kept], self.classes[kept], self.pixels[kept], relative)


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
        notes: sentences on what was read in a way that could be wrong.
        places: label -> the position in its file of the first row that has it, such as `line 4`,
            where the data set is one table.
        disk: the files below the root, as far as they were looked for.
    """

    vocabulary: tuple[str, ...]
    split_name: str
    sources: dict[str, str]
    table: pa.Table = field(repr=False)
    boxes: ListedBoxes | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict, repr=False)
    disk: Disk | None = field(default=None, repr=False)


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
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        wrong = not_utf8(path, number, content.split(b"\n")[number - 1])
        raise InputError(wrong.problem, f"{wrong.remedy} {remedy}") if wrong else error from None
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line]


def are_relative(corners: np.ndarray) -> bool:
    """Whether (n, 4) coordinates, as a file has them, must be in [0,1] of the picture.

    They are if none is greater than 1: as pixels, every box would be a speck in the corner.
    """
    return bool((corners[~np.isnan(corners)] <= 1).all() and not np.isnan(corners).all())


def note_relative(where: Path | str) -> str:
    """The note on a file or split whose boxes are relative."""
    return (
        f"{where}: no coordinate of a box is greater than 1. The boxes are therefore read as "
        "shares of the picture's width and height, not as pixels. If they are pixels, correct them."
    )


def hash_sources(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Hex sha256 of files below ``root``; of a folder, over the names and hashes of its files.

    ``folder/*.txt`` stands for those files of a folder alone, if there is one. If the name of a
    folder ends in a slash, the hash is over the names of all photographs below it alone.
    """
    digests = {}
    for name in names:
        path = root / name
        if name.endswith("/"):
            below = (one for one in files_below(path) if one.suffix.lower() in suffixes())
            digests[name] = sha256_json([one.relative_to(path).as_posix() for one in below])
        elif "*" in path.name or path.is_dir():
            files = path.parent.glob(path.name) if "*" in path.name else path.iterdir()
            digests[name] = sha256_json({f.name: sha256_file(f) for f in files if f.is_file()})
        else:
            digests[name] = sha256_file(path)
    return digests


def split_by_share(
    paths: Sequence[str], share: float, source: Path | str, otherwise: str
) -> list[Split]:
    """The split of each of N paths, of which about ``share`` are for testing.

    A hash of the path decides, so that an image stays in its split when others are added.

    Args:
        source: what lists the images, for messages.
        otherwise: what to do instead of a share.

    Raises:
        InputError: a split has no image.
    """
    tests = [hash_fraction(path) < share for path in paths]
    if all(tests) or not any(tests):
        raise InputError(
            f"{source}: with `test_share: {share}`, {sum(tests)} of {len(tests)} images are in "
            "the test split. Expected some in each split.",
            f"Change it, or remove it and {otherwise}",
        )
    return ["test" if test else "train" for test in tests]


def hash_fraction(path: str) -> float:
    """A number in [0,1), uniform over paths: the first 8 bytes of sha256 as a fraction.

    Paths that differ only in their Unicode form have one number, since they are one image.
    """
    digest = hashlib.sha256(composed(path).encode()).digest()
    # A float has 53 bits: with all 64, the largest fraction would be rounded to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


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


def as_on_disk(root: Path, listing: Listing) -> Listing:
    """Replace paths of a listing by those of the files that they mean, and note how many.

    `Disk.find` says which.

    Raises:
        AccessError: a folder can't be read.
        InputError: two images have the same file, or a path can be that of two files.
    """
    disk = listing.disk or Disk(root)
    paths = listing.table.column("path").to_pylist()
    found = [disk.find(path) or path for path in paths]
    changed = [(path, file) for path, file in zip(paths, found, strict=True) if path != file]
    column = listing.table.schema.get_field_index("path")
    field = listing.table.schema.field(column)
    table = listing.table.set_column(column, field, pa.array(found, field.type))
    _check_once(table, root)
    notes = (*listing.notes, *note_on_names(root.name, changed, len(paths)))
    return replace(listing, table=table, notes=notes, disk=disk)


def _check_once(table: pa.Table, root: Path) -> None:
    """Refuse a file that two images have: its labels would differ, or it would train and test."""
    paths = pc.replace_substring_regex(table.column("path"), r"(^|/)(?:\.?/)+", r"\1")
    codes = np.asarray(pc.dictionary_encode(paths).combine_chunks().indices)
    again = np.flatnonzero(repeats(codes))
    if not len(again):
        return
    second = int(again[0])
    rows = table.take([int((codes == codes[second]).argmax()), second]).to_pylist()
    first, other = (f"{row['image_id']!r} ({row['split']})" for row in rows)
    more = f", and so have {len(again) - 1} more" if len(again) > 1 else ""
    raise InputError(
        f"{root.name}: the images {first} and {other} have the same file, "
        f"{root / paths[second].as_py()}{more}. Expected a photograph of its own for each image.",
        "Remove one of the two from the files that list them. If they are two photographs, put "
        "each in the folder that its listed path names.",
    )


def without_missing_boxes(listing: Listing, root: Path) -> Listing:
    """The listing without the objects of images that are missing below ``root``."""
    boxes = listing.boxes
    if boxes is None:
        return listing
    return replace(listing, boxes=boxes.take(_exists(listing, root)[boxes.rows]))


def listed_manifest(listing: Listing, dataset: str, settings: ListedSettings) -> Manifest:
    """Make a manifest of all N listed images, as if every one existed. Its rows are checked."""
    check_lengths(listing.table, listing.vocabulary, dataset)
    if isinstance(settings, TableSettings):
        _check_splits(listing.table, dataset, settings)
    return Manifest(
        dataset=dataset,
        split_name=listing.split_name,
        vocabulary=listing.vocabulary,
        sources={**listing.sources, "settings": _settings_sha256(settings)},
        counts=full_counts(listing.table),
        table=listing.table,
        notes=listing.notes,
        difficult=difficult_settings(settings),
    )


def _check_splits(table: pa.Table, dataset: str, settings: TableSettings) -> None:
    found = set(pc.unique(table.column("split")).to_pylist())
    for split in REQUIRED_SPLITS:
        if split not in found:
            others = ", ".join(map(repr, sorted(found)))
            raise InputError(
                f"{dataset}: no row of {settings.file} is in the split {split!r}. The column "
                f"{settings.split!r} has only {others}.",
                f"Write {split!r} in some rows (if images for validation are those to test on, in "
                f"place of 'val'). Or remove the column and set `prepare.{dataset}.test_share: "
                "0.2` in params.yaml, which makes a fifth of the images the test split.",
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
    exists = _exists(listing, root)
    missing = table.filter(pa.array(~exists))
    if missing.num_rows and not settings.drop_missing:
        raise _missing_images(listed, exists, root, settings)
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
                f" {locate_missing(root, _names(missing), settings) or ''}".rstrip(),
            )
    return replace(listed, counts=counts, table=table.filter(pa.array(kept))), missing


def _exists(listing: Listing, root: Path) -> np.ndarray:
    """(N,) bool: which images are files."""
    return (listing.disk or Disk(root)).are_files(listing.table.column("path").to_pylist())


def _missing_images(
    listed: Manifest, exists: np.ndarray, root: Path, settings: ListedSettings
) -> MissingError:
    """The error about images that may not be left out; ``exists`` is (N,) bool."""
    missing = _names(listed.table.filter(pa.array(~exists)))
    splits = np.asarray(listed.table.column("split"))
    empty = next((split for split in listed.splits if not exists[splits == split].any()), None)
    image_id, path = missing[0]
    return MissingError(
        f"{len(missing)} of {len(listed)} images that {listed.dataset} lists are missing. The "
        f"first is {image_id!r}, expected at {root / path}.",
        missing_remedy(listed.dataset, root, missing, settings, empty),
    )


def _names(rows: pa.Table) -> list[tuple[str, str]]:
    """The image id and the path of each row."""
    columns = (rows.column(name).to_pylist() for name in ("image_id", "path"))
    return list(zip(*columns, strict=True))


def is_current(
    manifest: Manifest, missing: Sequence[str], root: Path, settings: ListedSettings
) -> bool:
    """Whether `make_manifest` would make this manifest again, whatever difficult labels count as.

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
    disk = Disk(root)
    return (
        sum(counts["missing"] for counts in manifest.counts.values()) == len(missing)
        and bool(disk.are_files(manifest.table.column("path").to_pylist()).all())
        and not any(map(disk.find, missing))
    )


def _settings_sha256(settings: ListedSettings) -> str:
    # What difficult labels count as changes nothing of what is read.
    values = settings.model_dump(exclude={"difficult"})
    if values.get("unknown") == []:  # as before there was this setting
        del values["unknown"]
    return sha256_json({"version": LISTING_VERSION, **values})
