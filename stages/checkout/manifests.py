"""The manifest of a data set, for every stage that reads it.

If the files that it was made from have changed since, a note says so. It is no error, because the
manifest is sound. To stay cheap, only files are compared, not folders such as VOC's 10,000
annotations, and no file above `_LARGEST`. `prepare` compares all.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.errors import DamagedError, GmpipeError, MismatchError, MissingError, advising
from pipeline.files import sha256_file
from stages.checkout.layout import data_root, manifest_file
from stages.console.messages import note

_log = logging.getLogger(__name__)

_LARGEST = 20_000_000  # bytes, which are hashed in some 20 ms


def dataset_manifest(dataset: str) -> Manifest:
    """Read the manifest that `prepare` wrote for a data set; note if its sources have changed.

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
    if changed := _changed_sources(manifest):
        note(
            f"{changed[0]} has changed since {path} was made from it"
            f"{f', and {len(changed) - 1} more files' if len(changed) > 1 else ''}. To use what it "
            f"holds now, run `gmpipe prepare --dataset {dataset}` first."
        )
    return manifest


def _changed_sources(manifest: Manifest) -> list[Path]:
    """The files that a manifest was made from and that have another content now.

    Files that are gone or can't be read are left out: nothing but `prepare` needs them.
    """
    changed = []
    for name, digest in manifest.sources.items():
        path = data_root(manifest.dataset) / name
        with suppress(GmpipeError, OSError):
            is_small = path.is_file() and path.stat().st_size <= _LARGEST
            if is_small and sha256_file(path) != digest:
                changed.append(path)
    return changed
