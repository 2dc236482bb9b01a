"""Regions in a folder with an npz for each image, as features of bottom-up-attention are published.

Letters: as in `pipeline.shards.imports.image_regions`; K is the number of regions that an image's
arrays have room for.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.files import sha256_json
from pipeline.formats.npz import NpyHeader, naming_damage, npy_array, npy_header
from pipeline.shards.imports.image_regions import (
    ImageRegions,
    ListedImage,
    OnBytes,
    hash_file,
    refuse,
    refuse_repeated,
)
from pipeline.shards.imports.pixels import boxes_of_pixels

_log = logging.getLogger(__name__)

_NUMBERS = ("image_w", "image_h", "num_bbox")
_ARRAYS = {"x": "f", "bbox": "fiu", **dict.fromkeys(_NUMBERS, "iu")}
"""The arrays that are read, and the kinds of type that each may have. An `info`, which many files
have, is not read: it is a pickle, which can run code."""

_AGAIN = "Copy the file again, or save it again with `numpy.savez`."


@dataclass(frozen=True, eq=False)
class NpzFolder:
    """Regions in folders with an npz for each image, which is named by the image's id.

    ``x`` (K, d) or (d, K) and ``bbox`` (K, 4) xyxy in pixels are of up to K regions, of which the
    first ``num_bbox`` are real; ``image_w`` and ``image_h`` are the image's size in pixels. The
    files have neither scores nor classes: every region has the score 1 and no class.

    Attributes:
        sha256: hex, over all files and their names.
        lines: N, in the order of the folders and of the names in each.
        counts: (N,) number of regions of each image.
        feature_size: d.
        paths: N, of the files.
        transposed: whether ``x`` is (d, K).
        whole_sha256: None, since the files have no features of whole images.
    """

    sha256: str
    lines: tuple[ListedImage, ...]
    counts: npt.NDArray[np.int64]
    feature_size: int
    paths: tuple[Path, ...]
    transposed: bool
    whole_sha256: None = None

    @classmethod
    def open(
        cls, folders: Sequence[Path], on_bytes: OnBytes = lambda read, total: None
    ) -> NpzFolder:
        """Read the files through: their hashes and numbers, and what their arrays declare.

        Args:
            folders: that have the files, also in folders of their own.
            on_bytes: called with the progress.

        Raises:
            InputError: a folder has no such file, or a file is damaged or no npz, lacks an array,
                or has arrays of other types or shapes. Names the file and the array.
        """
        places = [(folder, path) for folder in folders for path in sorted(folder.rglob("*.npz"))]
        for folder in folders:
            if not any(one == folder for one, _ in places):
                refuse(str(folder), "number of .npz files", 0, "one for each image")
        total = sum(path.stat().st_size for _, path in places)
        hashes: list[tuple[str, str]] = []
        lines: list[ListedImage] = []
        counts: list[int] = []
        shapes: list[tuple[int, tuple[int, int]]] = []
        for folder, path in places:
            hashes.append(
                (str(path.relative_to(folder)), hash_file(path, lambda n: on_bytes(n, total)))
            )
            with naming_damage(path, _AGAIN), zipfile.ZipFile(path) as archive:
                arrays = {name: _declared(path, archive, name) for name in _ARRAYS}
                slots = _slots(path, arrays)
                rows, columns = arrays["x"].shape
                shapes.append((slots, (rows, columns)))
                numbers = {name: _number(path, archive, name) for name in _NUMBERS}
            if numbers["num_bbox"] > slots:
                refuse(str(path), "num_bbox", numbers["num_bbox"], f"at most {slots}")
            name = path.relative_to(folder).with_suffix("").as_posix()
            lines.append(ListedImage(str(path), name, numbers["image_w"], numbers["image_h"]))
            counts.append(numbers["num_bbox"])
        refuse_repeated(lines)
        _log.warning(
            "%s: the files have no scores. All regions get the score 1, so that the first of each "
            "file count as its best.",
            ", ".join(map(str, folders)),
        )
        size, transposed = _orientation([path for _, path in places], shapes)
        return cls(
            sha256=sha256_json(hashes),
            lines=tuple(lines),
            counts=np.array(counts, dtype=np.int64),
            feature_size=size,
            paths=tuple(path for _, path in places),
            transposed=transposed,
        )

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """Yield the regions of the images with these numbers.

        Raises:
            InputError: a file is damaged, or a box leaves its image by more than a pixel.
        """
        for number in images.tolist():
            path, line, n = self.paths[number], self.lines[number], int(self.counts[number])
            with naming_damage(path, _AGAIN), zipfile.ZipFile(path) as archive:
                features, boxes = npy_array(archive, "x"), npy_array(archive, "bbox")
            yield ImageRegions(
                where=line.where,
                features=(features.T if self.transposed else features)[:n],
                boxes=boxes_of_pixels(line.where, boxes[:n], line.width, line.height),
                scores=np.ones(n, dtype=np.float32),
                classes=np.full(n, -1, dtype=np.int16),
            )


def _declared(path: Path, archive: zipfile.ZipFile, name: str) -> NpyHeader:
    """The header of an array, after a check of its type and of its size in the file."""
    if f"{name}.npy" not in archive.namelist():
        held = sorted(member.removesuffix(".npy") for member in archive.namelist())
        expected = f"the arrays {', '.join(_ARRAYS)}"
        refuse(str(path), f"array `{name}`", f"missing; the file has {held[:20]}", expected)
    header = npy_header(archive, name)
    where = f"{path}, `{name}`"
    if header.dtype.kind not in _ARRAYS[name] or header.dtype.subdtype is not None:
        kinds = "floats" if name == "x" else "numbers" if name == "bbox" else "a whole number"
        refuse(where, "dtype", header.dtype, kinds)
    size = archive.getinfo(f"{name}.npy").file_size
    if size != header.size:
        refuse(where, "size", f"{size} bytes", f"{header.size} bytes", _AGAIN)
    return header


def _slots(path: Path, arrays: dict[str, NpyHeader]) -> int:
    """K, after a check that the shapes of an image's arrays agree."""
    x, bbox = arrays["x"].shape, arrays["bbox"].shape
    if len(bbox) != 2 or bbox[1] != 4:
        refuse(f"{path}, `bbox`", "shape", bbox, "(K, 4)")
    if len(x) != 2 or bbox[0] not in x or (bbox[0] and 0 in x):
        expected = f"({bbox[0]}, d) or (d, {bbox[0]}), since `bbox` has {bbox[0]} rows"
        refuse(f"{path}, `x`", "shape", x, expected)
    for name in _NUMBERS:
        if int(np.prod(arrays[name].shape)) != 1:
            refuse(f"{path}, `{name}`", "shape", arrays[name].shape, "(), a single number")
    return int(bbox[0])


