"""Which files are read as photographs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""The formats of photographs, by Pillow's names. Pillow reads more, among them PostScript, which it
passes to an interpreter that runs programs."""

MOST_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded. Pillow, too, refuses larger images by default."""
# Pillow also warns about images of more than half its limit, which are fine here, and warning
# filters can't be set for a single thread. So Pillow's limits are doubled, and `open_image` checks
# this one.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS


def open_image(source: BinaryIO) -> Image.Image:
    """Read the header of a photograph, without decoding its pixels.

    Args:
        source: the opened file. (Pillow leaves a file open that it opened and can't read.)

    Raises:
        ValueError: it has more than `MOST_PIXELS` pixels.
        PIL.UnidentifiedImageError: it has none of the `FORMATS`.
        Exception: whatever Pillow raises for a damaged header.
    """
    image = Image.open(source, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise ValueError(
            f"{image.width} x {image.height} pixels, more than the {MOST_PIXELS} that are decoded"
        )
    return image


def _refuse(error: OSError) -> None:
    raise error


def image_suffixes() -> set[str]:
    """The suffixes of photographs, such as `.jpg`, in lower case."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the photographs in a folder and its subfolders, by suffix, sorted by name.

    Hidden files and folders are skipped, and links to folders are not followed.

    Raises:
        OSError: a folder can't be listed.
    """
    suffixes = image_suffixes()
    for top, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(top) / name
