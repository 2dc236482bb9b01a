"""Which image of a manifest an id in a foreign file belongs to.

Other programs name an image by a part of its path, with another suffix or none, or by its number.
The rule for an id of the file and an id or a path of the manifest:

0. The ids are equal.
1. The file names are equal.
2. They are, but one of them has a suffix that the other lacks.
3. They are without their suffixes.
4. One is a number, without its suffix, and the other ends in the same; leading zeros don't count.
5. Both have something before the same number. This is weak, so it is noted.

In 1 to 5, one may have more folders before it, but other folders never match. A line belongs to the
image that fits by the first of these, and by most folders.

The line's size must have the shape of the image's in the manifest, since features are often made
from resized pictures; in 5, it must be the same. The manifest has the size of the upright picture.
A line with width and height exchanged is of the picture as a camera stored it, which is noted. So
is a line of a square picture, since many networks squeeze all pictures into squares.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.formats.text import composed

_log = logging.getLogger(__name__)

_SUFFIX = re.compile(r"\.([A-Za-z][A-Za-z0-9]{0,4}(\.(gz|bz2|xz|zst))?|0)$")
"""Of a file, compressed or not, and of a number that a table program took for a decimal."""

_KINDS = {1: "file name", 2: "file name", 3: "file name", 4: "number", 5: "number"}
_BARE, _WEAK = 4, 5
_SEVERAL = 10  # images that fit one number, of which no more are looked at

_Folders = tuple[str, ...]
_Last = str | tuple[str, bool]
"""A file's name or stem, or the number that it ends in and whether there is nothing else in it."""


