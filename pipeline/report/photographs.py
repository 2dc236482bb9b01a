"""The photographs that the page shows: where each lies, a small picture of it, and what is missing.

Letters: N images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, MissingError
from pipeline.files import exists
from pipeline.regions.transforms import load_image

LONGEST_SIDE = 400
"""The longest side of a picture in pixels. Smaller photographs keep their size."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_QUALITY = 82  # of JPEG: files are smaller, and at this size no difference is visible


def with_its_suffix(path: Path) -> Path:
    """Find the photograph of an imported image, whose path in the manifest is `images/<id>.jpg`.

    Args:
        path: as in the manifest.

    Returns:
        ``path``, or the file beside it with another suffix; if the id has a suffix itself, as in
        `a.png`, the file of that name. ``path`` if there is none of them.
    """
    name = path.name.removesuffix(".jpg")
    suffixes = [one for suffix in _SUFFIXES for one in (suffix, suffix.upper())]
    candidates = [path, path.with_name(name), *(path.with_name(name + one) for one in suffixes)]
    return next((one for one in candidates if exists(one)), path)


def write_pictures(
    photographs: Sequence[Path],
    folder: Path,
    *,
    threads: int,
    on_images: Callable[[int], object] = lambda images: None,
) -> NDArray[np.int32]:
    """Write a small JPEG of each photograph: <folder>/<index>.jpg.

    Args:
        photographs: N files.
        threads: how many photographs are decoded at once.
        on_images: called with 1 after each photograph.

    Returns:
        (N, 2) width and height of each picture; 0 and no picture where the photograph is missing
        or broken.
    """
    folder.mkdir()

    def shrink(index: int) -> tuple[int, int]:
        try:
            image = load_image(photographs[index])
        except (MissingError, InputError):
            return 0, 0
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        image.save(folder / f"{index}.jpg", quality=_QUALITY)
        return image.size

    sizes = np.zeros((len(photographs), 2), np.int32)
    with ThreadPoolExecutor(threads) as pool:
        for index, size in enumerate(pool.map(shrink, range(len(photographs)))):
            sizes[index] = size
            on_images(1)
    return sizes


@dataclass(frozen=True)
class AboutPhotographs:
    """What a reader must know of the photographs, in sentences.

    Attributes:
        origin: the folder that the pictures were made from; empty if there is no picture.
        problem: how many photographs could not be shown, where the first of them is expected, and
            what to do; empty if all are shown.
    """

    origin: str
    problem: str


def about_photographs(
    photographs: Sequence[Path], readable: NDArray[np.bool_], imported_to: Path | None
) -> AboutPhotographs:
    """Say where the photographs come from, and which ones are missing or broken.

    Args:
        photographs: N files, where they are or should be.
        readable: (N,) whether there is a picture of it.
        imported_to: the folder for photographs of imported regions; None for other data sets.
    """
    pairs = list(zip(photographs, readable.tolist(), strict=True))
    found = [path for path, shown in pairs if shown]
    others = [path for path, shown in pairs if not shown]
    missing = [path for path in others if not exists(path)]
    broken = [path for path in others if exists(path)]
    origin = problem = ""
    if found:
        folder = imported_to or os.path.commonpath([path.parent for path in found])
        origin = f"The pictures are small copies of the photographs in {folder}."
    if missing:
        place = "Put what is missing there"
        if imported_to is not None:
            place = f"Put each photograph at {imported_to}/<id>.jpg, or with its own suffix"
        problem += (
            _first_of(missing, len(photographs), "missing") + f" {place}, and make the page again."
        )
    if broken:
        problem += (" " if missing else "") + _first_of(broken, len(photographs), "not readable")
        problem += " Replace what can't be read, and make the page again."
    if problem:
        problem += " Regions without a photograph are drawn on a blank background."
    return AboutPhotographs(origin, problem)


def _first_of(some: Sequence[Path], of: int, what: str) -> str:
    verb = "is" if len(some) == 1 else "are"
    return f"{len(some):,} of {of:,} photographs {verb} {what}; the first is {some[0]}."
