"""The manifest of a data set, for every stage that reads it."""

from __future__ import annotations

import logging

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.errors import DamagedError, MismatchError, MissingError, advising
from stages.checkout.layout import manifest_file

_log = logging.getLogger(__name__)


def dataset_manifest(dataset: str) -> Manifest:
    """Read the manifest that `prepare` wrote for a data set.

    Raises:
        MissingError, DamagedError: as `read_manifest`. The remedy names the command that writes it.
        MismatchError: it is the manifest of another data set.
    """
    path = manifest_file(dataset)
    prepare = f"Run `gmpipe prepare --dataset {dataset}`."
    with advising(prepare, MissingError, DamagedError):
        manifest = read_manifest(path)
    if manifest.dataset != dataset:
        raise MismatchError(
            f"{path} is the manifest of the data set {manifest.dataset!r}, expected {dataset!r}.",
            prepare,
        )
    _log.info("read %s: %d images, %d labels", path, len(manifest), len(manifest.vocabulary))
    return manifest
