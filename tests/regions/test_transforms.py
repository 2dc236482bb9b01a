"""Views of photographs; odd, broken or hostile photographs are decoded as a viewer shows them, or
refused by name.

S is the side of a view in pixels.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import S
from PIL import Image, ImageFile

from pipeline.errors import InputError, MissingError
from pipeline.images import MOST_PIXELS
from pipeline.regions.transforms import load_image, to_tensor, view_of


def noise(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return random pixels, (height, width, channels) uint8."""
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loaded(path: Path) -> np.ndarray:
    """Decode an image that must come out in RGB, (H, W, 3) int."""
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# Views -------------------------------------------------------------------------------------------


def ramps(width: int = 240, height: int = 120) -> Image.Image:
    """Draw an image whose red is x and whose green is y, so that a crop shows its position."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8))


def crop(image: Image.Image, number: int, key: str = "a", seed: int = 0, flip: bool = True) -> Any:
    return view_of(image, number, size=S, image_id=key, seed=seed, flip=flip)


def test_view_0_is_the_plain_resize() -> None:
    image = ramps()
    expected = np.asarray(image.resize((S, S), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(crop(image, 0), expected)
    np.testing.assert_array_equal(crop(image, 0, key="b", seed=9), expected)


def test_other_views_depend_only_on_seed_image_and_number() -> None:
    image = ramps()
    first = crop(image, 1)
    np.random.default_rng(1).random()
    torch.manual_seed(7)
    np.testing.assert_array_equal(crop(image.copy(), 1), first)
    others = [crop(image, 0), crop(image, 2), crop(image, 1, key="b"), crop(image, 1, seed=1)]
    for number, other in enumerate(others):
        for another in [first, *others[:number]]:
            assert (other != another).any()


def crop_of(view: np.ndarray) -> tuple[float, float, float, float, bool]:
    """Return left, top, width and height in pixels of `ramps`, and whether it is mirrored."""
    row, column = view[S // 2, :, 0].astype(float), view[:, S // 2, 1].astype(float)
    mirrored = bool(row[0] > row[-1])
    if mirrored:
        row = row[::-1]
    # From a quarter to three quarters of the view: at its ends the average covers fewer pixels.
    quarter, rest = S // 4, 3 * S // 4
    width = (row[rest] - row[quarter]) * S / (rest - quarter)
    height = (column[rest] - column[quarter]) * S / (rest - quarter)
    left = row[quarter] + 0.5 - width * (quarter + 0.5) / S
    top = column[quarter] + 0.5 - height * (quarter + 0.5) / S
    return left, top, width, height, mirrored


def test_crops_have_half_to_all_of_each_side_and_half_are_mirrored() -> None:
    image = ramps()
    crops = np.array([crop_of(crop(image, 1 + n % 3, key=f"image-{n}")) for n in range(300)])
    left, top, width, height, mirrored = crops.T
    for start, side, full in ((left, width, 240), (top, height, 120)):
        slack = 4.0  # of rounding to 8 bits
        assert side.min() >= full / 2 - slack
        assert side.max() <= full + slack
        assert start.min() >= -slack
        assert (start + side).max() <= full + slack
        # They cover the whole of these bounds.
        assert side.min() < 0.55 * full
        assert side.max() > 0.95 * full
        assert start.min() < 0.05 * full
        assert (start + side).max() > 0.95 * full
    assert abs(np.corrcoef(width / 240, height / 120)[0, 1]) < 0.25
    assert 0.4 < mirrored.mean() < 0.6


def test_without_flip_nothing_is_mirrored_and_crops_are_the_same() -> None:
    image = ramps()
    for n in range(60):
        plain = crop(image, 1, key=f"image-{n}", flip=False)
        assert not crop_of(plain)[4]
        flipped = crop(image, 1, key=f"image-{n}")
        same = flipped[:, ::-1] if crop_of(flipped)[4] else flipped
        np.testing.assert_array_equal(same, plain)


def test_to_tensor_scales_and_puts_channels_first() -> None:
    tensor = to_tensor(np.array([[[0, 51, 255], [102, 0, 0]]], dtype=np.uint8))
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.tensor([[[0.0, 0.4]], [[0.2, 0.0]], [[1.0, 0.0]]]))


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
        pixels = loaded(tmp_path / name)[middle]
        assert np.abs(pixels - expected[middle]).max() <= tolerance
    content = (tmp_path / "inks.jpg").read_bytes()
    assert b"Adobe" in content  # so the inverted kind was indeed read


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
    """Encode a file of one strip (TIFF 6.0, section 8)."""
    height, width = values.shape
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 16 << 16),  # bits per sample; a short lies in the upper half of its field
        (259, 3, 1 << 16),  # no compression
        (262, 3, 1 << 16),  # 0 is black
        (273, 4, 8),  # where the strip starts
        (278, 4, height),
        (279, 4, values.nbytes),
    ]
    entries = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack(">H", len(tags)) + entries + bytes(4)
    return b"MM\0*" + struct.pack(">I", 8 + values.nbytes) + values.tobytes() + directory


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    """Each image is opaque on the left, (10, 20, 30) or grey 10, and transparent on the right."""
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
        pixels = loaded(tmp_path / name)
        assert np.abs(pixels[:, :4] - left).max() == 0, name
        assert np.abs(pixels[:, 4:] - right).max() <= 1, name


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation_is_decoded(tmp_path: Path, suffix: str) -> None:
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


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels (H, W, 3) by the EXIF standard's table, as a viewer does."""
    swapped = pixels.transpose(1, 0, 2)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(load_image(tmp_path / "turned.png")), turned(pixels, orientation)
    )


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("L", "png", (92, 92, 92)),
        ("LA", "png", (92, 92, 92)),
        ("1", "png", (255, 255, 255)),
        ("P", "png", (200, 40, 60)),
        ("P", "gif", (200, 40, 60)),
        ("RGBA", "png", (200, 40, 60)),
        ("CMYK", "tif", (200, 40, 60)),
        ("CMYK", "jpg", (200, 40, 60)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, mode: str, suffix: str, expected: tuple[int, ...]
) -> None:
    source = Image.new("RGB", (16, 8), (200, 40, 60))
    if mode == "1":
        source = Image.new("RGB", (16, 8), (255, 255, 255))
    if mode == "P":
        source = source.quantize(4)
    path = tmp_path / f"image.{suffix}"
    source.convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (16, 8))
    assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 4


