"""Looks at every image and label of a data set before hours are spent on them.

Of images only headers are read, and the ends of files: hundreds of thousands take minutes.

Letters: N images, C labels.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, takewhile
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from pipeline.datasets.listing import find_files
from pipeline.datasets.manifest import SPLITS, Manifest, Split, unlabelled_rows
from pipeline.files import sha256_file
from pipeline.images import open_image

T = TypeVar("T")

_END = 4096  # bytes at each end of a file that two like ones must share
_TAIL = 64  # bytes in which a whole image closes: fewer than lie behind a JPEG's thumbnail
_CHUNK = 64  # images a thread takes at once

_CLOSING = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""What stands at the end of a whole file. An image whose last `_TAIL` bytes lack it is decoded, to
see whether it is cut off or only has something behind it."""


@dataclass(frozen=True)
class ListedImage:
    """An image as its data set lists it; the path is relative to the data set's root."""

    image_id: str
    path: str
    split: str


@dataclass(frozen=True)
class Findings:
    """What is wrong with a data set's images.

    Attributes:
        images: how many are listed.
        missing: those without a file.
        unreadable: those that can't be decoded, and why.
        duplicates: two images or more, of the readable ones, whose files have the same content.
        unlabelled: those with neither a positive nor an ignored label.
    """

    images: int
    missing: list[ListedImage]
    unreadable: list[tuple[ListedImage, str]]
    duplicates: list[list[ListedImage]]
    unlabelled: list[ListedImage]


def check_files(
    manifest: Manifest, root: Path, on_images: Callable[[int], object] = lambda number: None
) -> Findings:
    """Open the header of every image of a manifest, in threads; nothing is written.

    Args:
        manifest: the images.
        root: the folder that its paths are relative to.
        on_images: called with the number of images that have been looked at since the last call.
    """
    columns = (manifest.table.column(name).to_pylist() for name in ("image_id", "path", "split"))
    images = [ListedImage(*row) for row in zip(*columns, strict=True)]
    there = find_files(root, [image.path for image in images])
    on_images(int((~there).sum()))
    present = [images[place] for place in np.flatnonzero(there)]

    Image.init()  # not by many threads at once
    with warnings.catch_warnings():
        # Extraction decodes what is below Pillow's limit for errors.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = _in_threads(_open, [root / image.path for image in present], on_images)

    found = list(zip(present, opened, strict=True))
    return Findings(
        images=len(images),
        missing=[images[place] for place in np.flatnonzero(~there)],
        unreadable=[(image, problem) for image, (_, problem) in found if problem is not None],
        duplicates=_duplicates(
            root, [(image, size) for image, (size, problem) in found if problem is None]
        ),
        unlabelled=[images[place] for place in np.flatnonzero(unlabelled_rows(manifest.table))],
    )


def label_counts(manifest: Manifest) -> dict[Split, np.ndarray]:
    """(C,) per split: how many images have each label."""
    lists, splits = manifest.table.column("labels"), manifest.table.column("split")
    return {
        split: np.bincount(
            np.asarray(pc.list_flatten(pc.filter(lists, pc.equal(splits, split)))),
            minlength=len(manifest.vocabulary),
        )
        for split in SPLITS
    }


def similar_labels(vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of labels that may be one, spelled in two ways; in the vocabulary's order.

    They differ in nothing but case, blanks, `_` and `-`; or else by one letter that is missing,
    another one, or swapped with the next. Short names differ by a letter as a rule (cat, car), so
    one of four letters at most is only held against the same with a letter more (dog, dogs).
    """
    by_form: defaultdict[str, set[int]] = defaultdict(set)
    words = [re.sub(r"[\s_-]+", "", name.casefold()) for name in vocabulary]
    for place, word in enumerate(words):
        # Words one letter apart have one of these in common: no need to compare all with all.
        for form in {word, *(word[:cut] + word[cut + 1 :] for cut in range(len(word)))}:
            by_form[form].add(place)
    pairs = {
        pair
        for places in by_form.values()
        for pair in combinations(sorted(places), 2)
        if _alike(words[pair[0]], words[pair[1]])
    }
    return [(vocabulary[one], vocabulary[other]) for one, other in sorted(pairs)]


def _alike(one: str, other: str) -> bool:
    """Whether two words without blanks and capitals may be one, as `similar_labels` says."""
    start = _common(one, other)
    one, other = one[start:], other[start:]
    end = _common(one[::-1], other[::-1])
    length = start + max(len(one), len(other))
    one, other = one[: len(one) - end], other[: len(other) - end]
    if not one + other:
        return True
    if any(letter.isdigit() for letter in one + other):
        return False
    if not (one and other):
        return length >= 4 and len(one + other) == 1
    return length >= 5 and (len(one) == len(other) == 1 or (one == other[::-1] and len(one) == 2))


def _common(one: str, other: str) -> int:
    """How many letters two words begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _open(path: Path) -> tuple[int, str | None]:
    """A file's size, and why it can't be decoded."""
    size = 0
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            if not size:
                return size, "the file is empty"
            tail = _end(stream, size, _TAIL)
            stream.seek(0)
            with open_image(stream) as image:
                if _CLOSING.get(image.format or "", b"") not in tail:
                    image.load()
    except UnidentifiedImageError:
        return size, "the file is of no image format that is known here"
    except OSError as error:
        return size, error.strerror or str(error)
    except Exception as error:  # whatever a damaged header leads a reader of some format to
        return size, f"{type(error).__name__}: {error}"
    return size, None


def _duplicates(root: Path, sizes: list[tuple[ListedImage, int]]) -> list[list[ListedImage]]:
    """Groups of images whose files have the same content.

    Few files are as large as another one, fewer still end alike: only those are read.
    """
    groups = _groups(sizes)
    for digest in (_sha256_ends, sha256_file):
        alike = [image for group in groups for image in group]
        paths = [root / image.path for image in alike]
        groups = _groups(zip(alike, _in_threads(digest, paths), strict=True))
    return groups


def _groups(keyed: Iterable[tuple[ListedImage, object]]) -> list[list[ListedImage]]:
    """The images of equal keys, where there are two or more."""
    by_key: defaultdict[object, list[ListedImage]] = defaultdict(list)
    for image, key in keyed:
        by_key[key].append(image)
    return [group for group in by_key.values() if len(group) > 1]


def _sha256_ends(path: Path) -> str:
    """Hex sha256 over a file's size and ends."""
    with path.open("rb") as stream:
        start = stream.read(_END)
        size = stream.seek(0, os.SEEK_END)
        return hashlib.sha256(b"%d " % size + start + _end(stream, size, _END)).hexdigest()


def _end(stream: BinaryIO, size: int, length: int) -> bytes:
    stream.seek(max(0, size - length))
    return stream.read()


def _in_threads(
    function: Callable[[Path], T],
    paths: Sequence[Path],
    on_images: Callable[[int], object] = lambda number: None,
) -> list[T]:
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    found: list[T] = []
    with ThreadPoolExecutor() as pool:
        for results in pool.map(lambda chunk: [function(path) for path in chunk], chunks):
            on_images(len(results))
            found += results
    return found
