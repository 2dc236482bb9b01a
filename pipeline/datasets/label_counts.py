"""How many images show each label, and how many are known not to.

Letters: N images, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pipeline.datasets.manifest import Manifest, Split
from pipeline.errors import InputError


@dataclass(frozen=True)
class LabelCounts:
    """How many images have each label, and how many are known not to have it.

    Attributes:
        positive, negative: (C,). An image for which a label is ignored counts in neither.
    """

    positive: npt.NDArray[np.int64]
    negative: npt.NDArray[np.int64]

    @property
    def without_negative(self) -> npt.NDArray[np.bool_]:
        """(C,) bool: the labels that some image has, and that no image is known to lack."""
        found: npt.NDArray[np.bool_] = (self.positive > 0) & (self.negative == 0)
        return found

    @property
    def tells_apart(self) -> bool:
        """Whether some label has both a positive and a negative image."""
        return bool(((self.positive > 0) & (self.negative > 0)).any())

    @classmethod
    def of_truth(cls, truth: np.ndarray) -> LabelCounts:
        """Count (N, C) integers: 1 positive, 0 negative, -1 ignored."""
        return cls((truth == 1).sum(axis=0), (truth == 0).sum(axis=0))


def label_counts(manifest: Manifest) -> dict[Split, LabelCounts]:
    """Count the images that have each label, and those that do not, in each split."""
    counts = {}
    for split in manifest.splits:
        rows = manifest.rows(split)
        positive, ignored = (
            np.bincount(
                np.asarray(pc.list_flatten(rows.column(name))), minlength=len(manifest.vocabulary)
            )
            for name in ("labels", "ignored")
        )
        counts[split] = LabelCounts(positive, rows.num_rows - positive - ignored)
    return counts


def check_learnable(counts: LabelCounts, vocabulary: Sequence[str], images: str) -> None:
    """Check that some label is shown by some image and known to be absent from another.

    Without one, a network learns to give every image the same scores, whatever the loss says.

    Args:
        counts: of the images to train on.
        vocabulary: the C labels.
        images: which images they are, for the message.

    Raises:
        InputError: no label has both a positive and a negative image.
    """
    if counts.tells_apart:
        return
    positive = counts.positive > 0
    if positive.any():
        labels = np.array(vocabulary, dtype=object)[positive]
        shown = ", ".join(map(repr, labels[:3])) + (" and others" if len(labels) > 3 else "")
        raise InputError(
            f"There is nothing to learn from the {images}: no image is known to lack a label that "
            f"another image has. Labels that are positive or ignored in every image: {len(labels)} "
            f"({shown}).",
            "Check how the labels are coded: in VOC's lists, and in an npz with regions, 1 is "
            "positive, -1 negative, and 0 neither, which is ignored. If every image does have "
            "these labels, add images without them.",
        )
    raise InputError(
        f"There is nothing to learn from the {images}: no image has a label.",
        "Check the files that the labels are read from.",
    )
