"""The arrays that hold regions in an npz or in a folder, and the check that they fit together.

Letters: as in `pipeline.shards.imports.npz`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.shards.imports.image_regions import refuse
from pipeline.shards.schema import WHOLE

CODING = "1 (positive), -1 (negative) or 0 (neither)"

ARRAYS = {
    "image_id": ("N", "US", "text"),
    "features": ("NMd", "f", "floats"),
    "boxes": ("NM4", "f", "floats"),
    "scores": ("NM", "f", "floats"),
    "classes": ("NM", "iu", "integers"),
    "count": ("N", "iu", "integers"),
    "size_wh": ("N2", "iu", "integers"),
    "split": ("N", "US", "text"),
    "labels": ("NC", "iub", "integers"),
    "label_names": ("C", "US", "text"),
    WHOLE: ("Nd", "f", "floats"),
}
"""Axes and kinds of type of the arrays. A folder has no text and no labels."""


@dataclass
class Lengths:
    """The lengths of the axes, as the arrays that were checked have them.

    Attributes:
        known: axis -> its length, and the array that had it first.
    """

    known: dict[str, tuple[int, str]] = field(
        default_factory=lambda: {"4": (4, "xyxy"), "2": (2, "width and height")}
    )

    def check(self, where: str, name: str, shape: tuple[int, ...], remedy: str) -> None:
        """Raise an `InputError` unless the array ``name`` has its axes, as long as elsewhere."""
        axes = ARRAYS[name][0]
        if len(shape) != len(axes) or 0 in shape:
            expected = f"({', '.join(axes)}), none of them 0"
            if name == "labels":
                expected += f": a column for each of `label_names`, of {CODING}"
            refuse(where, "shape", shape, expected, remedy)
        for axis, length in zip(axes, shape, strict=True):
            known, elsewhere = self.known.setdefault(axis, (length, name))
            if length != known:
                expected = f"({', '.join(axes)}) with {axis} = {known}, as in {elsewhere}"
                refuse(where, "shape", shape, expected, remedy)
