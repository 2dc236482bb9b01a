"""Regions in the TSV that was published with bottom-up-attention.

Letters: as in `pipeline.shards.imports.image_regions`.
"""

from __future__ import annotations

import hashlib
import logging
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.files import raise_if_refused
from pipeline.shards.imports.image_regions import (
    CHUNK,
    ImageRegions,
    OnBytes,
    refuse,
    refuse_no_file,
)
from pipeline.shards.imports.pixels import boxes_of_pixels

_log = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 26  # bytes; 100 boxes of 2048 numbers take 1.1 million

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
"""Type and axes of the arrays in the base64 columns that are read."""

_OTHER_TYPES = {"<f2": "float16", "<f8": "float64", ">f4": "big-endian float32"}
_LARGEST = float(np.finfo(np.float16).max)  # far beyond the features of any detector
_SAMPLE = 4096  # numbers of the first features, by which their type is checked
_SPREAD = 5.0
"""Standard deviation of the binary logarithm of features, above which their type is doubted. It is
1.6 for normal numbers, and eight times as large if they are float16 and are read as float32."""


@dataclass(frozen=True)
class _Line:
    """One line of a file: where it is, and which image it is of.

    Attributes:
        path: of the file.
        number: of the line, from 1.
        start, length: in bytes.
        file_id: id of the image in the file.
        width, height: of the image, in pixels.
        count: number of regions.
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
        """File, line and id, for messages."""
        return f"{self.path}, line {self.number} ({self.file_id!r})"


@dataclass(frozen=True, eq=False)
class BottomUpFiles:
    """Regions in the TSV published with bottom-up-attention, in the layout that LXMERT uses.

    Each line is one image. There is no header. Ten columns are separated by tabs: id, height,
    width, object ids, object confidences, attribute ids, attribute confidences, count n, boxes,
    features.
    Ids are (n,) int64, confidences (n,) float32, boxes (n, 4) float32 xyxy in pixels of the image,
    features (n, d) float32; all are little-endian and in base64. A region's score is its object's
    confidence and its class its object's id. Attributes are not read.

    Attributes:
        sha256: hex, over the bytes of all files, one after the other.
        lines: N, in the order of the files.
        counts: (N,) number of regions of each image.
        feature_size: d.
        odd_type: that the first features look like if it is not float32, else empty.
        whole_sha256: None, since the files have no features of whole images.
    """

    sha256: str
    lines: tuple[_Line, ...]
    counts: npt.NDArray[np.int64]
    feature_size: int
    odd_type: str = ""
    whole_sha256: None = None

    @classmethod
    def open(
        cls, paths: Sequence[Path], on_bytes: OnBytes = lambda read, total: None
    ) -> BottomUpFiles:
        """Read the files through: their hash, and each line except the contents of its arrays.

        Args:
            paths: of the files.
            on_bytes: called with the progress.

        Raises:
            InputError: a file is missing or empty, or a line has other columns, sizes that
                contradict each other, or the id of an earlier line. Names file, line and id.
        """
        for path in paths:
            refuse_no_file(path)
        total = sum(path.stat().st_size for path in paths)
        hashing = hashlib.sha256()
        lines: list[_Line] = []
        known: dict[str, _Line] = {}
        sample: list[bytes] = []  # of the first lines' features
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
                            _refuse_size(line, size, feature_size)
                        if size and sum(map(len, sample)) < 4 * _SAMPLE:
                            sample.append(_decoded(line.where, content, 9))
                        if line.file_id in known:
                            expected = f"each image once; it is also {known[line.file_id].where}"
                            refuse(line.where, "id", repr(line.file_id), expected)
                        known[line.file_id] = line
                        lines.append(line)
                    start += len(content)
                    on_bytes(len(content), total)
        if not feature_size:
            names = ", ".join(str(path) for path in paths)
            refuse(names, "number of regions", 0, "at least one line with a region")
        first = b"".join(sample)
        odd_type = _odd_type(first)
        if odd_type:
            read_as = np.frombuffer(first, "<f4")
            _tell_odd_type(str(lines[0].path), odd_type, read_as, feature_size)
        counts = np.array([line.count for line in lines], dtype=np.int64)
        return cls(hashing.hexdigest(), tuple(lines), counts, feature_size, odd_type)

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """Yield the regions of the images on some lines, by their ascending numbers from 0.

        Raises:
            InputError: an array is not base64, or a box leaves its image by more than a pixel.
        """
        with ExitStack() as stack:
            stream: IO[bytes] | None = None
            opened: Path | None = None
            for number in images.tolist():
                line = self.lines[number]
                if stream is None or line.path != opened:
                    stack.close()
                    stream = stack.enter_context(_open_binary(line.path))
                    opened = line.path
                stream.seek(line.start)
                yield self._decode(line, stream.read(line.length))

    def _decode(self, line: _Line, content: bytes) -> ImageRegions:
        """Decode the arrays of a line; raises as `read`."""
        lengths = {"n": line.count, "4": 4, "d": self.feature_size}
        arrays: dict[int, npt.NDArray[Any]] = {}
        for column, (dtype, axes) in _ENCODED.items():
            shape = [lengths[axis] for axis in axes]
            try:
                decoded = _decoded(line.where, content, column)
                arrays[column] = np.frombuffer(decoded, dtype).reshape(shape)
            except ValueError as error:
                refuse(line.where, _COLUMNS[column], f"damaged ({error})", "base64")
        if self.odd_type and _are_useless(arrays[9]):
            _tell_odd_type(line.where, self.odd_type, arrays[9], self.feature_size)
        boxes = boxes_of_pixels(line.where, arrays[8], line.width, line.height)
        return ImageRegions(
            where=line.where,
            features=arrays[9],
            boxes=boxes,
            scores=arrays[4],
            classes=arrays[3],
        )


def _decoded(where: str, content: bytes, column: int) -> bytes:
    """Decode the base64 of a column of a line."""
    try:
        fields = content.rstrip(b"\r\n").split(b"\t")
        return a2b_base64(fields[column], strict_mode=True)
    except (Base64Error, IndexError) as error:
        refuse(where, _COLUMNS[column], f"damaged ({error})", "base64")


def _refuse_size(line: _Line, size: int, expected_size: int) -> NoReturn:
    """Refuse a feature size that is not that of the earlier lines; say what it may come from."""
    expected = f"{expected_size}, as in the earlier lines"
    ratio = max(size, expected_size) / min(size, expected_size)
    if ratio in (2, 4):
        expected += (
            f", of which it is {'twice' if ratio == 2 else 'four times'} as much"
            if size > expected_size
            else f", of which it is {'a half' if ratio == 2 else 'a quarter'}"
        ) + "; the lines may hold numbers of different types, such as float16 and float32"
    remedy = "Save all features as float32, `features.astype(numpy.float32)`, and import again."
    refuse(line.where, "feature size", size, expected, remedy)


def _odd_type(sample: bytes) -> str:
    """The type that the first features look like if it is not float32, else empty."""
    spread = _spread(np.frombuffer(sample, "<f4"))
    if spread <= _SPREAD:
        return ""
    for code in _OTHER_TYPES:
        itemsize = np.dtype(code).itemsize
        whole = sample[: len(sample) // itemsize * itemsize]
        if 2 * _spread(np.frombuffer(whole, code)) < min(spread, 2 * _SPREAD):
            return code
    return ""


def _tell_odd_type(where: str, code: str, features: npt.NDArray[Any], feature_size: int) -> None:
    """Refuse features of another type where they can't be float32, and note them otherwise."""
    name, size = _OTHER_TYPES[code], feature_size * 4 // np.dtype(code).itemsize
    remedy = (
        f"decode them as {name}, save them with `features.astype(numpy.float32)`, and import again."
    )
    if _are_useless(features):
        found = f"{name}, as it seems, with {size} numbers for each region"
        expected = (
            f"float32. Read as that, there are {feature_size} numbers, of which some are beyond "
            f"{_LARGEST:g} or not finite"
        )
        refuse(where, "type of the features", found, expected, remedy.replace("decode", "Decode"))
    _log.warning(
        "%s: the features are read as float32, %d numbers for each region, but look like "
        "%s, of which there would be %d. If they are, %s",
        where,
        feature_size,
        name,
        size,
        remedy,
    )


