"""Photographs that are odd, broken or hostile: decoded as a viewer shows them, or refused by name.

View 0, crops and EXIF orientation are tested in `test_regions`.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.errors import GmpipeError
from pipeline.images import MOST_PIXELS
from pipeline.regions.transforms import load_image, view_of


def noise(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(height, width, channels) uint8"""
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loaded(path: Path) -> np.ndarray:
    """(H, W, 3) int, of an image that must be RGB."""
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# Kinds of pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "ppm", "jp2"])
def test_rgb_comes_through_and_outlives_its_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    lossless = {"webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(noise()).save(path, **lossless)
    image = load_image(path)
    path.unlink()
    np.testing.assert_array_equal(np.asarray(image), noise())
    view = view_of(image, 1, size=32, image_id="a", seed=0, flip=True)
    assert (view.shape, view.dtype) == ((32, 32, 3), np.uint8)


def test_cmyk_is_ink_and_adobes_jpeg_is_inverted(tmp_path: Path) -> None:
    inks = np.repeat(np.repeat(noise(2, 3, channels=4), 16, axis=0), 16, axis=1)
    c, m, y, k = np.moveaxis(inks.astype(float), 2, 0)
    expected = np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], axis=2)
    for name, tolerance in (("inks.tif", 1), ("inks.jpg", 12)):
        Image.fromarray(inks, mode="CMYK").save(tmp_path / name)
        middle = np.s_[8::16, 8::16]  # of each block: JPEG smears its edges
        found = loaded(tmp_path / name)[middle]
        assert np.abs(found - expected[middle]).max() <= tolerance
    content = (tmp_path / "inks.jpg").read_bytes()
    assert b"Adobe" in content  # so what was read is indeed the inverted kind


@pytest.mark.parametrize(
    ("name", "dtype"), [("g.png", "<u2"), ("g.tif", "<u2"), ("g.tif", ">u2"), ("g.pgm", ">u2")]
)
def test_grey_of_16_bits_is_scaled(tmp_path: Path, name: str, dtype: str) -> None:
    values = np.linspace(0, 65535, 600).round().astype(dtype).reshape(20, 30)
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 30 20 65535\n" + values.tobytes())
    elif dtype == ">u2":
        path.write_bytes(big_endian_tiff(values))
    else:
        Image.fromarray(values).save(path)
    with Image.open(path) as stored:
        assert stored.mode.startswith("I")
    expected = np.array([round(v / 257) for v in values.ravel().tolist()]).reshape(20, 30)
    np.testing.assert_array_equal(loaded(path), np.stack([expected] * 3, axis=2))


def big_endian_tiff(values: np.ndarray) -> bytes:
    """A file of one strip (TIFF 6.0, section 8)."""
    height, width = values.shape
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 16 << 16),  # bits a sample; a short lies in the upper half of its field
        (259, 3, 1 << 16),  # no compression
        (262, 3, 1 << 16),  # 0 is black
        (273, 4, 8),  # where the strip starts
        (278, 4, height),
        (279, 4, values.nbytes),
    ]
    entries = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack(">H", len(tags)) + entries + bytes(4)
    return b"MM\0*" + struct.pack(">I", 8 + values.nbytes) + values.tobytes() + directory


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    """Each image: left opaque (10, 20, 30) or grey 10, right transparent or half so."""
    colour = np.full((4, 8, 3), (10, 20, 30), dtype=np.uint8)
    half = np.full((4, 8, 1), 255, dtype=np.uint8)
    half[:, 4:] = 128
    grey, key = np.full((4, 8), 10, dtype=np.uint8), np.full((4, 8), 10, dtype=np.uint8)
    key[:, 4:] = 77
    marked = colour.copy()
    marked[:, 4:] = (1, 2, 3)
    palette = Image.fromarray((key == 77).astype(np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 1, 2, 3])
    opaque, dark = (10, 20, 30), (10, 10, 10)
    mixed = tuple(round(255 - (255 - value) * 128 / 255) for value in opaque)
    rgba = Image.fromarray(np.concatenate([colour, half], axis=2))
    cases: list[tuple[str, Image.Image, dict[str, object], tuple[int, ...], tuple[int, ...]]] = [
        ("rgba.png", rgba, {}, opaque, mixed),
        ("rgba.webp", rgba, {"lossless": True, "exact": True}, opaque, mixed),
        ("rgba.tif", rgba, {}, opaque, mixed),
        ("la.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(half[..., 0])]), {},
         dark, (132,) * 3),
        ("entry.png", palette, {"transparency": 1}, opaque, (255,) * 3),
        ("entries.png", palette, {"transparency": bytes([255, 128])}, opaque, (128, 128, 129)),
        ("entry.gif", palette, {"transparency": 1}, opaque, (255,) * 3),
        ("key.png", Image.fromarray(marked), {"transparency": (1, 2, 3)}, opaque, (255,) * 3),
        ("grey-key.png", Image.fromarray(key), {"transparency": 77}, dark, (255,) * 3),
        ("deep-key.png", Image.fromarray(key.astype(np.uint16) * 257), {"transparency": 77 * 257},
         dark, (255,) * 3),
    ]  # fmt: skip
    for name, image, options, left, right in cases:
        image.save(tmp_path / name, **options)
        found = loaded(tmp_path / name)
        assert np.abs(found[:, :4] - left).max() == 0, name
        assert np.abs(found[:, 4:] - right).max() <= 1, name


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 8), color) for color in ((200, 0, 0), (0, 0, 200))]
    path = tmp_path / f"frames.{suffix}"
    lossless = {"webp": {"lossless": True}}.get(suffix, {})
    frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
    with Image.open(path) as stored:
        assert stored.n_frames == 2
    np.testing.assert_array_equal(loaded(path), np.full((8, 16, 3), (200, 0, 0)))


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)])
def test_a_line_of_pixels_has_views(tmp_path: Path, size: tuple[int, int]) -> None:
    line = np.linspace(0, 255, 30_000).astype(np.uint8).reshape(size[::-1])
    Image.fromarray(line).save(tmp_path / "line.png")
    image = load_image(tmp_path / "line.png")
    assert image.size == size
    for view in range(20):
        pixels = view_of(image, view, size=64, image_id="line", seed=0, flip=False)
        along = pixels[..., 0] if size[1] == 1 else pixels[..., 0].T
        assert pixels.shape == (64, 64, 3)
        assert (along == along[0]).all()
        assert (np.diff(along[0].astype(int)) > 0).all()


