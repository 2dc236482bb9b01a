"""Check every image and label of a data set before hours are spent on them.

Of JPEG files only headers and ends are read, so that hundreds of thousands of images take minutes.

Letters: N images, C labels.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from pipeline.datasets.disk import find_files
from pipeline.datasets.manifest import Manifest, unlabelled_rows
from pipeline.errors import GmpipeError
from pipeline.files import open_regular, sha256_file
from pipeline.images import examine, reason

T = TypeVar("T")

_END = 4096  # bytes at each end of a file that are compared before the whole file is hashed
_CHUNK = 64  # images per task of a thread


@dataclass(frozen=True)
class ListedImage:
    """An image as its data set lists it. The path is relative to the data set's root."""

    image_id: str
    path: str
    split: str


@dataclass(frozen=True)
class Findings:
    """What is wrong with a data set's images.

    Attributes:
        images: number of listed images.
        missing: images without a file.
        unreadable: images that can't be decoded, and the reason.
        refused: images that the system can't read, and the reason; they may be sound.
        duplicates: groups of two or more readable images whose files have the same content.
        unlabelled: images with neither a positive nor a difficult label.
        doubtful: readable images whose orientation can't be read; their pixels are used as stored.
    """

    images: int
    missing: list[ListedImage]
    unreadable: list[tuple[ListedImage, str]]
    refused: list[tuple[ListedImage, str]]
    duplicates: list[list[ListedImage]]
    unlabelled: list[ListedImage]
    doubtful: list[ListedImage]


def check_files(
    manifest: Manifest, root: Path, on_images: Callable[[int], object] = lambda number: None
) -> Findings:
    """Look whether every image of a manifest can be decoded, in threads. Nothing is written.

    Args:
        manifest: the images.
        root: the folder that its paths are relative to.
        on_images: called with the number of images that were checked since the last call.
    """
    images = _listed(manifest)
    exists = find_files(root, [image.path for image in images])
    on_images(int((~exists).sum()))
    present = [images[row] for row in np.flatnonzero(exists)]

    Image.init()  # before the threads, which would all do it at once
    with warnings.catch_warnings():
        # Images up to the limit above which Pillow raises an error are refused with that error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = _in_threads(_open, [root / image.path for image in present], on_images)

    results = list(zip(present, opened, strict=True))
    return Findings(
        images=len(images),
        missing=[images[row] for row in np.flatnonzero(~exists)],
        unreadable=[(image, one.unreadable) for image, one in results if one.unreadable],
        refused=[(image, one.refused) for image, one in results if one.refused],
        duplicates=_duplicates(
            root,
            [(image, one.size) for image, one in results if not one.unreadable + one.refused],
        ),
        unlabelled=[images[row] for row in np.flatnonzero(unlabelled_rows(manifest.table))],
        doubtful=[image for image, one in results if one.doubtful],
    )


@dataclass(frozen=True)
class _Opened:
    """A file's size, or why it can't be decoded, or why the system refuses to read it."""

    size: int = 0
    unreadable: str = ""
    refused: str = ""
    doubtful: bool = False


def _open(path: Path) -> _Opened:
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            if not size:
                return _Opened(unreadable="the file is empty")
            stream.seek(0)
            return _Opened(size, doubtful=examine(stream))
    except MemoryError:  # not the file's fault
        raise
    except GmpipeError as error:
        return _Opened(unreadable=error.problem)
    except Exception as error:  # the readers of formats raise anything for a damaged file
        if isinstance(error, OSError) and error.errno:  # the system's; Pillow's have no number
            return _Opened(refused=error.strerror or str(error))
        return _Opened(unreadable=reason(error))


def find_duplicates(manifest: Manifest, root: Path) -> list[list[str]]:
    """Find the images of a manifest whose files have the same content; nothing is decoded.

    Args:
        manifest: the images. Those whose files are missing or can't be read are left out.
        root: the folder that its paths are relative to.

    Returns:
        groups of two or more image ids.
    """
    images = _listed(manifest)
    exists = find_files(root, [image.path for image in images])
    readable = [images[row] for row in np.flatnonzero(exists)]
    readable = [image for image in readable if os.access(root / image.path, os.R_OK)]
    sizes = [(image, (root / image.path).stat().st_size) for image in readable]
    groups = _duplicates(root, [(image, size) for image, size in sizes if size])
    return [[image.image_id for image in group] for group in groups]


def _listed(manifest: Manifest) -> list[ListedImage]:
    columns = (manifest.table.column(name).to_pylist() for name in ("image_id", "path", "split"))
    return [ListedImage(*row) for row in zip(*columns, strict=True)]


def _duplicates(root: Path, sizes: list[tuple[ListedImage, int]]) -> list[list[ListedImage]]:
    """Groups of images whose files have the same content.

    Only files of equal size have their ends hashed, and only those with equal ends are read
    completely. They are few.
    """
    groups = _groups(sizes)
    for digest in (_sha256_ends, sha256_file):
        candidates = [image for group in groups for image in group]
        paths = [root / image.path for image in candidates]
        groups = _groups(zip(candidates, _in_threads(digest, paths), strict=True))
    return groups


def _groups(keyed: Iterable[tuple[ListedImage, object]]) -> list[list[ListedImage]]:
    """Groups of two or more images with equal keys."""
    by_key: defaultdict[object, list[ListedImage]] = defaultdict(list)
    for image, key in keyed:
        by_key[key].append(image)
    return [group for group in by_key.values() if len(group) > 1]


def _sha256_ends(path: Path) -> str:
    """Hex sha256 over a file's size and both its ends."""
    with open_regular(path) as stream:
        start = stream.read(_END)
        size = stream.seek(0, os.SEEK_END)
        return hashlib.sha256(b"%d " % size + start + _end(stream, size, _END)).hexdigest()


def _end(stream: BinaryIO, size: int, length: int) -> bytes:
    """The last ``length`` bytes of a file of ``size`` bytes."""
    stream.seek(max(0, size - length))
    return stream.read()


def _in_threads(
    function: Callable[[Path], T],
    paths: Sequence[Path],
    on_images: Callable[[int], object] = lambda number: None,
) -> list[T]:
    """Apply ``function`` to every path, in threads; ``on_images`` as for `check_files`."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    results: list[T] = []
    with ThreadPoolExecutor() as pool:
        for chunk_results in pool.map(lambda chunk: [function(path) for path in chunk], chunks):
            on_images(len(chunk_results))
            results += chunk_results
    return results
