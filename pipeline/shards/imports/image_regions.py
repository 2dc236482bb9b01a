"""The regions of one image as a foreign file holds them, and how they become rows of a shard.

The files are untrusted. They are read as streams, an image at a time, and are read through once
before the first region is used. What they declare is checked against their sizes before memory is
allocated for it. Class ids count from 0 in these files, where -1 means none, and from 1 in a shard,
where 0 does.

Letters, besides R rows, m regions and d feature size as in `pipeline.shards.schema`: N images of a
file, n regions of one image, C labels.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.files import open_regular, raise_if_refused
from pipeline.shards.schema import RegionRows

LARGEST_CLASS = np.iinfo(np.int16).max - 1
CHUNK = 1 << 20  # bytes read at once

OnBytes = Callable[[int, int], None]
"""Called with the number of bytes read since the last call, and the number of all bytes."""


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """The regions of one image, in the file's own order and types.

    Attributes:
        where: file and position, for messages.
        features: (n, d), any float type.
        boxes: (n, 4), any float type, xyxy in [0,1] of the image.
        scores: (n,), any float type.
        classes: (n,), any integer type, from 0; -1 for none.
        whole: (d,), any float type: the feature of the whole image; None if the file has none.
    """

    where: str
    features: npt.NDArray[Any]
    boxes: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    classes: npt.NDArray[Any]
    whole: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class ListedImage:
    """An image as a file of regions names it.

    Attributes:
        where: file and position, for messages.
        file_id: its id there.
        width, height: in pixels.
    """

    where: str
    file_id: str
    width: int
    height: int


def region_rows(
    images: Iterable[ImageRegions],
    image_ids: Sequence[str],
    *,
    regions: int,
    feature_size: int,
    feature_dtype: str,
    whole: bool = False,
) -> RegionRows:
    """Make view 0 of R images from their best ``regions``, in descending order of their scores.

    Regions with equal scores keep the file's order.

    Args:
        images: R or more, with at least one region each.
        image_ids: R, as in the manifest.
        regions: m.
        feature_size: d.
        feature_dtype: `float16` or `float32`.
        whole: whether the images have the feature of the whole image, which is then stored.

    Raises:
        InputError: a number is not finite or does not fit into its type, a box is not within the
            image or has a negative side, or a class id is out of range. Names the file, the
            position in it and the region.
    """
    shape = (len(image_ids), regions)
    rows = RegionRows(
        features=np.zeros((*shape, feature_size), dtype=feature_dtype),
        boxes=np.zeros((*shape, 4), dtype=np.float32),
        scores=np.zeros(shape, dtype=np.float32),
        classes=np.zeros(shape, dtype=np.int16),
        count=np.zeros(len(image_ids), dtype=np.int16),
        image_id=np.array([image_id.encode() for image_id in image_ids], dtype=np.bytes_),
        view=np.zeros(len(image_ids), dtype=np.int16),
        whole=np.zeros((len(image_ids), feature_size), dtype=feature_dtype) if whole else None,
    )
    # Numbers too large for a type become inf, which is refused below.
    with np.errstate(over="ignore"):
        for row, image in zip(range(len(image_ids)), images, strict=False):
            _refuse_unsound(image)
            scores = image.scores.astype(np.float32)
            best = np.argsort(-scores, kind="stable")[:regions]
            rows.count[row] = n = len(best)
            rows.features[row, :n] = image.features[best]
            rows.boxes[row, :n] = image.boxes[best]
            rows.scores[row, :n] = scores[best]
            rows.classes[row, :n] = image.classes[best].astype(np.int16) + 1
            _refuse_too_large(image, "features", rows.features[row, :n], best)
            if rows.whole is not None:
                rows.whole[row] = image.whole
                _refuse_too_large(image, "whole", rows.whole[row])
    return rows


def _refuse_unsound(image: ImageRegions) -> None:
    """Raise as `region_rows`, except for features that don't fit into the shard's type."""
    with np.errstate(over="ignore"):
        boxes, scores = image.boxes.astype(np.float32), image.scores.astype(np.float32)
    numbers = {"features": image.features, "boxes": boxes, "scores": scores}
    if image.whole is not None:
        numbers["whole"] = image.whole
    for name, values in numbers.items():
        for index in first_true(~np.isfinite(values)):
            where = "".join(f"[{axis}]" for axis in index)
            value = getattr(image, name)[tuple(index)]
            refuse(image.where, f"{name}{where}", value, "a finite number")
    for (region,) in first_true(((boxes < 0) | (boxes > 1)).any(axis=1)):
        box = image.boxes[region].tolist()
        refuse(image.where, f"boxes[{region}]", box, "xyxy in [0, 1] of the image")
    for (region,) in first_true((boxes[:, 2:] < boxes[:, :2]).any(axis=1)):
        box = image.boxes[region].tolist()
        refuse(image.where, f"boxes[{region}]", box, "x0 <= x1 and y0 <= y1")
    for (region,) in first_true((image.classes < -1) | (image.classes > LARGEST_CLASS)):
        expected = f"a class id from 0 to {LARGEST_CLASS}, or -1 for none"
        refuse(image.where, f"classes[{region}]", image.classes[region], expected)


def _refuse_too_large(
    image: ImageRegions,
    name: str,
    stored: npt.NDArray[Any],
    best: npt.NDArray[np.intp] | None = None,
) -> None:
    """Refuse an image whose features were finite and no longer are in the shard's type.

    Args:
        image: the regions as they were read.
        name: of the field, `features` or `whole`.
        stored: the field as it will be stored: (n, d) for the best regions, or (d,).
        best: (n,) which regions those are.
    """
    for index in first_true(~np.isfinite(stored)):
        if best is not None:
            index[0] = int(best[index[0]])
        where = "".join(f"[{axis}]" for axis in index)
        remedy = "Set `extract.<dataset>.feature_dtype` to float32 in params.yaml"
        if stored.dtype.name == "float32":
            remedy = "Scale the features"
        refuse(
            image.where,
            f"{name}{where}",
            getattr(image, name)[tuple(index)],
            f"at most {np.finfo(stored.dtype).max:g}, the largest {stored.dtype.name}",
            f"{remedy}, and import again.",
        )


def first_true(breach: npt.ArrayLike) -> list[list[int]]:
    """The index of the first true value, as a list of one; an empty list if there is none."""
    indices: list[list[int]] = np.argwhere(breach)[:1].tolist() if np.any(breach) else []
    return indices


def refuse(
    where: str,
    name: str,
    found: object,
    expected: str,
    remedy: str = "Correct the file and import it again.",
) -> NoReturn:
    """Raise an `InputError` that names file and position, field, value found and expected."""
    raise InputError(f"{where}: {name} is {found}; expected {expected}.", remedy)


def refuse_no_file(path: Path) -> None:
    """Raise an `InputError` unless ``path`` is a plain file."""
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise_if_refused(error, path)
        raise InputError(
            f"{path} can't be read ({error.strerror}).", "Correct the path."
        ) from error
    if not plain:
        raise InputError(
            f"{path} is a folder or not a plain file.", "Name the file that holds the regions."
        )


def hash_file(path: Path, on_bytes: Callable[[int], object]) -> str:
    """Hex sha256 of a file; ``on_bytes`` is called with the number of bytes of each piece.

    Raises:
        InputError: the file can't be read.
    """
    refuse_no_file(path)
    hashing = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(CHUNK):
            hashing.update(chunk)
            on_bytes(len(chunk))
    return hashing.hexdigest()


def refuse_repeated(images: Iterable[ListedImage]) -> None:
    """Refuse the first of the images whose id an earlier one has."""
    known: dict[str, ListedImage] = {}
    for image in images:
        first = known.setdefault(image.file_id, image)
        if first is not image:
            expected = f"each image once; it is also {first.where}"
            refuse(image.where, "id", repr(image.file_id), expected)
