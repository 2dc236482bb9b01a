"""The pixels of a photograph's file without its metadata, and its orientation.

Many programs write damaged metadata, and Pillow refuses some files for it. Metadata must not decide
whether pixels are read. So it is removed before Pillow reads the file, and only the orientation is
taken from it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How files begin; the last two of TIFF's are BigTIFF's."""

_ORIENTATION = 0x0112
_XMP = 0x02BC
_DESCRIPTIVE = {269, 270, 271, 272, 282, 283, 285, 296, 297, 305, 306, 315, 316, 330}
"""TIFF's basic tags that describe the picture, or lead to other directories."""
_LAST_STRUCTURAL, _LERC = 532, 50674
_SUBFILE_TYPE, _SUB_DIRECTORIES, _DNG_VERSION = 254, 330, 50706
_UNREADABLE = (struct.error, ValueError, OverflowError)  # of what `_directory` raises
_INTEGERS = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}  # type of a TIFF field -> struct's letter

_MOST_TEXT = 1 << 20  # bytes of a compressed text in a PNG: what is longer is no EXIF or XMP


@dataclass(frozen=True)
class Stripped:
    """A file without its metadata.

    Attributes:
        content: the file's bytes that pixels depend on; unchanged where they can't be told apart.
        orientation: how the stored pixels are turned upright: 1 to 8, as in the EXIF standard; 1 if
            the file does not say.
        doubtful: whether there is an orientation, or EXIF, that can't be read.
        segments: marker -> place in ``content`` of a JPEG's segments, the last of which, SOS, is
            before its pixels.
        preview: whether it is a camera's raw file, whose first picture is a small preview.
    """

    content: bytes = field(repr=False)
    orientation: int = 1
    doubtful: bool = False
    segments: dict[int, int] = field(default_factory=dict)
    preview: bool = False


def strip(content: bytes) -> Stripped:
    """Remove the metadata of a JPEG, PNG or TIFF; other files are returned as they are.

    Raises nothing: what can't be parsed stays for Pillow to judge.
    """
    if content.startswith(JPEG):
        return _strip_jpeg(content)
    if content.startswith(PNG):
        return _strip_png(content)
    if content.startswith(TIFF):
        return _strip_tiff(content)
    return Stripped(content)


def read_orientation(exif: bytes | None, xmp: bytes | None) -> tuple[int, bool]:
    """Read the orientation of a picture from its EXIF or, where that has none, from its XMP.

    Returns:
        1 to 8, as in the EXIF standard, 1 if there is none; and whether that is doubtful, because
        what is there can't be read.
    """
    doubtful = False
    if exif := re.sub(rb"^(Exif\0\0){1,2}", b"", exif or b""):
        try:
            value = _orientation_of(exif)
        except _UNREADABLE:
            doubtful = True
        else:
            if value in range(1, 9):
                return value, False
            # 0 is what many programs write for "unknown".
            doubtful = value != 0
    if found := re.search(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])\b", xmp or b""):
        return int(found[1]), False
    return 1, doubtful


# --- JPEG ----------------------------------------------------------------------------------------


def _strip_jpeg(content: bytes) -> Stripped:
    """Leave out the segments before the pixels that no decoder of pixels reads.

    An MPO becomes the JPEG that its first picture is.
    """
    kept, segments = bytearray(content[:2]), dict[int, int]()
    exif, xmp = b"", None
    position = 2
    while (position := content.find(b"\xff", position)) >= 0 and position + 4 <= len(content):
        marker = content[position + 1]
        if marker in (0x00, 0xFF):  # a filling byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # has no content
            position += 2
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker in (0xD9, 0xDA) or end < position + 4 or end > len(content):
            segments[marker] = len(kept)
            break
        segment, position = content[position:end], end
        body = segment[4:]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]  # one that is longer than a segment goes on in the next
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = (xmp or b"") + body  # there may be several packets
        if _decides_pixels(marker, body):
            segments[marker] = len(kept)
            kept += segment
    if position < 0:
        return Stripped(content)
    orientation, doubtful = read_orientation(exif, xmp)
    kept += content[position:]
    return Stripped(bytes(kept), orientation, doubtful, segments)


def _decides_pixels(marker: int, body: bytes) -> bool:
    """Whether libjpeg uses a segment. Of those of applications, it uses JFIF's and Adobe's."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


# --- PNG -----------------------------------------------------------------------------------------


def _strip_png(content: bytes) -> Stripped:
    """Leave out all but the critical chunks and the transparency, so also an animation."""
    kept = [content[: len(PNG)]]
    exif: bytes | None = None
    raw: bytes | None = None
    xmp: bytes | None = None
    position = len(PNG)
    while position + 8 <= len(content):
        name = content[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        critical = not name[0] & 0x20
        if critical or name == b"tRNS" or not name.isalpha():
            kept.append(content[position:end])
        else:
            body = content[position + 8 : end - 4]
            if name == b"eXIf":
                exif = body
            elif body.startswith(b"Raw profile type exif\0") and name in (b"tEXt", b"zTXt"):
                raw = _raw_profile(body, compressed=name == b"zTXt")
            elif body.startswith(b"XML:com.adobe.xmp\0") and name == b"iTXt":
                xmp = _international_text(body)
        position = end
        if name == b"IEND":
            break
    orientation, doubtful = read_orientation(raw if exif is None else exif, xmp)
    return Stripped(b"".join(kept), orientation, doubtful)


def _inflated(packed: bytes) -> bytes:
    """The first bytes of a compressed text; empty if it can't be decompressed."""
    try:
        return zlib.decompressobj().decompress(packed, _MOST_TEXT)
    except zlib.error:
        return b""


