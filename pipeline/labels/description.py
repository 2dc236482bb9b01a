"""Label vectors as a table for the user; training does not use it.

Letters: C labels, W size of a vector.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.text import counted, markdown_table
from pipeline.labels.vectors import LabelVectors

_NEAREST = 3  # labels that are named for each label


def describe_vectors(vectors: LabelVectors) -> str:
    """Describe what each label's vector was made from, and the nearest other labels by cosine.

    Returns:
        a Markdown table with one row per label; with three labels or more, a line with the cosines
        of all pairs, to compare with; and a line with the number of labels, W, source and sha256.
    """
    directions = vectors.vectors.astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ directions.T  # (C, C)
    rows = [
        [name, words, _nearest(vectors.names, cosines[row], row) or "-"]
        for row, (name, words) in enumerate(zip(vectors.names, vectors.resolution, strict=True))
    ]
    count = len(rows)
    parts = [markdown_table(["label", "vector of", "nearest labels, with cosine"], rows)]
    if count > 2:
        pairs = cosines[np.triu_indices(count, 1)]
        usual, high = np.quantile(pairs, [0.5, 0.95])
        parts.append(
            f"Of the {len(pairs)} pairs of labels, half have a cosine above {usual:.2f}, and one "
            f"in twenty above {high:.2f}, which is near for these labels."
        )
    parts.append(
        f"{counted(count, 'label')}, vectors of size "
        f"{vectors.vectors.shape[1]} from {vectors.source}, sha256 {vectors.sha256}"
    )
    return "\n\n".join(parts)


def _nearest(names: tuple[str, ...], cosines: NDArray[np.float64], label: int) -> str:
    """Name the labels that are nearest to a label, the nearest first.

    Args:
        names: C names.
        cosines: (C,), of the label's vector with each vector.
        label: index of the label.
    """
    ranked = [other for other in np.argsort(-cosines, kind="stable") if other != label]
    return ", ".join(f"{names[other]} {cosines[other]:.2f}" for other in ranked[:_NEAREST])
