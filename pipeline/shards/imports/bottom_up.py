"""Regions in the TSV that was published with bottom-up-attention.

Letters: as in `pipeline.shards.imports.image_regions`.
"""

from __future__ import annotations

import hashlib
import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.files import raise_if_refused
from pipeline.shards.imports.image_regions import (
    CHUNK,
    ImageRegions,
    OnBytes,
    first_true,
    refuse,
    refuse_no_file,
)

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
    """

    sha256: str
    lines: tuple[_Line, ...]
    counts: npt.NDArray[np.int64]
    feature_size: int

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
                            expected = f"{feature_size}, as in the earlier lines"
                            refuse(line.where, "feature size", size, expected)
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
        counts = np.array([line.count for line in lines], dtype=np.int64)
        return cls(hashing.hexdigest(), tuple(lines), counts, feature_size)

    def match(
        self, image_ids: Sequence[str], sizes: Sequence[tuple[int | None, int | None]]
    ) -> npt.NDArray[np.int64]:
        """Find each line's image among those of a manifest: its number (N,), -1 for none.

        A line belongs to the image of the same id, else to the only image whose id ends in the same
        number, without leading zeros: `COCO_train2014_000000132417` is the image `132417`. If
        several ids end in a number, no line is matched by it.

        Args:
            image_ids: of the manifest.
            sizes: width and height of each in pixels, None where the manifest has none.

        Raises:
            InputError: two lines belong to one image, or a line belongs to an image by its number
                but has another size. Names both.
        """
        by_id = {image_id: image for image, image_id in enumerate(image_ids)}
        by_number: dict[str | None, int] = {None: -1}
        for image, image_id in enumerate(image_ids):
            number = _last_number(image_id)
            by_number[number] = -1 if number in by_number else image
        lines: dict[int, _Line] = {}
        images: list[int] = []
        for line in self.lines:
            image = by_id.get(line.file_id, -1)
            if image < 0:
                image = by_number.get(_last_number(line.file_id), -1)
                size = sizes[image] if image >= 0 else (None, None)
                if None not in size and size != (line.width, line.height):
                    raise InputError(
                        f"{line.where}: by its number this is image {image_ids[image]!r}, but its "
                        f"size is {line.width} x {line.height}; expected {size[0]} x {size[1]}, "
                        "as in the manifest.",
                        "Import regions of the data set's own images.",
                    )
            if image in lines:
                raise InputError(
                    f"{line.where}: this is image {image_ids[image]!r}, and so is "
                    f"{lines[image].where}; expected each image once.",
                    "Delete one of the two lines.",
                )
            if image >= 0:
                lines[image] = line
            images.append(image)
        return np.array(images, dtype=np.int64)

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
                refuse(line.where, _COLUMNS[column], f"damaged ({error})", "base64")
        size = np.array([line.width, line.height, line.width, line.height])
        boxes = arrays[8].astype(np.float64)
        # Rounding may leave the image by up to a pixel. A box further out is another image's.
        for (region,) in first_true(((boxes < -1) | (boxes > size + 1)).any(axis=1)):
            expected = f"xyxy in pixels of an image of {line.width} x {line.height}"
            refuse(line.where, f"boxes[{region}]", boxes[region].tolist(), expected)
        return ImageRegions(
            where=line.where,
            features=arrays[9],
            boxes=(boxes / size).clip(0, 1),
            scores=arrays[4],
            classes=arrays[3],
        )


def _parse(path: Path, number: int, start: int, content: bytes) -> tuple[_Line, int]:
    """Parse a line from the lengths of its columns; also its d, 0 for a line without regions."""
    where = f"{path}, line {number}"
    if len(content) == _LONGEST_LINE:
        length, expected = f"{len(content)} bytes or longer", f"less than {_LONGEST_LINE} bytes"
        refuse(where, "line", length, expected, "Name the TSV of bottom-up-attention.")
    fields = content.rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(_COLUMNS):
        expected = f"{len(_COLUMNS)}, separated by tabs: {', '.join(_COLUMNS)}"
        refuse(where, "number of columns", len(fields), expected)
    try:
        file_id = fields[0].decode()
    except UnicodeDecodeError:
        refuse(where, "id", repr(fields[0][:40]), "UTF-8")
    where = f"{where} ({file_id!r})"
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


def _last_number(image_id: str) -> str | None:
    """The number that an id ends in, without leading zeros, or None."""
    match = re.search("[0-9]+$", image_id)
    return match[0].lstrip("0") if match else None


def _open_binary(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=CHUNK)
    except OSError as error:
        raise_if_refused(error, path)
        raise InputError(
            f"{path} can't be read ({error.strerror}).", "Correct the path."
        ) from error
