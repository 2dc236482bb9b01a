"""Regions that were made elsewhere: an npz of arrays, or the TSV of bottom-up-attention.

Both are read as streams, an image at a time, and both are untrusted: they are read through once
before the first region is used, and what they declare is held against their sizes before memory is
taken for it. Class ids count from 0 in these files and from 1 in a shard, where 0 means none.

Letters, besides the room's R rows, m regions and d feature size: N images of a file, M places for
regions that an npz has for each image, n regions of one image, C labels.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import re
import stat
import struct
import zipfile
import zlib
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from pipeline.errors import GmpipeError
from pipeline.files import sha256_json
from pipeline.shards.schema import RegionRows

_CHUNK = 1 << 20  # bytes read at once
_LONGEST_LINE = 1 << 26  # bytes; 100 boxes of 2048 numbers take 1.1 million
_LARGEST_CLASS = np.iinfo(np.int16).max - 1

OnBytes = Callable[[int, int], None]
"""Told how many bytes were read since the last call, and how many there are in all."""


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """What a file says of one image, in the file's own order and types.

    Attributes:
        where: file and place, for messages.
        features: (n, d), any float type.
        boxes: (n, 4), any float type, xyxy in [0,1] of the image.
        scores: (n,), any float type.
        classes: (n,), any integer type, from 0.
    """

    where: str
    features: npt.NDArray[Any]
    boxes: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    classes: npt.NDArray[Any]


def region_rows(
    images: Iterable[ImageRegions],
    image_ids: Sequence[str],
    *,
    regions: int,
    feature_size: int,
    feature_dtype: str,
) -> RegionRows:
    """View 0 of R images: of each its best ``regions``, in descending order of their scores.

    Regions of equal score stay in the file's order.

    Args:
        images: R or more, with at least one region each.
        image_ids: R, as in the manifest.
        regions: m.
        feature_size: d.
        feature_dtype: `float16` or `float32`.

    Raises:
        GmpipeError: a number is not finite or does not fit into its type, a box is not within the
            image or has a negative side, or a class id is not one. Names file, place and region.
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
            for region, component in _first(~np.isfinite(rows.features[row, :n])):
                value = image.features[best[region], component]
                remedy = "Set `extract.<dataset>.feature_dtype` to float32 in params.yaml"
                if feature_dtype == "float32":
                    remedy = "Scale the features"
                _refuse(
                    image.where,
                    f"features[{best[region]}][{component}]",
                    value,
                    f"at most {np.finfo(feature_dtype).max:g}, which is what {feature_dtype} holds",
                    f"{remedy}, and import again.",
                )
    return rows


def _refuse_unsound(image: ImageRegions) -> None:
    """Raise as `region_rows`, but for features that don't fit into the shard's type."""
    with np.errstate(over="ignore"):
        boxes, scores = image.boxes.astype(np.float32), image.scores.astype(np.float32)
    for name, values in (("features", image.features), ("boxes", boxes), ("scores", scores)):
        for place in _first(~np.isfinite(values)):
            where = "".join(f"[{axis}]" for axis in place)
            found = getattr(image, name)[tuple(place)]
            _refuse(image.where, f"{name}{where}", found, "a finite number")
    for (region,) in _first(((boxes < 0) | (boxes > 1)).any(axis=1)):
        found = image.boxes[region].tolist()
        _refuse(image.where, f"boxes[{region}]", found, "xyxy in [0, 1] of the image")
    for (region,) in _first((boxes[:, 2:] < boxes[:, :2]).any(axis=1)):
        found = image.boxes[region].tolist()
        _refuse(image.where, f"boxes[{region}]", found, "x0 <= x1 and y0 <= y1")
    for (region,) in _first((image.classes < 0) | (image.classes > _LARGEST_CLASS)):
        expected = f"a class id from 0 to {_LARGEST_CLASS}"
        _refuse(image.where, f"classes[{region}]", image.classes[region], expected)


# Arrays in an npz ---------------------------------------------------------------------------------