def _are_useless(features: npt.NDArray[Any]) -> bool:
    """Whether features, read as float32, have numbers that no detector's have."""
    return not bool((np.abs(features) <= _LARGEST).all())  # nor is nan


def _spread(numbers: npt.NDArray[Any]) -> float:
    """Standard deviation of log2 of the size of numbers; infinite if one is not finite."""
    if not np.isfinite(numbers).all():
        return np.inf
    sizes = np.abs(numbers[numbers != 0].astype(np.float64))
    return float(np.log2(sizes).std()) if len(sizes) else 0.0


def _parse(path: Path, number: int, start: int, content: bytes) -> tuple[_Line, int]:
    """Parse a line from the lengths of its columns; also its d, 0 for a line without regions."""
    where = f"{path}, line {number}"
    if len(content) == _LONGEST_LINE:
        length, expected = f"{len(content)} bytes or longer", f"less than {_LONGEST_LINE} bytes"
        refuse(where, "line", length, expected, "Name the TSV of bottom-up-attention.")
    fields = content.rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(_COLUMNS):
        expected = f"{len(_COLUMNS)}, separated by tabs: {', '.join(_COLUMNS)}"
        remedy = "Correct the file and import it again."
        if len(fields) == 6:
            expected += ". Six columns are those of the first release, without scores and classes"
            remedy = "Write an npz instead, with scores and classes (docs/cache-format.md)."
        refuse(where, "number of columns", len(fields), expected, remedy)
    try:
        file_id = fields[0].decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        refuse(where, "id", repr(fields[0][:40]), "UTF-8")
    where = f"{where} ({file_id!r})"
    if number == 1 and all(b"_" in field or field.isalpha() for field in fields[1:3]):
        found = f"a header ({fields[1][:40]!r}, {fields[2][:40]!r})"
        refuse(where, "line", found, "an image, since the TSV has no header", "Delete the line.")
    numbers = _numbers(where, fields)
    n = numbers["count"]
    feature_size = _checked_sizes(where, fields, n)
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
    return line, feature_size


