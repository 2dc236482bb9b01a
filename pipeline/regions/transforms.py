"""A photograph on disk -> square views of it, as the detector takes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.errors import GmpipeError
from pipeline.images import FORMATS, open_image

_SMALLEST_CROP = 0.5  # side of a random crop, as a share of the image's

# EXIF standard, tag 0x0112: what turns the stored pixels into the picture. Others are reserved.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_OF_A_DATA_SET = "Replace the file, or take it out of the data set."


def load_image(path: Path, remedy: str = _OF_A_DATA_SET) -> Image.Image:
    """Decode a photograph to RGB, turned as its EXIF orientation says.

    Grey of 16 bits is scaled to 8. What is transparent shows white. Of an animation, it is the
    first frame. CMYK is read as Adobe's programs write it (in a JPEG: inverted).

    Args:
        remedy: the end of the error's message, where the file can't be decoded.

    Raises:
        GmpipeError: the file is missing or can't be decoded; says why. A file that is damaged
            without breaking its format's rules (a bit of a JPEG's pixels, say) decodes.
    """
    try:
        with open_image(path) as image:
            return upright(image)
    except MemoryError:  # says nothing of the file
        raise
    except FileNotFoundError:
        raise GmpipeError(f"there is no image at {path}. Put it there, or prepare anew.") from None
    # Pillow's plugins raise whatever their parsing of a damaged file runs into: struct.error,
    # IndexError, KeyError, EOFError, zlib.error, SyntaxError, AttributeError and more.
    except Exception as error:
        raise GmpipeError(f"{path} can't be decoded ({_reason(path, error)}). {remedy}") from error


def upright(image: Image.Image) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says; see `load_image`.

    Raises:
        ValueError: the values' range is not known.
        Exception: whatever Pillow runs into in damaged pixels.
    """
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    picture = _to_rgb(image)
    return picture if turn is None else picture.transpose(turn)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "it is empty"
        return f"it is not, or too damaged to be, one of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    """
    Raises:
        ValueError: the values' range is not known.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose black and white are not known")
    if image.has_transparency_data:
        if image.mode == "La":  # converts to nothing but LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # Pillow takes 4 bytes a pixel, 240 MB for 60 megapixels: no copy where it is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey in [0, 65535] -> grey in [0, 255]; Pillow's own conversion would cut at 255."""
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"grey values from {low} to {high}, expected 16 bits: black and white are not known"
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # the nearest of v / 257
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def view_of(
    image: Image.Image, view: int, *, size: int, image_id: str, seed: int, flip: bool
) -> np.ndarray:
    """A square view of an image.

    View 0 is the whole image, resized to the view's size. Every other view is a random crop with
    sides of 0.5 to 1 of the image's, resized likewise and, where ``flip``, mirrored half of the
    time; it depends on ``seed``, ``image_id`` and ``view`` alone.

    Returns:
        (size, size, 3) uint8, RGB.
    """
    if view == 0:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    key = hashlib.sha256(f"{seed}/{view}/{image_id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
    width, height = rng.uniform(_SMALLEST_CROP, 1, size=2) * image.size
    left, top = rng.uniform(0, 1, size=2) * (image.width - width, image.height - height)
    crop = (left, top, left + width, top + height)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=crop)
    mirrored = flip and rng.random() < 0.5
    return np.asarray(ImageOps.mirror(resized) if mirrored else resized)


def to_tensor(view: np.ndarray) -> Tensor:
    """(S, S, 3) uint8 -> (3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(view.transpose(2, 0, 1).astype(np.float32)).div_(255)
