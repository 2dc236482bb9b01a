"""`prepare --check` calls exactly those files sound that extraction can decode, in every format.

The files are made here byte by byte where no library writes such a thing.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from trees import check_contents

from pipeline.errors import InputError
from pipeline.image_metadata import read_orientation
from pipeline.images import read_header, upright
from pipeline.regions.transforms import load_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS).resize((80, 48))
HALF = Image.fromarray(RNG.integers(0, 65536, (24, 40), dtype=np.uint16))


def saved(form: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def mode(name: str) -> Image.Image:
    return PICTURE.convert(name)


SOUND = {
    "plain.jpg": saved("JPEG"),
    "grey.jpg": saved("JPEG", mode("L")),
    "cmyk.jpg": saved("JPEG", mode("CMYK")),
    "progressive.jpg": saved("JPEG", progressive=True),
    "restarts.jpg": saved("JPEG", restart_marker_blocks=2),
    "two.mpo": saved("MPO", save_all=True, append_images=[PICTURE]),
    "two.jpg": saved("MPO", save_all=True, append_images=[PICTURE]),
    "plain.png": saved("PNG"),
    "wrong.jpg": saved("PNG"),
    "alpha.png": saved("PNG", mode("RGBA")),
    "grey-alpha.png": saved("PNG", mode("LA")),
    "palette.png": saved("PNG", mode("P")),
    "bits.png": saved("PNG", mode("1")),
    "half.png": saved("PNG", HALF),
    "moving.png": saved("PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "plain.gif": saved("GIF"),
    "moving.gif": saved("GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "plain.webp": saved("WEBP"),
    "lossless.webp": saved("WEBP", mode("RGBA"), lossless=True),
    "moving.webp": saved("WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
    "plain.bmp": saved("BMP"),
    "palette.bmp": saved("BMP", mode("P")),
    "bits.bmp": saved("BMP", mode("1")),
    "plain.ppm": saved("PPM"),
    "grey.ppm": saved("PPM", mode("L")),
    "plain.jp2": saved("JPEG2000"),
    "half.jp2": saved("JPEG2000", HALF),
    "codestream.j2k": saved("JPEG2000", no_jp2=True),
    **{
        f"{name}-{how}.tif": saved("TIFF", image, compression=how)
        for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
        for name, image in (
            ("rgb", PICTURE),
            ("grey", mode("L")),
            ("cmyk", mode("CMYK")),
            ("palette", mode("P")),
            ("half", HALF),
        )
    },
    "jpeg.tif": saved("TIFF", compression="jpeg"),
    "fax.tif": saved("TIFF", mode("1"), compression="group4"),
    "pages.tif": saved("TIFF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "big.tif": saved("TIFF", big_tiff=True),
}

REFUSED = {
    "empty.jpg": b"",
    "text.jpg": b"<html>not found</html>",
    "mark.jpg": b"\xff\xd8\xff",
    "mark.png": b"\x89PNG\r\n\x1a\n",
    "mark.tif": b"II*\0",
    "offset.tif": b"II+\0\x08\0\0\0" + b"\xff" * 8,
    "thumbnail.jpg": b"\xff\xd8\xff\xe1\0\x46Exif\0\0" + b"\xff\xd9" * 40,
    "float.tif": saved("TIFF", mode("F")),
    "float.pfm": saved("PPM", mode("F")),
    "deep.tif": saved("TIFF", Image.fromarray(np.full((4, 4), 1 << 20, np.int32))),
    "postscript.jpg": saved("EPS"),
    "icon.jpg": saved("ICO"),
    "modern.jpg": saved("AVIF"),
}


def agreement(folder: Path, contents: dict[str, bytes]) -> dict[str, np.ndarray | None]:
    """The pixels of each file, None if it is refused: check and extraction must say the same."""
    findings = check_contents(folder, {**contents, "last": saved("BMP")})
    refused = {image.image_id for image, _ in findings.unreadable}
    assert not findings.refused
    found: dict[str, np.ndarray | None] = {}
    for name in contents:
        try:
            found[name] = np.asarray(load_image(folder / "i" / name))
        except InputError:
            found[name] = None
    assert refused == {name for name, pixels in found.items() if pixels is None}
    return found


def cuts() -> Iterator[tuple[str, bytes]]:
    """Every sound file, cut off at several points, and with bytes after it."""
    for name, content in SOUND.items():
        for share in (0.02, 0.3, 0.6, 0.9):
            yield f"{share}-{name}", content[: int(len(content) * share)]
        for less in (1, 2, 3, 13, 50):
            yield f"{less}-{name}", content[:-less]
        for more in (1, 63, 5000):
            yield f"and-{more}-{name}", content + bytes(more)


def test_sound_files_are_read(tmp_path: Path) -> None:
    for name, pixels in agreement(tmp_path, SOUND).items():
        assert pixels is not None, name


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    for name, pixels in agreement(tmp_path, REFUSED).items():
        assert pixels is None, name


def test_cut_off_files_and_appended_bytes(tmp_path: Path) -> None:
    found = agreement(tmp_path, dict(cuts()))
    outcomes = {
        name: pixels is None for name, pixels in found.items() if name.startswith(("0.3", "0.6"))
    }
    # The second picture of some begins before that.
    whole = {name for name, refused in outcomes.items() if not refused}
    assert all("two" in name or "moving" in name or "pages" in name for name in whole), whole
    for name in SOUND:
        assert found[f"and-5000-{name}"] is not None, name


@pytest.mark.parametrize(
    "name", ["plain.jpg", "progressive.jpg", "two.jpg", "plain.png", "plain.gif"]
)
def test_damage_anywhere(tmp_path: Path, name: str) -> None:
    """Bits that changed, and blocks that a disk lost: in headers, and in pixels."""
    contents = {}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        content = bytearray(SOUND[name])
        place = int(rng.integers(3, 700 if seed % 2 else len(content)))
        block = slice(place, place + 40)
        if seed % 5 == 0:
            content[block] = rng.bytes(len(content[block]))
        elif seed % 5 == 1:
            content[block] = b"\xff" * len(content[block])
        elif seed % 5 == 2:
            del content[block]
        else:
            content[place] = int(rng.integers(256))
        contents[str(seed)] = bytes(content)
    refused = [pixels is None for pixels in agreement(tmp_path, contents).values()]
    assert sum(refused) > 10


# --- metadata ------------------------------------------------------------------------------------


def exif(kind: int = 3, number: int = 1, value: bytes = b"\6\0\0\0", entries: int = 1) -> bytes:
    """EXIF with an orientation alone, in little-endian order."""
    return struct.pack("<2sHIHHHI", b"II", 42, 8, entries, 0x0112, kind, number) + value


UPSIDE_DOWN = exif(value=b"\3\0\0\0") + bytes(4)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'

# EXIF from which no orientation can be read, though there is something.
DAMAGED = {
    "nothing": b"\0",
    "text": b"no EXIF at all",
    "start": UPSIDE_DOWN[:6],
    "cut": exif(entries=9)[:14],
    "offset": b"II*\0\xff\xff\xff\xff",
    "order": b"XX" + UPSIDE_DOWN[2:],
    "string": exif(kind=2),
    "fraction": exif(kind=5),
    "unknown-type": exif(kind=77),
    "tuple": exif(number=9),
    "none": exif(number=0),
    "many": exif(number=0xFFFFFFFF),
    "huge": exif(kind=4, value=b"\xff\xff\xff\xff"),
    "nine": exif(value=b"\x09\0\0\0"),
}


def with_segments(content: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with further segments at its start."""
    more = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return content[:2] + more + content[2:]


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    value = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", value)


