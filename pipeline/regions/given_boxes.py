"""Boxes that are given instead of found: the data set's own, or those of a file.

The detector then only describes them: its backbone, pooling and box head run, and its proposals and
predictions don't.

Letters: N boxes of a file, n boxes of an image, S side of a view in pixels. Boxes are xyxy.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.frames import read_headers
from pipeline.datasets.manifest import BoxTable, Manifest
from pipeline.errors import InputError
from pipeline.files import canonical_json, read_bytes
from pipeline.formats.encodings import plain_text
from pipeline.formats.npz import decoded_texts, naming_damage, npy_array, npy_header

if TYPE_CHECKING:  # it imports torch, which commands that only read manifests do without
    from pipeline.regions.transforms import Crop

SMALLEST_SIDE = 1e-2
"""Of a region, in pixels of the view; smaller ones are left out. It is torchvision's limit."""

_LARGEST_CLASS = np.iinfo(np.int16).max - 1
_BACKGROUND = "background"

_AXES = {"image_id": "N", "box": "N4", "score": "N", "class": "N"}
"""The arrays, or columns, of a file of boxes. It has a row for each box."""

_EXPECTED = {
    "image_id": "text",
    "box": "four numbers: x0, y0, x1, y1 in pixels of the upright photograph",
    "score": "a number",
    "class": "a whole number, or text",
}


@dataclass(frozen=True, eq=False)
class GivenRegions:
    """Regions that have no features yet.

    Attributes:
        boxes: (n, 4) float64, xyxy in [0,1] of the upright photograph, or of a view of it.
        scores: (n,) float32.
        classes: (n,) int16; 0 means none.
        size: width and height of the photograph in which the boxes were placed; None if that is
            not known.
    """

    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int16]
    size: tuple[int, int] | None = None


_NONE = GivenRegions(np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int16))


@dataclass(frozen=True, eq=False)
class GivenBoxes:
    """The boxes at which the features of a data set's images are pooled.

    Attributes:
        images: image id -> its boxes; an image that is not listed has none.
        classes: name of every class number, the first is the background; None if they are unknown.
        sha256: hex, over the boxes with their scores and class numbers.
    """

    images: Mapping[str, GivenRegions]
    classes: tuple[str, ...] | None
    sha256: str

    def of(self, image_id: str) -> GivenRegions:
        """The boxes of an image."""
        return self.images.get(image_id, _NONE)


def regions_in_view(
    given: GivenRegions, photograph: tuple[int, int], crop: Crop, *, size: int, most: int
) -> GivenRegions:
    """Find the regions of a view among those of its photograph.

    Boxes are clipped at the crop and mirrored with it. Those of which less than `SMALLEST_SIDE`
    remains are left out. The best come first: by descending score and, where scores are equal, by
    descending area in the view.

    Args:
        given: in the photograph.
        photograph: its width and height in pixels.
        crop: the part that the view shows.
        size: S.
        most: m, the number of regions that are kept.
    """
    low, high = np.array(crop.box[:2]), np.array(crop.box[2:])
    pixels = given.boxes * np.tile(photograph, 2)
    boxes = ((pixels - np.tile(low, 2)) / np.tile(high - low, 2)).clip(0, 1)
    if crop.mirrored:
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    sides = boxes[:, 2:] - boxes[:, :2]
    seen = np.flatnonzero((sides * size >= SMALLEST_SIDE).all(axis=1))
    # The last key is the first to be compared.
    order = seen[np.lexsort((-sides.prod(axis=1)[seen], -given.scores[seen]))][:most]
    return GivenRegions(boxes[order], given.scores[order], given.classes[order])