def _raw_profile(body: bytes, *, compressed: bool) -> bytes:
    """EXIF as ImageMagick writes it: after a name and a length, in hexadecimal digits."""
    text = body.partition(b"\0")[2]
    lines = (_inflated(text[1:]) if compressed else text).split(b"\n")
    try:
        return bytes.fromhex(b"".join(lines[3:]).decode("ascii"))
    except ValueError:
        return b"damaged"


def _international_text(body: bytes) -> bytes:
    """The text of an iTXt chunk (PNG specification, section 11.3.3.4)."""
    after = body.partition(b"\0")[2]
    text = after[2:].split(b"\0", 2)[-1]
    return _inflated(text) if after[:1] == b"\1" else text


# --- TIFF, and EXIF, which has its form ----------------------------------------------------------


@dataclass(frozen=True)
class _Directory:
    """The first directory of a TIFF: where it is, and its entries."""

    order: str  # "<" or ">", as struct takes it
    start: int  # of the number of entries
    big: bool
    entries: list[bytes]
    whole: bool  # whether all entries that it announces are there

    def fields(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield tag, type, number of values, and the values or their offset."""
        form = "HHQ8s" if self.big else "HHI4s"
        for entry in self.entries:
            yield struct.unpack(self.order + form, entry)


def _directory(content: bytes) -> _Directory:
    """Read the first directory.

    Raises:
        ValueError, struct.error, OverflowError: there is none.
    """
    if not content.startswith(TIFF):
        raise ValueError("not the form of a TIFF")
    order = "<" if content[:1] == b"I" else ">"
    big = b"+" in content[:4]
    start = struct.unpack_from(f"{order}{'8xQ' if big else '4xI'}", content)[0]
    number = struct.unpack_from(f"{order}{'Q' if big else 'H'}", content, start)[0]
    first, size = start + (8 if big else 2), 20 if big else 12
    there = min(number, (len(content) - first) // size)
    entries = [content[first + size * n : first + size * (n + 1)] for n in range(there)]
    return _Directory(order, start, big, entries, there == number)


def _orientation_of(content: bytes) -> int:
    """The orientation in the first directory of a TIFF or EXIF; 0 if it has none.

    Raises:
        ValueError, struct.error, OverflowError: it can't be read.
    """
    directory = _directory(content)
    for tag, kind, number, value in directory.fields():
        if tag == _ORIENTATION:
            form = directory.order + _INTEGERS.get(kind, "")
            # Of several numbers, programs take the first, if the entry itself holds them.
            if not 0 < number * struct.calcsize(form) <= len(value):
                raise ValueError("the orientation is no number")
            return int(struct.unpack_from(form, value)[0])
    if not directory.whole:
        raise ValueError("the directory is cut off")
    return 0


def _strip_tiff(content: bytes) -> Stripped:
    """Leave out the tags that describe the picture, and all pictures but the first."""
    try:
        directory = _directory(content)
    except _UNREADABLE:
        return Stripped(content)
    if not directory.whole:
        return Stripped(content)
    kept, xmp, reduced, tags = [], None, False, set()
    word = "Q" if directory.big else "I"
    for entry, (tag, _, number, value) in zip(directory.entries, directory.fields(), strict=True):
        tags.add(tag)
        if tag == _SUBFILE_TYPE:
            reduced = bool(struct.unpack_from(directory.order + "I", value)[0] & 1)
        if tag == _XMP:
            offset = struct.unpack(directory.order + word, value)[0]
            xmp = content[offset : offset + number]
        if tag not in _DESCRIPTIVE | {_ORIENTATION} and (tag <= _LAST_STRUCTURAL or tag == _LERC):
            kept.append(entry)
    orientation, doubtful = read_orientation(content, xmp)
    count = struct.pack(directory.order + ("Q" if directory.big else "H"), len(kept))
    no_other = struct.pack(directory.order + word, 0)
    replaced = b"".join([count, *kept, no_other])
    end = directory.start + len(replaced)
    stripped = b"".join([content[: directory.start], replaced, content[end:]])
    # DNG says that it is one, Canon's CR2 has a mark, and others put a preview first.
    preview = content[8:10] == b"CR" or _DNG_VERSION in tags
    preview = preview or (reduced and _SUB_DIRECTORIES in tags)
    return Stripped(stripped, orientation, doubtful, preview=preview)
