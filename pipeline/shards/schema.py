"""The contents of a shard: region rows, their checksums, and the recipe that decides them.

Letters of axes, here and in all of `pipeline.shards`: R rows, m regions of a row, d feature size.
A row is one view of one image.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, MismatchError
from pipeline.files import canonical_json, sha256_json

FORMAT_NAME = "gmpipe-regions"
FORMAT_VERSION = 2
"""The newest version: version 1 with the field `whole`. Rows without it are written as version 1,
so that caches that were made before stay what they are."""

WHOLE = "whole"

AXES = {
    "features": "Rmd",
    "boxes": "Rm4",
    "scores": "Rm",
    "classes": "Rm",
    "count": "R",
    "image_id": "R",
    "view": "R",
    WHOLE: "Rd",
}
"""The axes of each field of a row, in the order of the fields; `4` is an axis of length 4. Rows of
version 1 lack the field `whole`."""

OF_REGIONS = tuple(field for field, axes in AXES.items() if axes.startswith("Rm"))
"""The fields with one entry per region."""

DTYPES: dict[str, tuple[str, ...]] = {
    "features": ("float16", "float32"),
    "boxes": ("float32",),
    "scores": ("float32",),
    "classes": ("int16",),
    "count": ("int16",),
    "view": ("int16",),
    WHOLE: ("float16", "float32"),
    "row_crc32": ("uint32",),
}
"""The types that a field may have, little-endian; `image_id` is bytes of any fixed width, and
`whole` has the type of `features`."""

CHECKSUMS = "row_crc32"

Recipe = Mapping[str, str | int | float | bool | None]
"""Everything that decides the features, and nothing else: flat, of JSON scalars.