def _number(path: Path, archive: zipfile.ZipFile, name: str) -> int:
    number = int(npy_array(archive, name).item())
    least = 0 if name == "num_bbox" else 1
    if not least <= number <= np.iinfo(np.int32).max:
        refuse(f"{path}, `{name}`", "number", number, f"{least} or more")
    return number


def _orientation(
    paths: Sequence[Path], shapes: Sequence[tuple[int, tuple[int, int]]]
) -> tuple[int, bool]:
    """d, and whether ``x`` is (d, K) in all files, by the K and the shape of ``x`` of each file.

    A file with as many regions as features says neither; the others decide, or else it is (K, d).
    """
    found: dict[tuple[int, bool], Path] = {}  # of the first file with this d and order
    square: dict[int, Path] = {}
    for path, (slots, (rows, columns)) in zip(paths, shapes, strict=True):
        if rows == columns:
            square.setdefault(slots, path)
        elif slots:
            transposed = rows != slots
            found.setdefault((rows if transposed else columns, transposed), path)
    for size, path in square.items():
        if all(size != known for known, _ in found):
            found[size, False] = path
    if not found:
        refuse(str(paths[0]), "number of regions", 0, "at least one file with a region")
    if len(found) > 1:
        (one, path), (other, another) = list(found.items())[:2]
        words = [f"{'(d, K)' if turned else '(K, d)'} with d = {d}" for d, turned in (one, other)]
        refuse(f"{another}, `x`", "shape", words[1], f"{words[0]}, as in {path}")
    return next(iter(found))