class Line(Protocol):
    """A line of a file: where it is for messages, its image's id there and its size in pixels."""

    @property
    def where(self) -> str: ...

    @property
    def file_id(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


@dataclass(frozen=True)
class KnownImage:
    """An image of a manifest. Width and height are in pixels, None where the manifest has none."""

    image_id: str
    path: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class _Name:
    """An id or a path as it is compared.

    Attributes:
        folders: before the file name.
        file: name of the file.
        stem: the same without its suffix.
    """

    folders: _Folders
    file: str
    stem: str

    @classmethod
    def of(cls, text: str) -> _Name:
        plain = composed(text.replace("\\", "/"))
        *folders, file = [part for part in plain.split("/") if part not in ("", ".")] or [""]
        return cls(tuple(folders), file, _SUFFIX.sub("", file))

    @property
    def number(self) -> str | None:
        """The number that it ends in, without leading zeros.

        None after another one of as many digits: in `IMG_0042_1`, the 1 counts views or crops.
        """
        *others, last = re.findall("[0-9]+", self.stem) or [""]
        if not self.stem.endswith(last or "?") or any(len(other) >= len(last) for other in others):
            return None
        return str(last.lstrip("0"))

    def ends_like(self, other: _Name) -> bool:
        """Whether the folders of one of them are the last folders of the other."""
        n = min(len(self.folders), len(other.folders))
        return n == 0 or self.folders[-n:] == other.folders[-n:]


class _Manifest:
    """The images of a manifest by everything that a line may name them by."""

    def __init__(self, images: Sequence[KnownImage]) -> None:
        self.names = [(_Name.of(image.image_id), _Name.of(image.path)) for image in images]
        # By folders, all of them or the last ones, and what stands for the file.
        self._whole: dict[tuple[_Folders, _Last], list[int]] = defaultdict(list)
        self._ends: dict[tuple[_Folders, _Last], list[int]] = defaultdict(list)
        for image, names in enumerate(self.names):
            for name in set(names):
                lasts: set[_Last] = {name.file, name.stem}
                if name.number is not None:
                    lasts.add((name.number, name.stem.isdigit()))
                for last in lasts:
                    self._whole[name.folders, last].append(image)
                    for start in range(len(name.folders) + 1):
                        self._ends[name.folders[start:], last].append(image)

    def candidates(self, name: _Name) -> dict[int, tuple[int, int]]:
        """The images that a name may be of, with the kind of the rule and minus the folders."""
        found: dict[int, tuple[int, int]] = {}
        for last in {name.file, name.stem}:
            for image, folders in self._ending_alike(name.folders, last):
                for own in self.names[image]:
                    kind = _kind_by_name(name, own)
                    if kind is not None and name.ends_like(own):
                        rank = (kind, -folders)
                        found[image] = min(rank, found.get(image, rank))
        if found or name.number is None:
            return found
        for bare in (True, False):
            rank = (_BARE if bare or name.stem.isdigit() else _WEAK, 0)
            alike = self._ending_alike(name.folders, (name.number, bare))
            for image, _ in islice(alike, _SEVERAL):
                found[image] = min(rank, found.get(image, rank))
        return found

    def _ending_alike(self, folders: _Folders, last: _Last) -> Iterator[tuple[int, int]]:
        """Images with what stands for the file, and folders like these; and how many are shared."""
        yield from ((image, len(folders)) for image in self._ends.get((folders, last), ()))
        for start in range(1, len(folders) + 1):
            shared = len(folders) - start
            yield from ((image, shared) for image in self._whole.get((folders[start:], last), ()))


def _kind_by_name(name: _Name, own: _Name) -> int | None:
    """The kind of the module's rule, 1 to 3, by which two file names are alike."""
    if name.file == own.file:
        return 1
    if name.file == own.stem or name.stem == own.file:
        return 2
    return 3 if name.stem == own.stem else None


def match_lines(lines: Sequence[Line], images: Sequence[KnownImage]) -> npt.NDArray[np.int64]:
    """Find each line's image among those of a manifest: its number (N,), -1 for none.

    It goes by the rule in the module's docstring.

    Args:
        lines: N, of the files.
        images: of the manifest.

    Raises:
        InputError: a line may belong to several images, two lines belong to one image, or a line
            has a size of another shape than its image. Names them.
    """
    ids = {image.image_id: number for number, image in enumerate(images)}
    known: _Manifest | None = None
    found = np.full(len(lines), -1, dtype=np.int64)
    ranked: list[tuple[tuple[int, int], int, list[int]]] = []
    taken: dict[int, int] = {}
    for number, line in enumerate(lines):
        if line.file_id in ids:
            candidates = {ids[line.file_id]: (0, 0)}
        else:
            known = known or _Manifest(images)
            candidates = known.candidates(_Name.of(line.file_id))
        if candidates:
            rank = min(candidates.values())
            best = sorted(image for image, other in candidates.items() if other == rank)
            ranked.append((rank, number, best))
    weak: set[int] = set()
    for (kind, _), number, best in sorted(ranked):
        line = lines[number]
        if kind == _WEAK and (len(best) > 1 or best[0] in taken):
            continue
        if len(best) > 1:
            raise _ambiguous(line, kind, [images[image] for image in best])
        (image,) = best
        if image in taken:
            raise InputError(
                f"{line.where}: this is image {images[image].image_id!r}, and so is "
                f"{lines[taken[image]].where}; expected each image once.",
                "Delete one of the two lines.",
            )
        if kind == _WEAK:
            weak.add(number)
        taken[image] = number
        found[number] = image
    _check_sizes(
        [
            (lines[number], images[found[number]], number in weak)
            for number in np.flatnonzero(found >= 0).tolist()
        ]
    )
    if weak:
        _log.warning(
            "%s is read as image %r%s, by the number at the end of the ids alone.",
            lines[min(weak)].where,
            images[found[min(weak)]].image_id,
            f", and {len(weak) - 1} more lines likewise" if len(weak) > 1 else "",
        )
    return found


def _ambiguous(line: Line, kind: int, images: Sequence[KnownImage]) -> InputError:
    first, second = (f"{image.image_id!r} ({image.path})" for image in images[:2])
    more = f" ({len(images) - 2} more fit)" if len(images) > 2 else ""
    return InputError(
        f"{line.where}: by its {_KINDS[kind]} this may be image {first} or image {second}{more}; "
        "expected one.",
        "Write the image's id in the manifest, or its path, into the line, or delete the line.",
    )


_Size = tuple[int, int]


def _check_sizes(matched: Sequence[tuple[Line, KnownImage, bool]]) -> None:
    """Check that the sizes of lines and their images agree; note which are turned or square.

    Args:
        matched: each line with its image, and whether only their numbers are alike.

    Raises:
        InputError: a line's picture has another shape than its image.
    """
    turned: list[tuple[Line, KnownImage]] = []
    square: list[tuple[Line, KnownImage]] = []
    for line, image, is_weak in matched:
        if image.width is None or image.height is None:
            continue
        own, size = (line.width, line.height), (image.width, image.height)
        if own == size or (not is_weak and _same_shape(own, size)):
            continue
        if own == size[::-1] or (not is_weak and _same_shape(own, size[::-1])):
            turned.append((line, image))
        elif not is_weak and line.width == line.height:
            square.append((line, image))
        else:
            raise _other_shape(line, image, is_weak)
    if turned:
        _log.warning(
            "Width and height of %d of %d images are exchanged: %s. Their boxes are taken to be of "
            "the picture as the camera stored it, and are not turned upright. So where these "
            "photographs are shown with their regions, the boxes may be in wrong places.",
            len(turned),
            len(matched),
            _sizes_of(*turned[0]),
        )
    if square:
        _log.warning(
            "The sizes of %d of %d images are square where the pictures are not: %s. They are read "
            "as pictures that were resized to a square, with the boxes in it.",
            len(square),
            len(matched),
            _sizes_of(*square[0]),
        )


def _same_shape(own: _Size, size: _Size) -> bool:
    """Whether a picture of one size could be resized to the other, up to a pixel of rounding."""
    larger, smaller = (own, size) if own[0] >= size[0] else (size, own)
    scale = smaller[0] / larger[0]
    # Either side may have been the one that was set, and the other one rounded.
    return (
        abs(smaller[1] - larger[1] * scale) <= 1
        or abs(smaller[0] - larger[0] * smaller[1] / larger[1]) <= 1
    )


def _sizes_of(line: Line, image: KnownImage) -> str:
    return (
        f"{line.where} has {line.width} x {line.height}, and the upright picture of "
        f"{image.image_id!r} has {image.width} x {image.height}"
    )


def _other_shape(line: Line, image: KnownImage, is_weak: bool) -> InputError:
    by, expected = ("by its number ", "") if is_weak else ("", ", or another size of this shape")
    x, y = f"{image.width} / {line.width}", f"{image.height} / {line.height}"
    return InputError(
        f"{line.where}: {by}this is image {image.image_id!r}, but its size is "
        f"{line.width} x {line.height}; expected {image.width} x {image.height}, as in the "
        f"manifest{expected}.",
        "If the line is of another picture, write that one's id into it, or delete it. If its "
        f"picture was resized to another shape, multiply its boxes by [{x}, {y}, {x}, {y}], and "
        f"write {image.height} and {image.width} as height and width. Do so in all such lines.",
    )