# What is refused ---------------------------------------------------------------------------------


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """Encode a PNG of 8-bit grey with the pixels ``body`` (PNG specification, section 5)."""

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


# What is in the file, and what the message must say about it.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero.jpg": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"<html>not found</html>", "JPEG, PNG"),
    "cut.jpg": (lambda: encoded("JPEG")[:-300], "truncated"),
    "start.jpg": (lambda: encoded("JPEG")[:30], ""),
    "cut.png": (lambda: encoded("PNG")[:2000], "truncated"),
    "postscript.jpg": (lambda: encoded("EPS"), "JPEG, PNG"),
    "float.tif": (lambda: encoded("TIFF", np.zeros((4, 4), np.float32)), "floating-point"),
    "deep.tif": (lambda: encoded("TIFF", np.full((4, 4), 65536, np.int32)), "65536 .*65535"),
    "negative.tif": (lambda: encoded("TIFF", np.full((4, 4), -1, np.int32)), "-1 .*65535"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_file_and_the_reason_are_named(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content())
    with pytest.raises(InputError, match=rf"^{path} .*\(.*{reason}.*\)"):
        load_image(path)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=f"{tmp_path / 'absent.png'}"):
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize("damage", ["no image", "cut off", "empty", "folder"])
def test_a_broken_image_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.png"
    ramps().save(path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"no image": b"text", "empty": b""}.get(damage, content[:200]))
    with pytest.raises(InputError, match=f"^{path} ") as caught:
        load_image(path)
    assert caught.value.remedy
    with pytest.raises(InputError, match=f"^{path} .* Name another photograph$"):
        load_image(path, "Name another photograph")


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path} .*folder"):
        load_image(tmp_path)
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match=r"loop\.jpg .*Too many levels"):
        load_image(loop)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(png(2, 2))
    path.chmod(0)
    with pytest.raises(InputError, match=r"locked\.png .*Permission denied"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.png"
    for width, reason in (
        (MOST_PIXELS + 1, rf"{MOST_PIXELS + 1}\b.*\b{MOST_PIXELS}\b"),
        (2 * MOST_PIXELS + 1, f"{2 * MOST_PIXELS + 1}"),  # refused by Pillow
    ):
        path.write_bytes(png(width, 1))
        with pytest.raises(InputError, match=rf"bomb\.png .*{reason}"):
            load_image(path)


def test_a_lack_of_memory_is_not_blamed_on_the_file(
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
    """It has more pixels than Pillow accepts without a warning, and takes half a gigabyte."""
    width, height = 10_000, 9_000
    path = tmp_path / "large.png"
    path.write_bytes(png(width, height, (b"\0" + b"\x80" * width) * height))
    image = load_image(path)
    assert (image.size, image.getpixel((9_999, 8_999))) == ((width, height), (128, 128, 128))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_files_are_decoded_or_refused(tmp_path: Path, form: str) -> None:
    """Truncations and flipped bits, both seeded, raise nothing but `InputError`."""
    whole, path = encoded(form), tmp_path / "damaged"
    outcomes = {"decoded": 0, "refused": 0}
    for seed in range(200 if form in ("JPEG", "PNG") else 60):
        rng = np.random.default_rng(seed)
        content = bytearray(whole)
        if seed % 2:
            del content[rng.integers(0, len(content)) :]
        else:
            # Half of them in the first bytes, which hold headers and tables.
            end = len(content) if seed % 4 else 200
            for position in rng.integers(0, end, size=rng.integers(1, 6)):
                content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            image = load_image(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
            outcomes["refused"] += 1
        else:
            assert image.mode == "RGB"
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > 0, outcomes
