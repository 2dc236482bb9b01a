"""What a shard holds: region rows, their checksums, and the recipe that decides them.

Letters of axes, here and in the whole room: R rows, m regions of a row, d feature size. A row is
one view of one image.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import GmpipeError
from pipeline.files import canonical_json, sha256_json

FORMAT_NAME = "gmpipe-regions"
FORMAT_VERSION = 1

AXES = {
    "features": "Rmd",
    "boxes": "Rm4",
    "scores": "Rm",
    "classes": "Rm",
    "count": "R",
    "image_id": "R",
    "view": "R",
}
"""The fields of a row in their one order, with their axes; `4` is the axis of that length."""

OF_REGIONS = tuple(field for field, axes in AXES.items() if axes.startswith("Rm"))
"""Those that have an entry a region."""

DTYPES: dict[str, tuple[str, ...]] = {
    "features": ("float16", "float32"),
    "boxes": ("float32",),
    "scores": ("float32",),
    "classes": ("int16",),
    "count": ("int16",),
    "view": ("int16",),
    "row_crc32": ("uint32",),
}
"""What a field may be stored as, little-endian; `image_id` is bytes of any fixed width."""

CHECKSUMS = "row_crc32"
INDEX_NAME = "index.parquet"
INDEX_VERSION = 2

Recipe = Mapping[str, str | int | float | bool | None]
"""Everything that decides the features, and nothing else: flat, of JSON scalars.

Its field `images` is a digest over the images; a shard's is over its own rows alone, so that a
changed or added photograph costs no other shard. All other fields are those of the whole cache."""

IMAGES = "images"


@dataclass(frozen=True)
class ShardEntry:
    """What the index records of a shard file."""

    name: str
    """File name, in the folder of the index."""
    sha256: str
    """Hex sha256 of the file."""
    bytes: int
    """Size of the file."""
    rows: int
    """R, the rows it holds."""
    fingerprint: str
    """Of the shard's own recipe."""


@dataclass(frozen=True, eq=False)
class RegionRows:
    """The regions of R views of images, best score first.

    A row has `count` real regions, at least one; everything of its other regions is zero.
    """

    features: npt.NDArray[np.floating[Any]]
    """(R, m, d) float16 or float32: the box head's vector of each region."""
    boxes: npt.NDArray[np.float32]
    """(R, m, 4) float32: xyxy in [0, 1] of that view, x0 <= x1 and y0 <= y1."""
    scores: npt.NDArray[np.float32]
    """(R, m) float32: detection scores, descending over the real regions."""
    classes: npt.NDArray[np.int16]
    """(R, m) int16: the detector's own class ids, 0 none."""
    count: npt.NDArray[np.int16]
    """(R,) int16: real regions of the row, 1 to m."""
    image_id: npt.NDArray[np.bytes_]
    """(R,) fixed-width bytes: UTF-8, padded with NUL; not empty."""
    view: npt.NDArray[np.int16]
    """(R,) int16: 0 is the plain image, 1 and up are its random crops."""

    def __len__(self) -> int:
        """R, the number of rows."""
        return len(self.count)

    def take(self, indices: npt.ArrayLike) -> RegionRows:
        """Copy the rows at ``indices`` (N,), in that order; repeats are allowed."""
        chosen = np.asarray(indices, dtype=np.intp)
        return RegionRows(**{field: getattr(self, field)[chosen] for field in AXES})

    @staticmethod
    def concatenate(parts: Sequence[RegionRows]) -> RegionRows:
        """All rows of ``parts``, in order.

        Raises:
            ValueError: there are no parts, or they differ in m, d or feature dtype.
        """
        layouts = {(part.features.shape[1:], str(part.features.dtype)) for part in parts}
        if len(layouts) != 1:
            raise ValueError(f"parts must agree in (m, d) and feature dtype; found {layouts}")
        return RegionRows(
            **{field: np.concatenate([getattr(part, field) for part in parts]) for field in AXES}
        )

    def check(self) -> None:
        """Hold the rows to the contract of this class.

        Raises:
            GmpipeError: names the row, its image id, the field, what was found and expected.
        """
        for field in AXES:
            array = getattr(self, field)
            breach = layout_breach(field, array.shape, array.dtype, self.features.shape)
            if breach:
                raise GmpipeError(f"Region rows{self._first_image()}: {breach}. {_WRITE_AGAIN}")
        for row, (found, expected) in self.breaches().items():
            image_id = self.image_id[row].decode(errors="replace")
            raise GmpipeError(
                f"Image {image_id!r} (row {row}): {found}; expected {expected}. {_WRITE_AGAIN}"
            )

    def breaches(self) -> dict[int, tuple[str, str]]:
        """The first breach of this class's contract in each row, by number of row.

        Each as two texts: what was found, e.g. `view is -1`, and what was expected.

        Dtypes and shapes are those of the contract.
        """
        first: dict[int, tuple[str, str]] = {}

        def note(field: str, broken: npt.ArrayLike, expected: str) -> None:
            # `any` first: to look for places takes far longer.
            for row, *place in np.argwhere(broken) if np.any(broken) else ():
                found = getattr(self, field)[row, *place]
                if isinstance(found, np.ndarray):
                    found = np.array2string(found, precision=6, threshold=8)
                where = "".join(f"[{axis}]" for axis in place)
                first.setdefault(int(row), (f"{field}{where} is {found}", expected))

        regions = self.features.shape[1]
        ids = self.image_id.tolist()
        note("image_id", [not image_id for image_id in ids], "the image's id, not empty")
        note("image_id", [not _is_text(image_id) for image_id in ids], "UTF-8")
        note("view", self.view < 0, "0 or more")
        note("count", (self.count < 1) | (self.count > regions), f"1 to {regions}")

        padding = np.arange(regions) >= self.count[:, None]  # (R, m)
        for field in ("features", "boxes", "scores"):
            array = getattr(self, field)
            suspects = ~_rows_finite(array)
            if suspects.any():
                broken = np.zeros(array.shape, dtype=np.bool_)
                broken[suspects] = ~np.isfinite(array[suspects])
                note(field, broken, "a finite number")
        if padding.any():
            for field in ("features", "boxes", "scores", "classes"):
                array = getattr(self, field)
                filled = np.zeros_like(padding)
                filled[padding] = _nonzero(array[padding]).any(axis=tuple(range(1, array.ndim - 1)))
                note(field, filled, "zeros, since the row has fewer real regions")
        low, high = self.boxes[..., :2], self.boxes[..., 2:]
        note("boxes", ((self.boxes < 0) | (self.boxes > 1)).any(axis=2), "xyxy in [0, 1]")
        note("boxes", (high < low).any(axis=2), "x0 <= x1 and y0 <= y1")
        rising = np.zeros_like(padding)
        rising[:, 1:] = (self.scores[:, 1:] > self.scores[:, :-1]) & ~padding[:, 1:]
        note("scores", rising, "descending scores, none above the one before it")
        return first

    def _first_image(self) -> str:
        """The first image's id, for breaches that concern every row; rows may be malformed."""
        if self.image_id.dtype.kind == "S" and self.image_id.size:
            return f" from image {self.image_id.flat[0].decode(errors='replace')!r} on"
        return ""


