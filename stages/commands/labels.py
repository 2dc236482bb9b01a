"""Command `labels`: how the label vectors of a data set were found, and which labels are close."""

from __future__ import annotations

import numpy as np
from tabulate import tabulate

from pipeline.labels.vectors import LabelVectors, load_label_vectors
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request


def labels(request: Request) -> str:
    """Find the vector of every label in the manifest.

    Returns:
        a Markdown table, and a line with source, W and sha256.
    """
    vocabulary = dataset_manifest(request.dataset).vocabulary
    return describe(load_label_vectors(vocabulary, request.train.label_vectors))


def describe(vectors: LabelVectors) -> str:
    """A row a label: what its vector was taken from, and the nearest other label by cosine."""
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
    table = tabulate(
        rows,
        ["label", "vector of", "nearest label", "cosine"],
        tablefmt="github",
        disable_numparse=True,
    )
    return (
        f"{table}\n\n{len(vectors.names)} labels, vectors of size {vectors.vectors.shape[1]} from "
        f"{vectors.source}, sha256 {vectors.sha256}"
    )
