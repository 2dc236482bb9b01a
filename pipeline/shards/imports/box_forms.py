"""Which form boxes have that should be corners, and the line of NumPy that makes them corners.

Letters: B boxes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MOST = 0.95  # share of the boxes that must fit a form
_COMMON = 0.05  # share of boxes with x1 < x0 above which they are not taken for single mistakes

_CORNERS = "numpy.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)"
_CENTRES = (
    "numpy.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], "
    "axis=-1)"
)


def are_odd(boxes: npt.NDArray[np.float64]) -> bool:
    """Whether one of the boxes (B, 4) is not xyxy in [0, 1]."""
    outside = (boxes < 0) | (boxes > 1)
    return bool(outside.any() or (boxes[:, 2:] < boxes[:, :2]).any())


def form_of(
    boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]
) -> tuple[str, list[str]] | None:
    """Tell what form most boxes have, if it is not xyxy in [0, 1].

    Args:
        boxes: (B, 4), finite.
        sizes: (B, 2), width and height in pixels of each one's image.

    Returns:
        the form, e.g. `x, y, width, height in pixels`, and the statements of NumPy that convert
        `boxes` (N, M, 4) and use `size_wh` (N, 2); None if no form fits, or if it is the right one.
    """
    inside = (boxes >= -1) & (boxes <= np.tile(sizes, 2) + 1)
    in_pixels = _most((boxes > 1).any(axis=1), 0.5) and _most(inside.all(axis=1))
    limits, rounding = (sizes, 1.0) if in_pixels else (np.ones_like(sizes), 0.01)
    first, second = boxes[:, :2], boxes[:, 2:]
    steps = []
    form = "corners"
    if (second < first).any(axis=1).mean() > _COMMON:
        if _most((first + second <= limits + rounding).all(axis=1)):
            form, line = "x, y, width, height", _CORNERS
        elif _most(
            ((first - second / 2 >= -rounding) & (first + second / 2 <= limits + rounding)).all(
                axis=1
            )
        ):
            form, line = "x and y of the centre, width, height", _CENTRES
        else:
            return None
        steps.append(f"boxes = {line}")
    if in_pixels:
        form += " in pixels"
        steps.append("boxes = boxes / numpy.tile(size_wh, 2)[:, None]")
    return (form, steps) if steps else None


def _most(fits: npt.NDArray[np.bool_] | np.bool_, share: float = _MOST) -> bool:
    return bool(fits.mean() >= share)