def with_chunks(content: bytes, *chunks: bytes, at_end: bool = False) -> bytes:
    """A PNG with further chunks after its header, or before its end."""
    place = len(content) - 12 if at_end else 33
    return content[:place] + b"".join(chunks) + content[place:]


def with_tags(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF of grey pixels with further tags: number, type, count, value or offset."""
    width, height, pixels = 8, 4, bytes(range(0, 256, 8))
    word = struct.Struct("<I").pack
    basic = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (277, 1), (278, height)]
    entries = [(tag, 4, 1, word(value)) for tag, value in [*basic, (279, len(pixels))]]
    entries.append((273, 4, 1, word(8)))
    fields = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted([*entries, *tags]))
    number = struct.pack("<H", len(entries) + len(tags))
    return b"II*\0" + word(8 + len(pixels)) + pixels + number + fields + word(0)


def raw_profile(content: bytes) -> bytes:
    """EXIF as ImageMagick writes it into a text."""
    return b"Raw profile type exif\0\nexif\n%8d\n" % len(content) + content.hex().encode() + b"\n"


def webp(name: bytes, body: bytes) -> bytes:
    """A WebP with a chunk of metadata, which Pillow would not write as it is."""
    stored = saved("WEBP", exif=b"Exif\0\0" + bytes(len(body) - 6 if len(body) > 6 else 0) + b"\0")
    start = stored.index(b"EXIF")
    padded = body + bytes(len(body) % 2)
    rest = stored[:start] + name + struct.pack("<I", len(body)) + padded
    return rest[:4] + struct.pack("<I", len(rest) - 8) + rest[8:]


JPG, PNG = SOUND["plain.jpg"], SOUND["plain.png"]
HOSTILE = {
    **{
        f"{name}{suffix}": content
        for name, body in DAMAGED.items()
        for suffix, content in {
            ".jpg": with_segments(JPG, (0xE1, b"Exif\0\0" + body)),
            ".png": with_chunks(PNG, chunk(b"eXIf", body)),
            "-raw.png": with_chunks(PNG, chunk(b"tEXt", raw_profile(b"Exif\0\0" + body))),
            ".webp": webp(b"EXIF", body),
        }.items()
    },
    "no-digits.png": with_chunks(PNG, chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz")),
    "jfif.jpg": with_segments(JPG, (0xE0, b"JFIF")),
    "mpf.jpg": with_segments(JPG, (0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
    "mpf-text.jpg": with_segments(JPG, (0xE2, b"MPF\0?")),
    "icc.jpg": with_segments(JPG, (0xE2, b"ICC_PROFILE\0")),
    "photoshop.jpg": with_segments(JPG, (0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1\0")),
    "adobe.jpg": with_segments(JPG, (0xEE, b"Adobe")),
    "xmp.jpg": with_segments(JPG, (0xE1, b"http://ns.adobe.com/xap/1.0/\0<\xff>")),
    "long.jpg": with_segments(JPG, *[(0xFE, bytes(65_000))] * 10),
    "fill.jpg": JPG[:2] + b"\xff\xff\xff" + JPG[2:],
    "icc-method.png": with_chunks(PNG, chunk(b"iCCP", b"a\0\1")),
    "icc-bomb.png": with_chunks(PNG, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
    "icc-empty.png": with_chunks(PNG, chunk(b"iCCP", b"")),
    "gamma.png": with_chunks(PNG, chunk(b"gAMA", b"")),
    "physical.png": with_chunks(PNG, chunk(b"pHYs", b"")),
    "checksum.png": with_chunks(PNG, chunk(b"tIME", b"1234567", 0)),
    "method.png": with_chunks(PNG, chunk(b"zTXt", b"a\0\7")),
    "animation.png": with_chunks(PNG, chunk(b"acTL", b"")),
    "frames.png": with_chunks(PNG, chunk(b"fcTL", bytes([9] * 26))),
    **{
        f"{kind}-text-{at_end}.png": with_chunks(PNG, text, at_end=at_end)
        for at_end in (False, True)
        for kind, text in (
            ("z", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
            ("i", chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3 << 20)))),
        )
    },
    "exif.tif": with_tags((34665, 4, 1, b"\xff\xff\xff\x7f")),
    "gps.tif": with_tags((34853, 4, 1, b"\1\0\0\0")),
    "icc.tif": with_tags((34675, 7, 9999, b"\1\0\0\0")),
    "xmp.tif": with_tags((700, 1, 9999, b"\1\0\0\0")),
    "resolution.tif": with_tags((282, 5, 1, b"\xff\xff\xff\x7f"), (296, 2, 4, b"abcd")),
    "orientation.tif": with_tags((274, 2, 4, b"abcd")),
}


def test_metadata_does_not_decide_whether_pixels_are_read(tmp_path: Path) -> None:
    for name, pixels in agreement(tmp_path, HOSTILE).items():
        expected = {"jpg": "plain.jpg", "png": "plain.png", "webp": "plain.webp"}.get(
            name.rpartition(".")[2]
        )
        assert pixels is not None, name
        if expected:
            stored = np.asarray(Image.open(io.BytesIO(SOUND[expected])))
            np.testing.assert_array_equal(pixels, stored, err_msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of the caller's `Image.open`
@pytest.mark.parametrize("name", DAMAGED)
def test_an_image_in_memory_is_read_whatever_its_exif(name: str) -> None:
    image = Image.open(io.BytesIO(HOSTILE[f"{name}.jpg"]))
    np.testing.assert_array_equal(np.asarray(upright(image)), np.asarray(image))


def test_a_doubtful_orientation_is_noted(tmp_path: Path) -> None:
    kinds = {
        name: content
        for name, content in HOSTILE.items()
        if name.removesuffix("-raw.png").rpartition(".")[0] in DAMAGED or name.endswith("-raw.png")
    }
    kinds["orientation.tif"] = HOSTILE["orientation.tif"]
    kinds["no-digits.png"] = HOSTILE["no-digits.png"]
    assert len(kinds) > 4 * len(DAMAGED)
    findings = check_contents(tmp_path, {**kinds, **SOUND})
    assert {image.image_id for image in findings.doubtful} == set(kinds)


TURNED = {
    "exif.jpg": with_segments(JPG, (0xE1, b"Exif\0\0" + UPSIDE_DOWN)),
    "xmp.jpg": with_segments(JPG, (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "damaged.jpg": with_segments(
        JPG, (0xE1, b"Exif\0\0?"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    ),
    "long.jpg": with_segments(JPG, (0xE1, b"Exif\0\0" + exif(4, value=b"\3\0\0\0"))),
    "two.jpg": with_segments(JPG, (0xE1, b"Exif\0\0" + exif(number=2, value=b"\3\0\0\0"))),
    "exif.png": with_chunks(PNG, chunk(b"eXIf", UPSIDE_DOWN)),
    "late.png": with_chunks(PNG, chunk(b"eXIf", UPSIDE_DOWN), at_end=True),
    "raw.png": with_chunks(PNG, chunk(b"tEXt", raw_profile(b"Exif\0\0" + UPSIDE_DOWN))),
    "xmp.png": with_chunks(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "packed.png": with_chunks(
        PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))
    ),
    "exif.webp": webp(b"EXIF", UPSIDE_DOWN),
    "prefix.webp": webp(b"EXIF", b"Exif\0\0" + UPSIDE_DOWN),
    "tag.tif": saved("TIFF", tiffinfo={274: 3}),
    "big.tif": saved("TIFF", tiffinfo={274: 3}, big_tiff=True),
    "packed.tif": saved("TIFF", tiffinfo={274: 3}, compression="tiff_lzw"),
    "xmp.tif": saved("TIFF", tiffinfo={700: XMP}),
}


@pytest.mark.parametrize("name", TURNED)
def test_orientation_is_found_wherever_a_format_has_it(tmp_path: Path, name: str) -> None:
    suffix = name.rpartition(".")[2]
    plain = SOUND["rgb-raw.tif" if suffix == "tif" else f"plain.{suffix}"]
    found = agreement(tmp_path, {name: TURNED[name], "plain": plain})
    assert found[name] is not None
    assert found["plain"] is not None
    np.testing.assert_array_equal(found[name], found["plain"][::-1, ::-1])


LONG_HEADER = (0xE2, bytes(60_000))
"""A segment of metadata; some of them are longer than what is read of a file at first."""


@pytest.mark.parametrize("segments", [0, 1, 6], ids=["first part", "second part", "whole"])
def test_the_header_of_a_jpeg_is_read_from_its_beginning(segments: int) -> None:
    content = with_segments(JPG, *[LONG_HEADER] * segments, (0xE1, b"Exif\0\0" + UPSIDE_DOWN))
    source = io.BytesIO(content + bytes(1 << 20))
    assert read_header(source) == (PICTURE.size, 3)
    assert source.tell() == (0 if segments < 6 else len(source.getvalue()))


@pytest.mark.parametrize("name", SOUND)
def test_the_header_of_any_format_is_read(name: str) -> None:
    with Image.open(io.BytesIO(SOUND[name])) as image:
        assert read_header(io.BytesIO(SOUND[name])) == (image.size, 1)


@pytest.mark.parametrize("value", range(9))
def test_orientation_against_pillow(value: int) -> None:
    stored = Image.Exif()
    stored[0x010F] = "a maker with a long name"
    stored[0x0112] = value
    assert read_orientation(stored.tobytes(), None) == (value or 1, False)


def test_text_that_pillow_refuses_is_here(tmp_path: Path) -> None:
    """The test's own files: Pillow alone reads neither."""
    assert PngImagePlugin.MAX_TEXT_CHUNK < 3 << 20
    for name in ("z-text-False.png", "icc-bomb.png", "icc-method.png", "gamma.png"):
        with pytest.raises((ValueError, OSError)):
            Image.open(io.BytesIO(HOSTILE[name])).load()


@pytest.mark.parametrize(
    "content",
    [
        with_tags((254, 4, 1, b"\1\0\0\0"), (330, 4, 1, b"\1\0\0\0")),
        with_tags((50706, 1, 4, b"\1\4\0\0")),
        with_tags()[:8] + b"CR" + with_tags()[10:],
    ],
)
def test_the_preview_of_a_raw_file_is_not_taken_for_it(tmp_path: Path, content: bytes) -> None:
    assert agreement(tmp_path, {"a.dng": content})["a.dng"] is None


@pytest.mark.parametrize(
    "text",
    [b"<x tiff:Orientation='6'/>", b'<x tiff:Orientation = "6"/>', b"<tiff:Orientation>6</x>"],
)
def test_orientation_in_xmp_is_read_as_xml_may_spell_it(text: bytes) -> None:
    assert read_orientation(None, text) == (6, False)


def test_orientation_in_a_second_packet_of_xmp_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (4, 2)).save(path)
    packets = [b"http://ns.adobe.com/xap/1.0/\0" + text for text in (b"<x:xmpmeta/>", XMP)]
    segments = b"".join(b"\xff\xe1" + (len(p) + 2).to_bytes(2, "big") + p for p in packets)
    content = path.read_bytes()
    path.write_bytes(content[:2] + segments + content[2:])
    with path.open("rb") as stream:
        assert read_header(stream) == ((4, 2), 3)
    packets.reverse()
    segments = b"".join(b"\xff\xe1" + (len(p) + 2).to_bytes(2, "big") + p for p in packets)
    path.write_bytes(content[:2] + segments + content[2:])
    with path.open("rb") as stream:
        assert read_header(stream) == ((4, 2), 3)
