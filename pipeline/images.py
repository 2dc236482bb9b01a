"""Which files are read as photographs, and how their pixels are.

Whether a file can be read is decided here alone: `decode` reads it, and `examine` says, quickly
where it can, whether `decode` would.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.image_metadata import JPEG, PNG, TIFF, Stripped, read_orientation, strip

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""The formats of photographs, by Pillow's names. Pillow reads more, among them PostScript, which it
passes to an interpreter that runs programs."""

MOST_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded. Pillow, too, refuses larger images by default."""
# Pillow also warns about images of more than half its limit, which are fine here, and warning
# filters can't be set for a single thread. So Pillow's limits are doubled, and `_open` checks
# this one.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS

# EXIF standard, tag 0x0112: how to turn the stored pixels upright. Other values are reserved.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FRAME, _SCAN, _END = 0xC0, 0xDA, b"\xff\xd9"
_USUAL_JPEG = {_FRAME, _SCAN, 0xC4, 0xDB}
"""Segments that a baseline JPEG has before its pixels."""
_OPTIONAL = {0xDD, 0xE0, 0xEE}
"""Segments that it may have: an interval of restarts, JFIF's, Adobe's."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker after the beginning of a JPEG's pixels that does not belong to them."""

_START = 32  # bytes by which a format is recognized
_HEADS = (1 << 14, 1 << 18)  # bytes in which the header of a JPEG is searched before all is read
_OTHERS = {
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb".{4}ftypavi[fs]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "Photoshop": rb"8BPS",
    "camera's raw": rb".{4}ftypcrx |IIRO|IIRS|IIU\0|MMOR|FUJIFILMCCD-RAW|FOVb",
}
"""How photographs begin that are often met and not read; the raw files that are TIFFs aside."""

_LINES, _LINES_BYTES = 16, 2000  # of pixels that are decoded to try a header

_LARGE = 30_000_000  # pixels of images of which one at a time is examined, to save memory
_ONE_LARGE = threading.Lock()


class TooManyPixels(ValueError):
    """An image has more pixels than are decoded."""


@dataclass(frozen=True)
class Photograph:
    """An opened photograph, whose pixels are not decoded yet.

    Attributes:
        image: with the size of the pixels as they are stored.
        orientation: how they are turned upright: 1 to 8, as in the EXIF standard.
        doubtful: whether the orientation can't be read; it is 1 then.
    """

    image: Image.Image
    orientation: int
    doubtful: bool


@contextmanager
def open_photograph(source: BinaryIO) -> Iterator[Photograph]:
    """Read the header of a photograph, without decoding its pixels. Metadata is not heeded.

    Args:
        source: the opened file, at its start.

    Raises:
        TooManyPixels: it has more than `MOST_PIXELS` pixels.
        ValueError: it is a camera's raw file.
        PIL.UnidentifiedImageError: it has none of the `FORMATS`.
        Exception: whatever Pillow raises for a damaged header.
    """
    start = source.read(_START)
    source.seek(0)
    if start.startswith((JPEG, PNG, *TIFF)):
        with _open_stripped(strip(source.read())) as photograph:
            yield photograph
    else:
        with _open(source, start) as image:
            # Pillow gives these as they are in the file, without parsing them.
            exif, xmp = (_bytes_or_none(image.info.get(name)) for name in ("exif", "xmp"))
            yield Photograph(image, *read_orientation(exif, xmp))


def read_header(source: BinaryIO) -> tuple[tuple[int, int], int]:
    """Read the size and the orientation of a photograph. Of a JPEG, only the beginning is read.

    Args:
        source: the opened file, at its start.

    Returns:
        width and height as the pixels are stored, and the orientation, as in `Photograph`.

    Raises:
        Exception: as `open_photograph`.
    """
    for size in _HEADS:
        stripped = strip(source.read(size))
        source.seek(0)
        if _SCAN in stripped.segments:
            with _open_stripped(stripped) as photograph:
                return photograph.image.size, photograph.orientation
    with open_photograph(source) as photograph:
        return photograph.image.size, photograph.orientation


@contextmanager
def _open_stripped(stripped: Stripped) -> Iterator[Photograph]:
    if stripped.preview:
        raise ValueError(
            "it is a camera's raw file, of which only the preview could be read: convert it to "
            "JPEG or PNG"
        )
    with _open(io.BytesIO(stripped.content), b"") as image:
        yield Photograph(image, stripped.orientation, stripped.doubtful)


