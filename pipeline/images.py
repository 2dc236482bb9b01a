"""Which files are taken for photographs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""What a photograph may be, by Pillow's names. Pillow knows more: PostScript, for one, which it
hands to an interpreter of programs."""

MOST_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded: where Pillow, too, starts to refuse."""
# Pillow also warns, from half of that on, of photographs that are fine, and filters of warnings
# can't be set for one thread. So its own limits are doubled, and `open_image` checks this one.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Read a photograph's header; its pixels are not decoded yet.

    Raises:
        ValueError: it has more pixels than are decoded.
        PIL.UnidentifiedImageError: it is of no known format.
        Exception: whatever Pillow runs into in a damaged header.
    """
    image = Image.open(source, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise ValueError(
            f"{image.width} x {image.height} pixels, more than the {MOST_PIXELS} that are decoded"
        )
    return image


def images_below(folder: Path) -> Iterator[Path]:
    """The photographs in a folder and its subfolders, by their suffixes, in the order of names.

    Hidden files and folders are passed over, and links to folders are not followed.
    """
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    for top, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(top) / name
