"""Label vectors as a table for the user; training does not use it."""

from __future__ import annotations

import numpy as np

from pipeline.formats.text import markdown_table
from pipeline.labels.vectors import LabelVectors


def describe_vectors(vectors: LabelVectors) -> str:
    """Describe what each label's vector was made from, and the nearest other label by cosine.

    Returns:
        a Markdown table with one row per label, and a line with their number, W, source and sha256.
    """
    directions = vectors.vectors.astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ directions.T  # (C, C)
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.argmax(axis=1)
    rows = [
        [name, words, vectors.names[other], f"{cosines[row, other]:.2f}"]
        if len(nearest) > 1
        else [name, words, "-", "-"]
        for row, (name, words, other) in enumerate(
            zip(vectors.names, vectors.resolution, nearest, strict=True)
        )
    ]
    table = markdown_table(["label", "vector of", "nearest label", "cosine"], rows)
    return (
        f"{table}\n\n{len(vectors.names)} labels, vectors of size {vectors.vectors.shape[1]} from "
        f"{vectors.source}, sha256 {vectors.sha256}"
    )