def _bytes_or_none(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None


def _open(source: BinaryIO, start: bytes) -> Image.Image:
    """Open an image of one of the formats, which has no other's ``start``.

    Raises:
        Exception: as `open_photograph`.
    """
    for name, pattern in _OTHERS.items():
        if re.match(pattern, start, re.DOTALL):
            raise ValueError(f"it is a {name} file, which is not read: convert it to JPEG or PNG")
    image = Image.open(source, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise TooManyPixels(
            f"{image.width} x {image.height} pixels, more than the {MOST_PIXELS} that are decoded"
        )
    return image


def decode(source: BinaryIO) -> Image.Image:
    """Decode a photograph to RGB, upright.

    Args:
        source: the opened file, at its start.

    Raises:
        ValueError: the range of the pixel values is unknown, or as `open_photograph`.
        Exception: whatever Pillow runs into in a damaged file.
    """
    with open_photograph(source) as photograph:
        return _decoded(photograph)


def _decoded(photograph: Photograph) -> Image.Image:
    photograph.image.load()
    return _turned(_to_rgb(photograph.image), photograph.orientation)


def upright(image: Image.Image) -> Image.Image:
    """Convert an image that somebody opened or made with Pillow to RGB, and turn it upright.

    Raises:
        ValueError: the range of the pixel values is unknown.
        Exception: whatever Pillow runs into in damaged pixels.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises anything for damaged EXIF, which is no reason to stop
        orientation = 1
    return _turned(_to_rgb(image), orientation)


def examine(source: BinaryIO) -> bool:
    """Find out whether `decode` gives a picture.

    Of a baseline JPEG the first lines are decoded, and the marker that ends its pixels is searched:
    libjpeg takes whatever is in between for pixels. All other files are decoded.

    Args:
        source: the opened file, at its start.

    Returns:
        whether the orientation is doubtful, as `Photograph.doubtful`.

    Raises:
        Exception: as `decode`.
    """
    if source.read(len(JPEG)) == JPEG:
        source.seek(0)
        stripped = strip(source.read())
        if _is_whole_baseline(stripped):
            with _open_stripped(_first_lines(stripped)) as photograph:
                _decoded(photograph)
            with _open_stripped(stripped) as photograph:
                return photograph.doubtful
    source.seek(0)
    with open_photograph(source) as photograph:
        large = photograph.image.width * photograph.image.height > _LARGE
        with _ONE_LARGE if large else nullcontext():
            _decoded(photograph)
        return photograph.doubtful


def _is_whole_baseline(stripped: Stripped) -> bool:
    """Whether a JPEG has one scan of pixels, which the marker of the end follows."""
    if stripped.segments.keys() - _OPTIONAL != _USUAL_JPEG:
        return False
    end = _MARKER.search(stripped.content, stripped.segments[_SCAN] + 2)
    return end is not None and end[0] == _END


def _first_lines(stripped: Stripped) -> Stripped:
    """The first lines of a baseline JPEG, for which libjpeg reads its whole header."""
    content = stripped.content
    height = stripped.segments[_FRAME] + 5  # after marker, length and precision
    lines = min(_LINES, int.from_bytes(content[height : height + 2], "big"))
    start = content[: stripped.segments[_SCAN] + _LINES_BYTES]
    return replace(
        stripped,
        content=start[:height] + lines.to_bytes(2, "big") + start[height + 2 :] + _END,
    )


def reason(error: Exception) -> str:
    """Say why `decode` or `examine` failed."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}, or too damaged to be recognized"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error) == "could not create decoder object":  # Pillow's, without saying why
        return "its header is damaged or cut off"
    return str(error) or type(error).__name__


# --- pixels --------------------------------------------------------------------------------------


def _turned(picture: Image.Image, orientation: object) -> Image.Image:
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB.

    Raises:
        ValueError: the range of the pixel values is unknown.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point, so that black and white are unknown")
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts it only to LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # Pillow takes 4 bytes per pixel, 240 MB for 60 megapixels, so RGB is not copied.
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale grey in [0, 65535] to [0, 255]; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"its grey values reach from {low} to {high}, expected 0 to 65535: black and white are "
            "unknown"
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # the nearest of v / 257
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


# --- folders -------------------------------------------------------------------------------------


UNSUPPORTED = frozenset(
    {
        *(".heic", ".heif", ".hif", ".avif", ".avifs", ".jxl", ".jxr", ".psd"),
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".raf"),
        *(".rw2", ".rwl", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".erf", ".mrw", ".raw"),
    }
)
"""Suffixes, in lower case, of photographs in formats that are not read, cameras' raw files among
them."""


@cache
def suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of photographs in the `FORMATS`."""
    # An MPO is a JPEG that others follow.
    read = {*FORMATS, "MPO"}
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in read
    )


def _refuse(error: OSError) -> None:
    raise error


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, sorted by name.

    Hidden files and folders are skipped, and links to folders are not followed.

    Raises:
        OSError: a folder can't be listed.
    """
    for top, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(top) / name for name in sorted(names) if not name.startswith("."))


def describe_passed_over(number_of: Mapping[str, int]) -> str:
    """Say which files of folders were not taken for photographs, and what to do about some.

    Args:
        number_of: suffix in lower case -> files.
    """
    unsupported = {suffix for suffix in number_of if suffix in UNSUPPORTED}
    parts = []
    for chosen, remark in (
        (unsupported, " in a format that is not read: convert them to JPEG or PNG"),
        (number_of.keys() - unsupported, ""),
    ):
        counts = sorted((-number_of[suffix], suffix) for suffix in chosen)
        names = [f"{-number} {suffix or 'without a suffix'}" for number, suffix in counts]
        if names:
            parts.append(", ".join(names) + remark)
    total = sum(number_of.values())
    files = "1 file is" if total == 1 else f"{total} files are"
    return f"{files} passed over by suffix: {'; '.join(parts)}."