_ARRAYS = {
    "image_id": ("N", "US", "text"),
    "features": ("NMd", "f", "floats"),
    "boxes": ("NM4", "f", "floats"),
    "scores": ("NM", "f", "floats"),
    "classes": ("NM", "iu", "integers"),
    "count": ("N", "iu", "integers"),
    "size_wh": ("N2", "iu", "integers"),
    "split": ("N", "US", "text"),
    "labels": ("NC", "iu", "integers"),
    "label_names": ("C", "US", "text"),
}
"""Axes and kinds of type of the arrays that are read; a file may hold others."""

_OF_REGIONS = ("image_id", "features", "boxes", "scores", "classes", "count")


@dataclass(frozen=True, eq=False)
class NpzFile:
    """An npz of regions that carries split and labels too; arrays are as `numpy.savez` lays them.

    ``features`` (N,M,d), ``boxes`` (N,M,4) xyxy in [0,1] and ``scores`` (N,M) are floats,
    ``classes`` (N,M) and ``count`` (N,) integers: the first ``count`` of an image's M places are
    its regions, the others are not looked at. The other arrays are those below.

    Attributes:
        path: of the file.
        sha256: hex, over the arrays that decide the regions: corrected labels don't change it.
        image_ids: N, unique.
        counts: (N,) regions of each image; 0 for an image without any.
        sizes: (N, 2) int32, the array ``size_wh``: width and height in pixels.
        splits: N, ``train`` or ``test``, the array ``split``.
        labels: (N, C) int8: 1 positive, 0 difficult, -1 negative.
        label_names: C.
        manifest_sources: hex sha256 of each array that the manifest is made of.
    """

    path: Path
    sha256: str
    image_ids: list[str]
    counts: npt.NDArray[np.int64]
    feature_size: int
    sizes: npt.NDArray[np.int32]
    splits: list[str]
    labels: npt.NDArray[np.int8]
    label_names: tuple[str, ...]
    manifest_sources: dict[str, str]

    @classmethod
    def open(cls, path: Path, on_bytes: OnBytes = lambda read, total: None) -> NpzFile:
        """Read the file through: its checksums, and all arrays but those of every region.

        Raises:
            GmpipeError: it is missing, damaged or no npz, an array is missing, of another type or
                shape, or holds a value that it can't. Names the array and the row.
        """
        _refuse_no_file(path)
        hashes: dict[str, str] = {}
        found: dict[str, npt.NDArray[Any]] = {}
        with _reading(path), zipfile.ZipFile(path) as archive:
            arrays = _declared(path, archive)
            total = sum(archive.getinfo(f"{name}.npy").file_size for name in _ARRAYS)
            for name, array in arrays.items():
                hashing = hashlib.sha256()
                # To the end, where the archive's checksum is compared.
                with archive.open(f"{name}.npy") as stream:
                    while chunk := stream.read(_CHUNK):
                        hashing.update(chunk)
                        on_bytes(len(chunk), total)
                hashes[name] = hashing.hexdigest()
                if len(array.shape) == 1 or name in ("size_wh", "labels"):
                    with archive.open(f"{name}.npy") as stream:
                        stream.read(array.offset)
                        found[name] = array.take(stream, array.shape[0])
        texts = {name: _texts(path, name, found[name]) for name in ("image_id", "split")}
        _refuse_values(path, texts["image_id"], texts["split"], found, arrays["boxes"].shape[1])
        of_manifest = ("image_id", "size_wh", "split", "labels", "label_names")
        return cls(
            path=path,
            sha256=sha256_json([hashes[name] for name in _OF_REGIONS]),
            image_ids=texts["image_id"],
            counts=found["count"].astype(np.int64),
            feature_size=arrays["features"].shape[2],
            sizes=found["size_wh"].astype(np.int32),
            splits=texts["split"],
            labels=found["labels"].astype(np.int8),
            label_names=tuple(_texts(path, "label_names", found["label_names"])),
            manifest_sources={f"{path.name}/{name}": hashes[name] for name in of_manifest},
        )

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """The regions of some images, by their ascending places.

        Raises:
            GmpipeError: as `open`.
        """
        wanted = set(images.tolist())
        last = max(wanted, default=-1)
        with ExitStack() as stack:
            stack.enter_context(_reading(self.path))
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            arrays = _declared(self.path, archive)
            streams: dict[str, IO[bytes]] = {}
            for name in ("features", "boxes", "scores", "classes"):
                streams[name] = stack.enter_context(archive.open(f"{name}.npy"))
                streams[name].read(arrays[name].offset)
            for place in range(last + 1):
                # Also of images that are not wanted: a compressed member is read in order.
                taken = {name: arrays[name].take(stream, 1) for name, stream in streams.items()}
                if place in wanted:
                    n = self.counts[place]
                    where = _npz_row(self.path, place, self.image_ids[place])
                    yield ImageRegions(where, **{k: array[0, :n] for k, array in taken.items()})


