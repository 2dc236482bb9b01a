"""A photograph on disk -> square views of it, as the detector takes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.errors import GmpipeError

_SMALLEST_CROP = 0.5  # side of a random crop, as a share of the image's


def load_image(path: Path) -> Image.Image:
    """Decode a photograph to RGB, turned as its EXIF orientation says.

    Raises:
        GmpipeError: the file is missing or can't be decoded.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise GmpipeError(f"there is no image at {path}. Put it there, or prepare anew.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GmpipeError(
            f"{path} can't be decoded ({error}). Replace the file, or take it out of the data set."
        ) from error


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