def annotated_boxes(table: BoxTable, manifest: Manifest) -> GivenBoxes:
    """Return the data set's own boxes, each with the score 1 and its class number in ``table``.

    Raises:
        InputError: no image has a box.
    """
    sizes = {row["image_id"]: _size_in(row) for row in _rows_of(manifest, table.images)}
    images = {
        image_id: GivenRegions(
            objects.boxes.astype(np.float64),
            np.ones(len(objects.classes), np.float32),
            objects.classes.astype(np.int16),
            sizes[image_id],
        )
        for image_id, objects in table.images.items()
        if image_id in sizes and len(objects.classes)
    }
    if not images:
        raise InputError(f"No image of {manifest.dataset} has an annotated box.")
    return GivenBoxes(images, (_BACKGROUND, *table.classes), _digest(images))


def read_box_file(path: Path, manifest: Manifest, root: Path) -> GivenBoxes:
    """Read the boxes of a file: an npz, or Parquet.

    It has a row for each box: ``image_id`` (N,) text, as in the manifest; ``box`` (N, 4), xyxy in
    pixels of the upright photograph; ``score`` (N,); and ``class`` (N,), either numbers from 1 to
    32766, or names, which are numbered from 1 in the order in which they first appear. The number 0
    and the empty name stand for an unknown class. A box that reaches up to a pixel beyond the
    photograph is clipped.

    Args:
        path: of the file.
        manifest: of the data set.
        root: the folder that the manifest's paths are relative to. The size of a photograph is
            read there where the manifest lacks it.

    Raises:
        InputError: the file is missing, damaged, or in another format; a column is missing or of
            another kind; or a row has an unknown image, a number that is not finite, or a box that
            is not within the photograph or has no area. Names the first row and its image.
        AccessError: the system can't read the file.
    """
    rows = _read(path)
    ids, boxes = rows["image_id"], rows["box"]
    if not ids:
        raise InputError(f"{path} has no rows.", _FIX)
    refuse = _Refusal(path, ids)
    photographs = {row["image_id"]: row for row in _rows_of(manifest, set(ids))}
    refuse.where(
        np.array([image_id not in photographs for image_id in ids]),
        lambda row: f"{manifest.dataset} has no such image",
        "an image id of the manifest",
    )
    scores = _stored_scores(refuse, rows["score"])
    classes, names = _class_numbers(refuse, rows["class"])
    sizes = _sizes(photographs, root)
    shares = _shares(refuse, boxes, [sizes[image_id] for image_id in ids])
    places: dict[str, list[int]] = {}
    for row, image_id in enumerate(ids):
        places.setdefault(image_id, []).append(row)
    # Of a photograph without a size, the header can't be read; extraction reports it.
    images = {
        key: GivenRegions(shares[at], scores[at], classes[at], sizes[key]) if sizes[key] else _NONE
        for key, at in places.items()
    }
    # Of the file's own numbers, so that it does not depend on which photographs can be read.
    asked = {key: GivenRegions(boxes[at], scores[at], classes[at]) for key, at in places.items()}
    return GivenBoxes(images, names, _digest(asked))


def _shares(
    refuse: _Refusal,
    boxes: npt.NDArray[np.float64],
    sizes: Sequence[tuple[int, int] | None],
) -> npt.NDArray[np.float64]:
    """Check boxes (N, 4) in pixels, and return them in [0,1] of their photographs.

    Args:
        refuse: of their file.
        sizes: N, width and height of each one's photograph; None if that is not known.
    """

    def found(row: int) -> str:
        return f"box is {boxes[row].tolist()}"

    refuse.where(~np.isfinite(boxes).all(axis=1), found, "finite numbers")
    if boxes.max() <= 1:
        raise InputError(
            f"{refuse.path}: no coordinate of its boxes is above 1, so they are probably shares of "
            "width and height; expected pixels of the upright photograph.",
            "Multiply x by the photograph's width and y by its height.",
        )
    limits = np.tile(np.array([size or (np.inf, np.inf) for size in sizes]), 2)
    refuse.where(
        ((boxes < -1) | (boxes > limits + 1)).any(axis=1),
        found,
        lambda row: "xyxy within the {:g} x {:g} pixels of its photograph".format(*limits[row]),
    )
    clipped = boxes.clip(0, limits)
    refuse.where(
        (clipped[:, 2:] <= clipped[:, :2]).any(axis=1),
        found,
        "xyxy in pixels of the photograph with x0 < x1 and y0 < y1",
    )
    shares: npt.NDArray[np.float64] = clipped / limits
    return shares