@dataclass(frozen=True)
class _NpzArray:
    """What a member of an npz declares, held against its size.

    Attributes:
        offset: byte of the member at which the numbers begin.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def take(self, stream: IO[bytes], rows: int) -> npt.NDArray[Any]:
        """The next ``rows`` along the first axis, from a stream that stands before them."""
        shape = (rows, *self.shape[1:])
        data = stream.read(math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype, math.prod(shape)).reshape(shape)


def _declared(path: Path, archive: zipfile.ZipFile) -> dict[str, _NpzArray]:
    """The headers of `_ARRAYS`, found to agree with each other."""
    arrays: dict[str, _NpzArray] = {}
    lengths: dict[str, tuple[int, str]] = {"4": (4, "xyxy"), "2": (2, "width and height")}
    remedy = "Save the arrays again with `numpy.savez`."
    for name, (axes, kinds, kind) in _ARRAYS.items():
        if f"{name}.npy" not in archive.namelist():
            held = sorted(member.removesuffix(".npy") for member in archive.namelist())
            expected = f"the arrays {', '.join(_ARRAYS)}"
            _refuse(str(path), f"array `{name}`", f"missing; there are {held[:20]}", expected)
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as stream:
            version = npy.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                _refuse(f"{path}, `{name}`", "version of npy", version, "1.0 or 2.0", remedy)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, in_fortran_order, dtype = read(stream)
            offset = stream.tell()
        where = f"{path}, `{name}`"
        if dtype.kind not in kinds or dtype.itemsize == 0 or dtype.subdtype is not None:
            _refuse(where, "dtype", dtype, kind, remedy)
        if len(shape) != len(axes) or 0 in shape:
            expected = f"({', '.join(axes)}), none of them 0"
            _refuse(where, "shape", shape, expected, remedy)
        if in_fortran_order and len(shape) > 1:
            found, expected = "the order of Fortran", "that of C"
            _refuse(where, "order", found, expected, "Save `numpy.ascontiguousarray` of it.")
        for axis, length in zip(axes, shape, strict=True):
            known, elsewhere = lengths.setdefault(axis, (length, name))
            if length != known:
                expected = f"({', '.join(axes)}) with {axis} = {known}, as in {elsewhere}"
                _refuse(where, "shape", shape, expected, remedy)
        size = offset + math.prod(shape) * dtype.itemsize
        if member.file_size != size:
            _refuse(where, "size", f"{member.file_size} bytes", f"{size} bytes", remedy)
        arrays[name] = _NpzArray(dtype, shape, offset)
    return arrays


def _texts(path: Path, name: str, array: npt.NDArray[Any]) -> list[str]:
    coding = "utf-8"
    if array.dtype.kind == "U":  # not left to numpy, which fails badly where the text is none
        coding = "utf-32-le"
        array = array.astype(array.dtype.newbyteorder("<"))
    codes = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
    try:
        return [code.tobytes().decode(coding).rstrip("\0") for code in codes]
    except UnicodeDecodeError as error:
        _refuse(f"{path}, `{name}`", "text", f"not Unicode ({error})", "text as numpy saves it")


def _refuse_values(
    path: Path,
    image_ids: list[str],
    splits: list[str],
    found: dict[str, npt.NDArray[Any]],
    places: int,
) -> None:
    """Refuse the first value of the small arrays that can't be."""
    first: dict[str, int] = {}
    for row, image_id in enumerate(image_ids):
        if not image_id:
            _refuse(_npz_row(path, row, image_id), "image_id", "empty", "an image's id")
        if image_id in first:
            expected = f"each image once, and it is row {first[image_id]} already"
            _refuse(_npz_row(path, row, image_id), "image_id", repr(image_id), expected)
        first[image_id] = row
    for row, split in enumerate(splits):
        if split not in ("train", "test"):
            _refuse(_npz_row(path, row, image_ids[row]), "split", repr(split), "train or test")
    for split in ("train", "test"):
        if split not in splits:
            _refuse(str(path), "split", f"nowhere {split!r}", "images of train and of test")
    limits = {
        "count": (0, places),
        "size_wh": (1, np.iinfo(np.int32).max),
        "labels": (-1, 1),
    }
    for name, (least, most) in limits.items():
        values = found[name]
        for row, *place in _first((values < least) | (values > most)):
            where = "".join(f"[{axis}]" for axis in place)
            value = values[row, *place]
            expected = f"{least} to {most}"
            _refuse(_npz_row(path, row, image_ids[row]), f"{name}{where}", value, expected)


