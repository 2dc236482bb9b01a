"""From a photograph on disk to the square views that the detector takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.errors import GmpipeError, InputError, MissingError
from pipeline.files import open_regular, raise_if_refused
from pipeline.images import decode, reason

_SMALLEST_CROP = 0.5  # side of a random crop, as a share of the image's

_REPLACE_OR_REMOVE = "Replace the file or remove it from the data set."


def load_image(path: Path, remedy: str = _REPLACE_OR_REMOVE) -> Image.Image:
    """Decode a photograph to RGB, upright according to its EXIF orientation.

    Its metadata decides nothing else: an orientation that can't be read is taken as "upright".
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
        with open_regular(path) as stream:
            return decode(stream)
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


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError) and path.stat().st_size == 0:
        return "it is empty"
    return reason(error)


@dataclass(frozen=True)
class Crop:
    """The part of a photograph that a view shows.

    Attributes:
        box: xyxy in pixels of the upright photograph.
        mirrored: whether the view exchanges left and right.
    """

    box: tuple[float, float, float, float]
    mirrored: bool


def crop_of(size: tuple[int, int], view: int, *, image_id: str, seed: int, flip: bool) -> Crop:
    """Return the part of a photograph that a view shows.

    View 0 is the whole photograph. Every other view is a random crop with sides of 0.5 to 1 of the
    photograph's; it depends only on ``size``, ``seed``, ``image_id`` and ``view``.

    Args:
        size: width and height of the upright photograph in pixels.
        view: number of the view.
        image_id: as in the manifest.
        seed: of the random crops.
        flip: whether a random crop is mirrored with probability 0.5.
    """
    if view == 0:
        return Crop((0.0, 0.0, *size), mirrored=False)
    key = hashlib.sha256(f"{seed}/{view}/{image_id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
    width, height = rng.uniform(_SMALLEST_CROP, 1, size=2) * size
    left, top = rng.uniform(0, 1, size=2) * (size[0] - width, size[1] - height)
    return Crop((left, top, left + width, top + height), mirrored=flip and rng.random() < 0.5)


def view_of(
    image: Image.Image, view: int, *, size: int, image_id: str, seed: int, flip: bool
) -> np.ndarray:
    """Return a square view of an image: its `crop_of`, resized to the view's size.

    Args:
        image: in RGB.
        view: number of the view.
        size: side of the view in pixels.
        image_id, seed, flip: as `crop_of` takes them.

    Returns:
        (size, size, 3) uint8, RGB.
    """
    crop = crop_of(image.size, view, image_id=image_id, seed=seed, flip=flip)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=crop.box)
    return np.asarray(ImageOps.mirror(resized) if crop.mirrored else resized)


def to_tensor(view: np.ndarray) -> Tensor:
    """Convert a view, (S, S, 3) uint8, to (3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(view.transpose(2, 0, 1).astype(np.float32)).div_(255)
