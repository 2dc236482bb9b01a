"""Command `labels`: what the vector of each label was made from."""

from __future__ import annotations

from pipeline.labels.description import describe_vectors
from pipeline.labels.vectors import load_label_vectors
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.console.progress import progress_phase


def labels(request: Request) -> str:
    """Look up the vector of every label in the manifest, and describe the vectors.

    Returns:
        a Markdown table, and a line with source, size of the vectors and sha256.
    """
    vocabulary = dataset_manifest(request.dataset).vocabulary
    with progress_phase("read label vectors"):
        vectors = load_label_vectors(vocabulary, request.train.label_vectors)
    return describe_vectors(vectors)
