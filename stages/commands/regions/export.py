"""Command `cache export`: the regions of a cache as a file for other programs.

Letters: N images of the manifest, C labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.frames import read_headers
from pipeline.datasets.manifest import Manifest
from pipeline.errors import InputError, MissingError
from pipeline.formats.text import counted
from pipeline.shards.export import WRITERS, ExportedImages
from pipeline.shards.reader import RegionCache
from stages.checkout.caches import advising_on_cache, open_cache
from stages.checkout.disk import shown_bytes
from stages.checkout.layout import data_root
from stages.checkout.manifests import dataset_manifest
from stages.console.progress import progress_bar


def export_regions(dataset: str, path: Path) -> str:
    """Write the regions of a data set's images to a file, which is complete or absent.

    Args:
        dataset: its name.
        path: of the file, whose suffix says in which form it is written.

    Returns:
        a line that says what was written; one for each kind of thing that the file lacks.

    Raises:
        InputError: the suffix is none of those that can be written, or the manifest has no image
            of the cache.
        MissingError: cache or manifest is missing, or the size of an image is not known.
        DamagedError, MismatchError: the cache is.
    """
    if path.suffix not in WRITERS:
        *others, last = WRITERS
        raise InputError(
            f"--to: {path} ends in {path.suffix or 'no suffix'!r}; expected {', '.join(others)} or "
            f"{last}, which say how it is written.",
            "Name another file.",
        )
    cache, manifest = open_cache(dataset), dataset_manifest(dataset)
    images = _images(cache, manifest, data_root(dataset))
    with (
        advising_on_cache(dataset),
        progress_bar(total=len(manifest), desc="export", unit="image") as bar,
    ):
        WRITERS[path.suffix](path, cache, images, bar.update)
    found = int((images.rows >= 0).sum())
    shape = f"{cache.regions} x {cache.feature_size} {cache.feature_dtype}"
    size = shown_bytes(path.stat().st_size)
    line = f"{path}: {size}, {counted(found, 'image')} with regions of up to {shape}"
    return "\n".join([line, *_losses(cache, images, path.suffix)])


def _losses(cache: RegionCache, images: ExportedImages, suffix: str) -> list[str]:
    """What the file lacks, or has in another precision."""
    lines = []
    if crops := int((cache.views > 0).sum()):
        lines.append(f"Left out: {counted(crops, 'row')} of random crops; view 0 is exported.")
    without = int((images.rows < 0).sum())
    if without and suffix == ".npz":
        lines.append(
            f"{counted(without, 'image')} without regions: an import needs "
            f"`extract.NAME.max_failures: {without}`."
        )
    elif without:
        lines.append(f"Left out: {counted(without, 'image')} without regions.")
    if suffix == ".tsv":
        kept = "Boxes are rounded to float32 pixels"
        lines.append(
            f"{kept}; the vectors of whole views are left out." if cache.has_whole else kept + "."
        )
    return lines


def _images(cache: RegionCache, manifest: Manifest, root: Path) -> ExportedImages:
    """The manifest's N images with their rows, sizes and labels; raises as `export_regions`."""
    ids = manifest.table.column("image_id")
    whole_views = np.flatnonzero(cache.views == 0)
    every = cache.ids
    known = pa.array([every[row] for row in whole_views.tolist()], pa.string())
    found = np.asarray(pc.fill_null(pc.index_in(ids, value_set=known), -1), dtype=np.int64)
    rows = np.append(whole_views, -1)[found]
    if not (rows >= 0).any():
        raise InputError(
            f"{cache.folder}: none of its images is in the manifest of {manifest.dataset}, whose "
            f"first image is {ids[0].as_py()!r}; expected images of both.",
            f"Run `gmpipe prepare --dataset {manifest.dataset}`, or make the regions again.",
        )
    labels = np.full((len(manifest), len(manifest.vocabulary)), -1, dtype=np.int8)
    for name, value in (("labels", 1), ("ignored", 0)):
        lists = manifest.table.column(name).combine_chunks()
        labels[pc.list_parent_indices(lists), pc.list_flatten(lists)] = value
    return ExportedImages(
        image_ids=ids.to_pylist(),
        rows=rows,
        sizes=_sizes(manifest, root),
        splits=manifest.table.column("split").to_pylist(),
        labels=labels,
        label_names=manifest.vocabulary,
    )


def _sizes(manifest: Manifest, root: Path) -> npt.NDArray[np.int32]:
    """(N, 2) int32: width and height in pixels. Photographs say them where the manifest does not.

    Raises:
        MissingError: neither does.
    """
    columns = [manifest.table.column(side) for side in ("width", "height")]
    sizes = np.stack([np.asarray(pc.fill_null(column, 0)) for column in columns], axis=1)
    unknown = np.flatnonzero((sizes == 0).any(axis=1))
    paths = manifest.table.column("path").take(pa.array(unknown)).to_pylist()
    with progress_bar(total=len(paths), desc="sizes", unit="image", delay=2) as bar:
        headers = read_headers([root / path for path in paths], bar.update)
    for row, path, header in zip(unknown.tolist(), paths, headers, strict=True):
        if header is None:
            image_id = manifest.table.column("image_id")[row].as_py()
            raise MissingError(
                f"{root / path}: the size of image {image_id!r} is neither in the manifest nor can "
                "it be read from this photograph; expected its width and height.",
                f"Put the photographs below {root}, and run the same command again.",
            )
        sizes[row] = header.size("upright")
    return sizes.astype(np.int32)
