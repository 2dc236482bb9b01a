"""The manifest of a data set, for every stage that reads it."""

from __future__ import annotations

import logging

from pipeline.datasets.manifest import Manifest, read_manifest
from stages.checkout.layout import manifest_file

_log = logging.getLogger(__name__)


def dataset_manifest(dataset: str) -> Manifest:
    """What `prepare` wrote of a data set.

    Raises:
        GmpipeError: it is not there, or damaged; says which command writes it.
    """
    remedy = f"Run `gmpipe prepare --dataset {dataset}` to write it anew."
    path = manifest_file(dataset)
    manifest = read_manifest(path, remedy)
    _log.info("read %s: %d images, %d labels", path, len(manifest), len(manifest.vocabulary))
    return manifest