def _numbers(where: str, fields: Sequence[bytes]) -> dict[str, int]:
    """The height, width and count of a line."""
    numbers: dict[str, int] = {}
    for column, least in ((1, 1), (2, 1), (7, 0)):
        text = fields[column]
        if not (text.isdigit() and len(text) < 10 and int(text) >= least):
            refuse(where, _COLUMNS[column], repr(text[:40]), f"a whole number, {least} or more")
        numbers[_COLUMNS[column]] = int(text)
    return numbers


def _checked_sizes(where: str, fields: Sequence[bytes], n: int) -> int:
    """Check the sizes of the arrays of a line with n regions; return d, 0 without regions."""
    size = _decoded_size(fields[9])
    d, rest = divmod(size, 4 * n) if n else (0, size)
    if rest or (n and d == 0):
        expected = f"{n} times 4 bytes times the feature size"
        refuse(where, "features", f"{size} bytes", expected)
    for column in (3, 4, 8):
        dtype, axes = _ENCODED[column]
        expected_size = n * np.dtype(dtype).itemsize * (4 if "4" in axes else 1)
        actual_size = _decoded_size(fields[column])
        if actual_size != expected_size:
            expected = f"{expected_size} bytes, since the count is {n}"
            refuse(where, _COLUMNS[column], f"{actual_size} bytes", expected)
    return d


def _decoded_size(field: bytes) -> int:
    """Number of bytes that a complete base64 text encodes."""
    return len(field) * 3 // 4 - field[-2:].count(b"=")


def _open_binary(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=CHUNK)
    except OSError as error:
        raise_if_refused(error, path)
        raise InputError(
            f"{path} can't be read ({error.strerror}).", "Correct the path."
        ) from error
