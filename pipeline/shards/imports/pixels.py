"""Boxes in pixels, as most files of regions have them, to shares of their image.

Letters: as in `pipeline.shards.imports.image_regions`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.shards.imports.image_regions import first_true, refuse


def boxes_of_pixels(
    where: str, pixels: npt.NDArray[Any], width: int, height: int
) -> npt.NDArray[np.float64]:
    """Convert boxes (n, 4), xyxy in pixels of an image, to xyxy in [0, 1] of it.

    Args:
        where: file and position, for messages.
        pixels: (n, 4), any type of number.
        width, height: of the image, in pixels.

    Raises:
        InputError: a box leaves the image by more than a pixel, or the boxes are of another form.
    """
    size = np.array([width, height, width, height])
    boxes = pixels.astype(np.float64)
    expected = f"xyxy in pixels of an image of {width} x {height}"
    _refuse_form(where, boxes, width, height, expected)
    # Rounding may leave the image by up to a pixel. A box further out is another image's.
    for (region,) in first_true(((boxes < -1) | (boxes > size + 1)).any(axis=1)):
        refuse(where, f"boxes[{region}]", boxes[region].tolist(), expected)
    shares: npt.NDArray[np.float64] = (boxes / size).clip(0, 1)
    return shares


def _refuse_form(
    where: str, boxes: npt.NDArray[np.float64], width: int, height: int, expected: str
) -> None:
    """Refuse boxes (n, 4) that are all in [0, 1], or some of which can only be x, y, w, h."""
    many = len(boxes) > 1 and width > 1 and height > 1
    if many and (boxes >= 0).all() and (boxes <= 1).all() and boxes.any():
        found = f"within one pixel, such as {boxes[0].tolist()}, so probably in [0, 1]"
        remedy = "Multiply them by [width, height, width, height], and import again."
        refuse(where, "each box", found, expected, remedy)
    corner, other = boxes[:, :2], boxes[:, 2:]
    for (region,) in first_true((other < corner).any(axis=1)):
        if (corner + other <= np.array([width, height]) + 1).all() and (boxes >= 0).all():
            found = f"{boxes[region].tolist()}, so probably x, y, width, height"
            remedy = "Convert them with `boxes[:, 2:] += boxes[:, :2]`, and import again."
            refuse(where, f"boxes[{region}]", found, expected, remedy)