_WRITE_AGAIN = "Correct what these regions were made from, and write them again."


def layout_breach(
    field: str, shape: tuple[int, ...], dtype: np.dtype[Any], features_shape: tuple[int, ...]
) -> str | None:
    """What is wrong with a field's dtype or shape, or None.

    Args:
        field: a field of the rows, or `row_crc32`.
        features_shape: the shape (R, m, d) of `features`, which gives the axes their lengths.
    """
    expected = " or ".join(DTYPES.get(field, ("fixed-width bytes",)))
    known = [np.dtype(name).newbyteorder("<") for name in DTYPES.get(field, ())]
    if dtype not in known and not (field == "image_id" and dtype.kind == "S"):
        return f"{field} has dtype {dtype}; expected {expected}"
    if len(features_shape) != 3 or 0 in features_shape[1:]:
        return f"features has shape {features_shape}; expected (R, m, d) with m and d above 0"
    lengths = dict(zip("Rmd4", (*features_shape, 4), strict=True))
    expected_shape = tuple(lengths[axis] for axis in AXES.get(field, "R"))
    if shape != expected_shape:
        return f"{field} has shape {shape}; expected {expected_shape}"
    return None


def row_checksums(rows: RegionRows) -> npt.NDArray[np.uint32]:
    """crc32 (R,) uint32 of each row: over its fields' stored bytes, in the order of `AXES`.

    The NULs that pad an image id are left out, so that the width of the column, which depends on
    the other rows, doesn't matter.
    """
    columns = [np.ascontiguousarray(getattr(rows, field)) for field in AXES]
    sums = np.empty(len(rows), dtype=np.uint32)
    for row in range(len(rows)):
        value = 0
        for column in columns:
            # numpy gives an element of `image_id` as bytes without their trailing NULs.
            value = zlib.crc32(column[row], value)
        sums[row] = value
    return sums


def fingerprint(recipe: Recipe) -> str:
    """Hex sha256 of a recipe, independent of the order of its fields."""
    return sha256_json(dict(recipe))


def without_images(recipe: Recipe) -> Recipe:
    """What the recipes of a cache and of each of its shards have in common."""
    return {field: value for field, value in recipe.items() if field != IMAGES}


DROP_OR_RESTORE = (
    "Pass `--replace` to `gmpipe extract` to drop these shards and extract again, or restore the "
    "old setting."
)


def check_same_recipe(
    found: Recipe, expected: Recipe, where: str, next_step: str = DROP_OR_RESTORE
) -> None:
    """Refuse features that were made another way.

    Args:
        where: what was found to have the recipe ``found``, e.g. the path of a shard.
        next_step: the end of the error's message.

    Raises:
        GmpipeError: names ``where`` and every field that differs, with both values.
    """
    # Compared as they are hashed: 1, 1.0 and True are equal in Python, but not in JSON.
    values = [
        {field: canonical_json(value) for field, value in recipe.items()}
        for recipe in (found, expected)
    ]
    differences = [
        f"{field} is {values[0].get(field, 'absent')}, expected {values[1].get(field, 'absent')}"
        for field in sorted({*found, *expected})
        if values[0].get(field) != values[1].get(field)
    ]
    if differences:
        raise GmpipeError(
            f"{where} was made with other settings: {'; '.join(differences)}. {next_step}"
        )


def _rows_finite(array: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """Whether all numbers of a row (R,) are finite."""
    if array.dtype.itemsize == 2:
        # Row by row, so that what is made of a row stays in the processor's cache.
        return np.array([_magnitude(row).max() < 0x7C00 for row in array], dtype=np.bool_)
    finite: npt.NDArray[np.bool_] = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    return finite


def _nonzero(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    half = values.dtype.kind == "f" and values.dtype.itemsize == 2
    return np.not_equal(_magnitude(values) if half else values, 0)


def _magnitude(halves: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """The bits of float16 numbers without their signs, which order them by magnitude.

    0x7C00 is infinity, and above it are the NaNs. numpy widens every half that it computes with;
    to look at the bits is many times faster.
    """
    return halves.view("<u2") & np.uint16(0x7FFF)


def _is_text(stored: bytes) -> bool:
    try:
        stored.decode()
    except UnicodeDecodeError:
        return False
    return True