_FIX = "Correct the file and run the same command again."


class _Refusal:
    """Refuses rows of a file.

    Attributes:
        path: of the file.
        ids: N, each row's image.
    """

    def __init__(self, path: Path, ids: Sequence[str]) -> None:
        self.path = path
        self.ids = ids

    def where(
        self,
        broken: Any,
        found: Callable[[int], str],
        expected: str | Callable[[int], str],
    ) -> None:
        """Raise an `InputError` that names the first row of which ``broken`` (N,) is true."""
        if not broken.any():
            return
        row = int(broken.argmax())
        wanted = expected if isinstance(expected, str) else expected(row)
        rows = int(broken.sum())
        others = f" {rows} rows are like this." if rows > 1 else ""
        raise InputError(
            f"{self.path}, row {row} ({self.ids[row]!r}): {found(row)}; expected {wanted}.{others}",
            _FIX,
        )


def _stored_scores(refuse: _Refusal, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The scores (N,) in the type of a cache."""
    with np.errstate(over="ignore"):  # a number too large for the type becomes infinite
        stored = scores.astype(np.float32)
    refuse.where(
        ~np.isfinite(stored), lambda row: f"score is {scores[row]}", "a finite number in float32"
    )
    return stored


def _class_numbers(
    refuse: _Refusal, given: npt.NDArray[np.int64] | list[str]
) -> tuple[npt.NDArray[np.int16], tuple[str, ...] | None]:
    """The class numbers (N,) and their names; None where the file has numbers."""
    if isinstance(given, list):
        texts = [plain_text(name) for name in given]
        numbers = {name: at for at, name in enumerate(dict.fromkeys(filter(None, texts)), 1)}
        classes = np.array([numbers.get(name, 0) for name in texts], dtype=np.int64)
        names: tuple[str, ...] | None = (_BACKGROUND, *numbers)
    else:
        classes, names = given, None
    refuse.where(
        (classes < 0) | (classes > _LARGEST_CLASS),
        lambda row: f"class is {classes[row]}",
        f"1 to {_LARGEST_CLASS}, or 0 for an unknown one",
    )
    return classes.astype(np.int16), names


def _rows_of(manifest: Manifest, image_ids: Any) -> list[dict[str, Any]]:
    """The manifest's rows of these images: their id, path, width and height."""
    columns = manifest.table.select(["image_id", "path", "width", "height"])
    return [row for row in columns.to_pylist() if row["image_id"] in image_ids]


def _size_in(row: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height in a row of the manifest."""
    return None if row["width"] is None else (row["width"], row["height"])


def _sizes(
    photographs: Mapping[str, Mapping[str, Any]], root: Path
) -> dict[str, tuple[int, int] | None]:
    """The size of each upright photograph, from the manifest or else from its header."""
    sizes = {image_id: _size_in(row) for image_id, row in photographs.items()}
    unknown = [image_id for image_id, size in sizes.items() if size is None]
    headers = read_headers([root / photographs[image_id]["path"] for image_id in unknown])
    for image_id, header in zip(unknown, headers, strict=True):
        sizes[image_id] = None if header is None else header.size("upright")
    return sizes


def _digest(images: Mapping[str, GivenRegions]) -> str:
    """Hex sha256 over the regions of all images, by image id."""
    digest = hashlib.sha256()
    for image_id in sorted(images):
        one = images[image_id]
        digest.update(canonical_json([image_id, len(one.scores)]).encode())
        for values, kind in ((one.boxes, "<f8"), (one.scores, "<f4"), (one.classes, "<i2")):
            digest.update(values.astype(kind).tobytes())
    return digest.hexdigest()


# --- the file ------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """The columns of a file: `image_id` a list of texts, `box` (N, 4) and `score` (N,) float64, and
    `class` (N,) int64 or a list of texts."""
    readers = {".npz": _read_npz, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{path} is no file of boxes: its name ends in {path.suffix!r}, expected .npz or "
            ".parquet.",
            "Save the boxes in one of these formats, and name the file in `boxes_file`.",
        )
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"There is no file of boxes at {path}.",
            "Put it there, or name another one in `extract.<dataset>.boxes_file`.",
        ) from None
    return readers[path.suffix.lower()](path, content)


def _refuse_missing(path: Path, found: Sequence[str]) -> None:
    """Refuse a file that lacks an array or a column, and name those that it has."""
    if missing := [name for name in _AXES if name not in found]:
        raise InputError(
            f"{path} lacks {', '.join(f'`{name}`' for name in missing)}; it has "
            f"{', '.join(sorted(found)[:20]) or 'nothing'}.",
            f"Save it with {', '.join(f'`{name}`' for name in _AXES)}, one row for each box.",
        )


def _refuse_kind(path: Path, name: str, found: object, remedy: str = _FIX) -> NoReturn:
    raise InputError(
        f"{path}, `{name}`: found {found}, expected {_EXPECTED[name]} for each box.", remedy
    )


def _read_npz(path: Path, content: bytes) -> dict[str, Any]:
    with naming_damage(path, "Save it again with `numpy.savez`."):
        archive = zipfile.ZipFile(BytesIO(content))
        _refuse_missing(path, [name.removesuffix(".npy") for name in archive.namelist()])
        columns: dict[str, Any] = {}
        rows = npy_header(archive, "image_id").shape[:1]
        for name, axes in _AXES.items():
            header = npy_header(archive, name)
            shape = (*rows, 4)[: len(axes)]
            kinds = {"image_id": "US", "class": "iuUS"}.get(name, "fiu")
            if header.dtype.kind not in kinds or header.dtype.itemsize == 0:
                cast = {"image_id": "str", "class": "numpy.int64` or `str"}
                save = f"`{cast.get(name, 'numpy.float64')}`"
                remedy = f"Convert the array with `astype` to {save}, and save it again."
                _refuse_kind(path, name, f"an array of {header.dtype}", remedy)
            if header.shape != shape:
                _refuse_kind(path, name, f"the shape {header.shape} beside {rows} of `image_id`")
            if archive.getinfo(f"{name}.npy").file_size != header.size:
                raise ValueError(f"{name} has another size than its header says")
            array = npy_array(archive, name)
            columns[name] = (
                decoded_texts(array)
                if array.dtype.kind in "US"
                else array.astype(np.int64 if name == "class" else np.float64)
            )
    return columns


def _read_parquet(path: Path, content: bytes) -> dict[str, Any]:
    try:
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)  # texts may not be UTF-8
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a complete Parquet file: {error}.", _FIX) from error
    _refuse_missing(path, table.column_names)
    return {name: _column(path, name, table.column(name)) for name in _AXES}


def _column(path: Path, name: str, column: pa.ChunkedArray) -> Any:
    """A column of Parquet, as `_read` returns it."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        _refuse_kind(path, name, f"null in row {row}")
    kind = column.type
    if name == "box" and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        lengths = pc.list_value_length(column).to_numpy()
        if (lengths != 4).any():
            row = int((lengths != 4).argmax())
            _refuse_kind(path, name, f"a list of {lengths[row]} in row {row}")
        numbers = pc.list_flatten(column)
        if numbers.null_count:
            row = numbers.is_null().to_pylist().index(True) // 4
            _refuse_kind(path, name, f"null in row {row}")
        if _is_numeric(numbers.type):
            return numbers.to_numpy().astype(np.float64).reshape(-1, 4)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if name in ("image_id", "class") and is_text:
        return column.to_pylist()
    if name == "class" and pa.types.is_integer(kind):
        return column.to_numpy().astype(np.int64)
    if name == "score" and _is_numeric(kind):
        return column.to_numpy().astype(np.float64)
    _refuse_kind(path, name, f"a column of {kind}")


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