Its field `images` is a digest of the images. A shard's covers only its own rows, so that a changed
or added photograph costs no other shard. All other fields are the same in the whole cache."""

IMAGES = "images"


def format_recipe(*, whole: bool) -> dict[str, str | int | float | bool | None]:
    """The recipe's fields for the format: its version and, where rows have it, the field `whole`.

    A recipe of version 1 says nothing of `whole`, so that its fingerprint stays the same.
    """
    return {"format_version": FORMAT_VERSION, WHOLE: True} if whole else {"format_version": 1}


def holds_whole(recipe: Recipe) -> bool:
    """Whether rows of this recipe have the field `whole`."""
    return recipe.get(WHOLE) is True


def fields_of(*, whole: bool) -> tuple[str, ...]:
    """The fields of rows with or without `whole`, in the order of `AXES`."""
    return tuple(field for field in AXES if whole or field != WHOLE)


@dataclass(frozen=True, eq=False)
class RegionRows:
    """The regions of R views of images, best score first.

    A row has `count` real regions, at least one. All values of its other regions are zero.
    """

    features: npt.NDArray[np.floating[Any]]
    """(R, m, d) float16 or float32: the box head's vector of each region."""
    boxes: npt.NDArray[np.float32]
    """(R, m, 4) float32: xyxy in [0, 1] of that view, x0 <= x1 and y0 <= y1."""
    scores: npt.NDArray[np.float32]
    """(R, m) float32: detection scores, descending over the real regions."""
    classes: npt.NDArray[np.int16]
    """(R, m) int16: the detector's own class ids; 0 means none."""
    count: npt.NDArray[np.int16]
    """(R,) int16: number of real regions of the row, 1 to m."""
    image_id: npt.NDArray[np.bytes_]
    """(R,) fixed-width bytes: UTF-8, padded with NUL; not empty."""
    view: npt.NDArray[np.int16]
    """(R,) int16: 0 is the whole image, 1 and up are its random crops."""
    whole: npt.NDArray[np.floating[Any]] | None = None
    """(R, d) of the features' type: the box head's vector of the whole view. None in format version
    1, for all rows of a cache alike."""

    def __len__(self) -> int:
        """R, the number of rows."""
        return len(self.count)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that these rows have, in the order of `AXES`."""
        return fields_of(whole=self.whole is not None)

    def take(self, indices: npt.ArrayLike) -> RegionRows:
        """Copy the rows at ``indices`` (N,), in that order. Indices may repeat."""
        chosen = np.asarray(indices, dtype=np.intp)
        return RegionRows(**{field: getattr(self, field)[chosen] for field in self.fields})

    @staticmethod
    def concatenate(parts: Sequence[RegionRows]) -> RegionRows:
        """Join the rows of ``parts``, in order.

        Raises:
            ValueError: there are no parts, or they differ in m, d, feature dtype or fields.
        """
        layouts = {
            (part.features.shape[1:], str(part.features.dtype), part.fields) for part in parts
        }
        if len(layouts) != 1:
            raise ValueError(
                f"parts must agree in (m, d), feature dtype and fields; found {layouts}"
            )
        [(_, _, fields)] = layouts
        return RegionRows(
            **{field: np.concatenate([getattr(part, field) for part in parts]) for field in fields}
        )

    def check(self) -> None:
        """Check the rows against the contract of this class.

        Raises:
            InputError: a row breaks it. Names the row, its image id, the field, the value found
                and the one expected.
        """
        for field in self.fields:
            breach = layout_breach(field, getattr(self, field), self.features)
            if breach:
                raise InputError(f"Region rows{self._first_image()}: {breach}.", _WRITE_AGAIN)
        for row, (found, expected) in self.breaches().items():
            image_id = self.image_id[row].decode(errors="replace")
            raise InputError(
                f"Image {image_id!r} (row {row}): {found}; expected {expected}.", _WRITE_AGAIN
            )

    def breaches(self) -> dict[int, tuple[str, str]]:
        """The first breach of this class's contract in each row, by row number.

        A breach is two texts: what was found, e.g. `view is -1`, and what was expected. Dtypes and
        shapes must be those of the contract.
        """
        noted = _Breaches(self)
        regions = self.features.shape[1]
        ids = self.image_id.tolist()
        noted.add("image_id", [not image_id for image_id in ids], "the image's id, not empty")
        noted.add("image_id", [not _is_text(image_id) for image_id in ids], "UTF-8")
        noted.add("view", self.view < 0, "0 or more")
        noted.add("count", (self.count < 1) | (self.count > regions), f"1 to {regions}")

        padding = np.arange(regions) >= self.count[:, None]  # (R, m)
        for field in ("features", "boxes", "scores", WHOLE):
            array = getattr(self, field)
            if array is None:
                continue
            suspects = ~_rows_finite(array)
            if suspects.any():
                broken = np.zeros(array.shape, dtype=np.bool_)
                broken[suspects] = ~np.isfinite(array[suspects])
                noted.add(field, broken, "a finite number")
        if padding.any():
            for field in ("features", "boxes", "scores", "classes"):
                array = getattr(self, field)
                filled = np.zeros_like(padding)
                filled[padding] = _nonzero(array[padding]).any(axis=tuple(range(1, array.ndim - 1)))
                noted.add(field, filled, "zeros, since the row has fewer real regions")
        low, high = self.boxes[..., :2], self.boxes[..., 2:]
        noted.add("boxes", ((self.boxes < 0) | (self.boxes > 1)).any(axis=2), "xyxy in [0, 1]")
        noted.add("boxes", (high < low).any(axis=2), "x0 <= x1 and y0 <= y1")
        rising = np.zeros_like(padding)
        rising[:, 1:] = (self.scores[:, 1:] > self.scores[:, :-1]) & ~padding[:, 1:]
        noted.add("scores", rising, "descending scores, none above the one before it")
        return noted.first

    def _first_image(self) -> str:
        """The first image's id, for breaches of all rows, which may be malformed."""
        if self.image_id.dtype.kind == "S" and self.image_id.size:
            return f" from image {self.image_id.flat[0].decode(errors='replace')!r} on"
        return ""


_WRITE_AGAIN = "Correct what these regions were made from, and write them again."


class _Breaches:
    """Collects the first breach of each row.

    Attributes:
        first: by row number, what was found and what was expected.
    """

    def __init__(self, rows: RegionRows) -> None:
        self._rows = rows
        self.first: dict[int, tuple[str, str]] = {}

    def add(self, field: str, broken: npt.ArrayLike, expected: str) -> None:
        """Note where ``broken``, whose first axis is the rows, is true."""
        # `any` first, since looking for the positions takes far longer.
        for row, *index in np.argwhere(broken) if np.any(broken) else ():
            value = getattr(self._rows, field)[row, *index]
            if isinstance(value, np.ndarray):
                value = np.array2string(value, precision=6, threshold=8)
            where = "".join(f"[{axis}]" for axis in index)
            self.first.setdefault(int(row), (f"{field}{where} is {value}", expected))