# What is refused ---------------------------------------------------------------------------------


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG of 8-bit grey (PNG specification, section 5), with compressed pixels ``body``."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(form: str, pixels: np.ndarray | None = None) -> bytes:
    stream = BytesIO()
    Image.fromarray(noise(40, 56) if pixels is None else pixels).save(stream, form)
    return stream.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero.jpg": (lambda: b"", "it is empty"),
    "text.jpg": (lambda: b"<html>not found</html>", "it is not, or too damaged to be, one of JPEG"),
    "cut.jpg": (lambda: encoded("JPEG")[:-300], "truncated"),
    "start.jpg": (lambda: encoded("JPEG")[:30], ""),
    "cut.png": (lambda: encoded("PNG")[:2000], "truncated"),
    "postscript.jpg": (lambda: encoded("EPS"), "it is not, or too damaged to be"),
    "float.tif": (lambda: encoded("TIFF", np.zeros((4, 4), np.float32)), "floating-point"),
    "deep.tif": (
        lambda: encoded("TIFF", np.full((4, 4), 65536, np.int32)),
        "grey values from 65536 to 65536",
    ),
    "negative.tif": (
        lambda: encoded("TIFF", np.full((4, 4), -1, np.int32)),
        "grey values from -1 to -1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_decoded_is_named_with_the_reason(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content())
    expected = rf"^{path} can't be decoded \(.*{re.escape(reason)}.*\)\. Replace the file"
    with pytest.raises(GmpipeError, match=expected):
        load_image(path)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(GmpipeError, match=r"can't be decoded \(Is a directory\)"):
        load_image(tmp_path)
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    with pytest.raises(GmpipeError, match=r"loop.jpg can't be decoded \(Too many levels"):
        load_image(loop)
    with pytest.raises(GmpipeError, match=r"no image at .*absent.jpg. Put it there"):
        load_image(tmp_path / "absent.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(png(2, 2))
    path.chmod(0)
    with pytest.raises(GmpipeError, match=r"locked.png can't be decoded \(Permission denied\)"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.png"
    for width, reason in (
        (MOST_PIXELS + 1, f"{MOST_PIXELS + 1} x 1 pixels, more than the {MOST_PIXELS} that are"),
        (2 * MOST_PIXELS + 1, f"{2 * MOST_PIXELS + 1} pixels. exceeds limit"),
    ):
        path.write_bytes(png(width, 1))
        with pytest.raises(GmpipeError, match=reason):
            load_image(path)


def test_memory_that_is_short_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    path = tmp_path / "good.png"
    path.write_bytes(png(2, 2, bytes(6)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        load_image(path)


@pytest.mark.slow
def test_a_large_photograph_is_decoded_without_a_warning(tmp_path: Path) -> None:
    """More pixels than those from which Pillow warns by itself; takes half a gigabyte."""
    width, height = 10_000, 9_000
    path = tmp_path / "large.png"
    path.write_bytes(png(width, height, (b"\0" + b"\x80" * width) * height))
    image = load_image(path)
    assert (image.size, image.getpixel((9_999, 8_999))) == ((width, height), (128, 128, 128))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_whatever_is_damaged_decodes_or_is_refused(tmp_path: Path, form: str) -> None:
    """Seeded truncations and flipped bits; nothing but `GmpipeError` comes out."""
    whole, path = encoded(form), tmp_path / "damaged"
    outcomes = {"decoded": 0, "refused": 0}
    for seed in range(200 if form in ("JPEG", "PNG") else 60):
        rng = np.random.default_rng(seed)
        content = bytearray(whole)
        if seed % 2:
            del content[rng.integers(0, len(content)) :]
        else:
            # Half of them in the first bytes, where headers and tables are.
            end = len(content) if seed % 4 else 200
            for place in rng.integers(0, end, size=rng.integers(1, 6)):
                content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            image = load_image(path)
        except GmpipeError as error:
            assert str(path) in str(error)  # noqa: PT017
            outcomes["refused"] += 1
        else:
            assert image.mode == "RGB"
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > 0, outcomes