def _npz_row(path: Path, row: int, image_id: str) -> str:
    return f"{path}, row {row} ({image_id!r})"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what zipfile and numpy raise for a damaged file into an error that names it."""
    try:
        yield
    except (
        EOFError,
        NotImplementedError,  # of a way to compress that Python lacks
        OSError,
        RuntimeError,  # encrypted
        ValueError,
        lzma.LZMAError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise GmpipeError(
            f"{path} can't be read: damaged, or no npz ({error}). Copy or save it again."
        ) from error


# Bottom-up-attention TSV --------------------------------------------------------------------------

_COLUMNS = (
    "id",
    "height",
    "width",
    "object ids",
    "object confidences",
    "attribute ids",
    "attribute confidences",
    "count",
    "boxes",
    "features",
)
_ENCODED = {3: ("<i8", "n"), 4: ("<f4", "n"), 8: ("<f4", "n4"), 9: ("<f4", "nd")}
"""The columns of base64 that are read: type and axes of the array."""


@dataclass(frozen=True)
class _Line:
    """Where an image's regions are, and how many.

    Attributes:
        number: of the line, from 1.
        start, length: in bytes.
        width, height: of the image, in pixels.
    """

    path: Path
    number: int
    start: int
    length: int
    file_id: str
    width: int
    height: int
    count: int

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.number} ({self.file_id!r})"


@dataclass(frozen=True, eq=False)
class BottomUpFiles:
    """Regions in the TSV published with bottom-up-attention, in the layout that LXMERT uses.

    A line an image, without a header, of ten columns that tabs separate: id, height, width, object
    ids, object confidences, attribute ids, attribute confidences, count n, boxes, features. Ids
    are (n,) int64, confidences (n,) float32, boxes (n, 4) float32 xyxy in pixels of the image,
    features (n, d) float32; all little-endian and in base64. The score of a region is its object's
    confidence, its class its object's id; attributes are not read.

    Attributes:
        sha256: hex, over the bytes of all files, one after the other.
        lines: N, in the order of the files.
        counts: (N,) regions of each image.
    """

    sha256: str
    lines: tuple[_Line, ...]
    counts: npt.NDArray[np.int64]
    feature_size: int

    @classmethod
    def open(
        cls, paths: Sequence[Path], on_bytes: OnBytes = lambda read, total: None
    ) -> BottomUpFiles:
        """Read the files through: their hash, and of each line all but its arrays' contents.

        Raises:
            GmpipeError: a file is missing or empty, or a line has other columns, sizes that
                contradict each other, or the id of a line before. Names file, line and id.
        """
        for path in paths:
            _refuse_no_file(path)
        total = sum(path.stat().st_size for path in paths)
        hashing = hashlib.sha256()
        lines: list[_Line] = []
        known: dict[str, _Line] = {}
        feature_size = 0
        for path in paths:
            with _open_binary(path) as stream:
                number = start = 0
                while content := stream.readline(_LONGEST_LINE):
                    number += 1
                    hashing.update(content)
                    if content.strip(b"\r\n"):
                        line, size = _parse(path, number, start, content)
                        feature_size = feature_size or size
                        if size not in (0, feature_size):
                            expected = f"{feature_size}, as in the lines before"
                            _refuse(line.where, "feature size", size, expected)
                        if line.file_id in known:
                            expected = f"each image once, and it is {known[line.file_id].where}"
                            _refuse(line.where, "id", repr(line.file_id), expected)
                        known[line.file_id] = line
                        lines.append(line)
                    start += len(content)
                    on_bytes(len(content), total)
        if not feature_size:
            names = ", ".join(str(path) for path in paths)
            _refuse(names, "number of regions", 0, "at least one line with a region")
        counts = np.array([line.count for line in lines], dtype=np.int64)
        return cls(hashing.hexdigest(), tuple(lines), counts, feature_size)

    def match(
        self, image_ids: Sequence[str], sizes: Sequence[tuple[int | None, int | None]]
    ) -> npt.NDArray[np.int64]:
        """The place of each line's image among those of a manifest (N,), -1 for none.

        A line belongs to the image of the same id; else to the one image whose id ends in the same
        number, without leading zeros: `COCO_train2014_000000132417` is the image `132417`. A number
        that several ids end in says nothing.

        Args:
            image_ids: of the manifest.
            sizes: width and height of each in pixels, None where the manifest does not say.

        Raises:
            GmpipeError: two lines belong to one image, or a line belongs to an image by its number
                but has another size. Names both.
        """
        by_id = {image_id: place for place, image_id in enumerate(image_ids)}
        by_number: dict[str | None, int] = {None: -1}
        for place, image_id in enumerate(image_ids):
            number = _last_number(image_id)
            by_number[number] = -1 if number in by_number else place
        lines: dict[int, _Line] = {}
        places: list[int] = []
        for line in self.lines:
            place = by_id.get(line.file_id, -1)
            if place < 0:
                place = by_number.get(_last_number(line.file_id), -1)
                size = sizes[place] if place >= 0 else (None, None)
                if None not in size and size != (line.width, line.height):
                    raise GmpipeError(
                        f"{line.where}: by its number this is image {image_ids[place]!r}, but its "
                        f"size is {line.width} x {line.height}; expected {size[0]} x {size[1]}, "
                        "as in the manifest. Import regions of the data set's own images."
                    )
            if place in lines:
                raise GmpipeError(
                    f"{line.where}: this is image {image_ids[place]!r}, as {lines[place].where} "
                    "is already; expected each image once. Delete one of the two lines."
                )
            if place >= 0:
                lines[place] = line
            places.append(place)
        return np.array(places, dtype=np.int64)

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """The regions of some images, by their ascending places among the lines.

        Raises:
            GmpipeError: an array is no base64, or a box leaves its image by more than a pixel.
        """
        with ExitStack() as stack:
            stream: IO[bytes] | None = None
            opened: Path | None = None
            for place in images.tolist():
                line = self.lines[place]
                if stream is None or line.path != opened:
                    stack.close()
                    stream = stack.enter_context(_open_binary(line.path))
                    opened = line.path
                stream.seek(line.start)
                yield self._decode(line, stream.read(line.length))

    def _decode(self, line: _Line, content: bytes) -> ImageRegions:
        fields = content.rstrip(b"\r\n").split(b"\t")
        lengths = {"n": line.count, "4": 4, "d": self.feature_size}
        arrays: dict[int, npt.NDArray[Any]] = {}
        for column, (dtype, axes) in _ENCODED.items():
            try:
                decoded = a2b_base64(fields[column], strict_mode=True)
                arrays[column] = np.frombuffer(decoded, dtype).reshape(
                    [lengths[axis] for axis in axes]
                )
            except (Base64Error, ValueError, IndexError) as error:
                _refuse(line.where, _COLUMNS[column], f"damaged ({error})", "base64")
        size = np.array([line.width, line.height, line.width, line.height])
        boxes = arrays[8].astype(np.float64)
        # Rounding may leave the image, but not by more than a pixel: then it is another image's.
        for (region,) in _first(((boxes < -1) | (boxes > size + 1)).any(axis=1)):
            expected = f"xyxy in pixels of an image of {line.width} x {line.height}"
            _refuse(line.where, f"boxes[{region}]", boxes[region].tolist(), expected)
        return ImageRegions(
            where=line.where,
            features=arrays[9],
            boxes=(boxes / size).clip(0, 1),
            scores=arrays[4],
            classes=arrays[3],
        )


def _parse(path: Path, number: int, start: int, content: bytes) -> tuple[_Line, int]:
    """A line and its feature size d (0 without any region), from the lengths of its columns."""
    where = f"{path}, line {number}"
    if len(content) == _LONGEST_LINE:
        found, expected = f"{len(content)} bytes or longer", f"less than {_LONGEST_LINE} bytes"
        _refuse(where, "line", found, expected, "Name the TSV of bottom-up-attention.")
    fields = content.rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(_COLUMNS):
        expected = f"{len(_COLUMNS)}, separated by tabs: {', '.join(_COLUMNS)}"
        _refuse(where, "number of columns", len(fields), expected)
    try:
        file_id = fields[0].decode()
    except UnicodeDecodeError:
        _refuse(where, "id", repr(fields[0][:40]), "UTF-8")
    where = f"{where} ({file_id!r})"
    numbers: dict[str, int] = {}
    for column, least in ((1, 1), (2, 1), (7, 0)):
        text = fields[column]
        if not (text.isdigit() and len(text) < 10 and int(text) >= least):
            _refuse(where, _COLUMNS[column], repr(text[:40]), f"a whole number, {least} or more")
        numbers[_COLUMNS[column]] = int(text)
    n = numbers["count"]
    size = _decoded_size(fields[9])
    d, rest = divmod(size, 4 * n) if n else (0, size)
    if rest or (n and d == 0):
        expected = f"{n} times 4 bytes times the feature size"
        _refuse(where, "features", f"{size} bytes", expected)
    for column in (3, 4, 8):
        dtype, axes = _ENCODED[column]
        expected_size = n * np.dtype(dtype).itemsize * (4 if "4" in axes else 1)
        if _decoded_size(fields[column]) != expected_size:
            found = f"{_decoded_size(fields[column])} bytes"
            expected = f"{expected_size} bytes, since the count is {n}"
            _refuse(where, _COLUMNS[column], found, expected)
    line = _Line(
        path=path,
        number=number,
        start=start,
        length=len(content),
        file_id=file_id,
        width=numbers["width"],
        height=numbers["height"],
        count=n,
    )
    return line, d


def _decoded_size(field: bytes) -> int:
    """Bytes that a text of base64 stands for, if it is whole."""
    return len(field) * 3 // 4 - field[-2:].count(b"=")


def _last_number(image_id: str) -> str | None:
    """The number that an id ends in, without leading zeros, or None."""
    match = re.search("[0-9]+$", image_id)
    return match[0].lstrip("0") if match else None


def _refuse_no_file(path: Path) -> None:
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise GmpipeError(f"{path} can't be read ({error.strerror}). Correct the path.") from error
    if not plain:
        raise GmpipeError(f"{path} is a folder, or no plain file. Name the file of regions itself.")


def _open_binary(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=_CHUNK)
    except OSError as error:
        raise GmpipeError(f"{path} can't be read ({error.strerror}). Mend that first.") from error


def _first(breach: npt.ArrayLike) -> list[list[int]]:
    """The first true place of ``breach``, as a list of one, or an empty list."""
    places: list[list[int]] = np.argwhere(breach)[:1].tolist() if np.any(breach) else []
    return places


def _refuse(
    where: str,
    name: str,
    found: object,
    expected: str,
    remedy: str = "Correct the file and import it again.",
) -> NoReturn:
    raise GmpipeError(f"{where}: {name} is {found}; expected {expected}. {remedy}")