class _Array(Protocol):
    """What is known of an array before it is read, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def layout_breach(field: str, array: _Array, features: _Array) -> str | None:
    """Describe what is wrong with a field's dtype or shape; None if nothing is.

    Args:
        field: a field of the rows, or `row_crc32`.
        array: the field.
        features: (R, m, d), which sets the lengths of the axes and the type of `whole`.
    """
    names = DTYPES.get(field, ())
    if field == WHOLE:
        names = (features.dtype.name,)
    dtype, shape = array.dtype, array.shape
    known = [np.dtype(name).newbyteorder("<") for name in names]
    if dtype not in known and not (field == "image_id" and dtype.kind == "S"):
        expected = " or ".join(names) or "fixed-width bytes"
        return f"{field} has dtype {dtype}; expected {expected}"
    if len(features.shape) != 3 or 0 in features.shape[1:]:
        return f"features has shape {features.shape}; expected (R, m, d) with m and d above 0"
    lengths = dict(zip("Rmd4", (*features.shape, 4), strict=True))
    expected_shape = tuple(lengths[axis] for axis in AXES.get(field, "R"))
    if shape != expected_shape:
        return f"{field} has shape {shape}; expected {expected_shape}"
    return None


def row_bytes(
    regions: int, feature_size: int, feature_dtype: str, id_width: int, *, whole: bool
) -> int:
    """Bytes that a row takes in a shard: its fields and its checksum.

    Args:
        regions, feature_size, feature_dtype: m, d and the type of the features.
        id_width: bytes of an image id, padding included.
        whole: whether the row has the field `whole`.
    """
    lengths = {"R": 1, "m": regions, "d": feature_size, "4": 4}
    widths = {field: np.dtype(dtypes[0]).itemsize for field, dtypes in DTYPES.items()}
    widths |= dict.fromkeys(("features", WHOLE), np.dtype(feature_dtype).itemsize)
    widths["image_id"] = id_width
    axes = {**{field: AXES[field] for field in fields_of(whole=whole)}, CHECKSUMS: "R"}
    return sum(math.prod(lengths[axis] for axis in axes[field]) * widths[field] for field in axes)


def row_checksums(rows: RegionRows) -> npt.NDArray[np.uint32]:
    """Compute the crc32 (R,) uint32 of each row over its fields' stored bytes, in `AXES` order.

    The NULs that pad an image id are left out, so that the checksum does not depend on the width of
    the column, which the other rows decide.
    """
    columns = [np.ascontiguousarray(getattr(rows, field)) for field in rows.fields]
    sums = np.empty(len(rows), dtype=np.uint32)
    for row in range(len(rows)):
        value = 0
        for column in columns:
            # numpy returns an element of `image_id` without its trailing NULs.
            value = zlib.crc32(column[row], value)
        sums[row] = value
    return sums


def fingerprint(recipe: Recipe) -> str:
    """Hex sha256 of a recipe. The order of its fields does not matter."""
    return sha256_json(dict(recipe))


def without_images(recipe: Recipe) -> Recipe:
    """The part of a recipe that a cache and all its shards have in common."""
    return {field: value for field, value in recipe.items() if field != IMAGES}


def recipe_differences(found: Recipe, expected: Recipe) -> str:
    """Name the fields in which two recipes differ, with both values; empty if there are none."""
    # Compared as they are hashed: 1, 1.0 and True are equal in Python, but not in JSON.
    values = [
        {field: canonical_json(value) for field, value in recipe.items()}
        for recipe in (found, expected)
    ]
    return "; ".join(
        f"{field} is {values[0].get(field, 'absent')}, expected {values[1].get(field, 'absent')}"
        for field in sorted({*found, *expected})
        if values[0].get(field) != values[1].get(field)
    )


def check_same_recipe(
    found: Recipe,
    expected: Recipe,
    where: str,
    remedy: str = "Restore the settings that it was made with, or make it again.",
) -> None:
    """Refuse features that were made another way.

    Args:
        found: the recipe that the features were made with.
        expected: the one that they should have been made with.
        where: what has the recipe ``found``, e.g. the path of a shard.
        remedy: of the error.

    Raises:
        MismatchError: names ``where`` and every field that differs, with both values.
    """
    if differences := recipe_differences(found, expected):
        raise MismatchError(f"{where} was made with other settings: {differences}.", remedy)


def _rows_finite(array: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """Which rows (R,) hold only finite numbers."""
    if array.dtype.itemsize == 2:
        # Row by row, so that intermediate results stay in the processor's cache.
        return np.array([_magnitude(row).max() < 0x7C00 for row in array], dtype=np.bool_)
    finite: npt.NDArray[np.bool_] = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    return finite


def _nonzero(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    half = values.dtype.kind == "f" and values.dtype.itemsize == 2
    return np.not_equal(_magnitude(values) if half else values, 0)


def _magnitude(halves: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """The bits of float16 numbers without their signs, which order them by magnitude.

    0x7C00 is infinity, and the NaNs are above it. numpy converts every float16 to a wider type
    before it computes with it, so comparing bits is many times faster.
    """
    return halves.view("<u2") & np.uint16(0x7FFF)


def _is_text(stored: bytes) -> bool:
    try:
        stored.decode()
    except UnicodeDecodeError:
        return False
    return True
