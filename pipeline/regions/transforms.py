"""From a photograph on disk to the square views that the detector takes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.errors import GmpipeError, InputError, MissingError
from pipeline.files import open_regular, raise_if_refused
from pipeline.images import FORMATS, open_image

_SMALLEST_CROP = 0.5  # side of a random crop, as a share of the image's

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


_REPLACE_OR_REMOVE = "Replace the file or remove it from the data set."


def load_image(path: Path, remedy: str = _REPLACE_OR_REMOVE) -> Image.Image:
    """Decode a photograph to RGB, upright according to its EXIF orientation.

    16-bit grey is scaled to 8 bits. Transparent pixels become white. Of an animation, the first
    frame is decoded. CMYK is read as Adobe's programs write it (inverted in a JPEG).

    Args:
        path: of the photograph.
        remedy: of the error if the file can't be decoded.

    Raises:
        MissingError: there is no such file.
        AccessError: the system can't read it.
        InputError: it is no regular file, or can't be decoded; says why. A file whose
            damage does not break the rules of its format (a changed bit in a JPEG's pixels, say)
            is decoded.
    """
    try:
        with open_regular(path) as stream, open_image(stream) as image:
            return upright(image)
    except MemoryError:  # not the file's fault
        raise
    except GmpipeError as error:
        raise InputError(error.problem, remedy) from None
    except FileNotFoundError:
        raise MissingError(
            f"There is no image at {path}.", "Put the file there, or prepare the data set again."
        ) from None
    # Pillow's plugins raise whatever their parsing of a damaged file runs into: struct.error,
    # IndexError, KeyError, EOFError, zlib.error, SyntaxError, AttributeError and more.
    except Exception as error:
        raise_if_refused(error, path)
        raise InputError(f"{path} can't be decoded ({_reason(path, error)}).", remedy) from error


def upright(image: Image.Image) -> Image.Image:
    """Convert an opened photograph to RGB and turn it upright, as `load_image` does.

    Raises:
        ValueError: the range of the pixel values is unknown.
        Exception: any error that Pillow runs into in damaged pixels.
    """
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    picture = _to_rgb(image)
    return picture if turn is None else picture.transpose(turn)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "it is empty"
        return f"it is none of {', '.join(FORMATS)}, or too damaged to be recognized"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


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


def view_of(
    image: Image.Image, view: int, *, size: int, image_id: str, seed: int, flip: bool
) -> np.ndarray:
    """Return a square view of an image.

    View 0 is the whole image, resized to the view's size. Every other view is a random crop, with
    sides of 0.5 to 1 of the image's, resized in the same way; it depends only on ``seed``,
    ``image_id`` and ``view``.

    Args:
        image: in RGB.
        view: number of the view.
        size: side of the view in pixels.
        image_id: as in the manifest.
        seed: of the random crops.
        flip: whether a random crop is mirrored with probability 0.5.

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
    """Convert a view, (S, S, 3) uint8, to (3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(view.transpose(2, 0, 1).astype(np.float32)).div_(255)
