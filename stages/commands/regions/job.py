"""What `import-regions` imports: the regions of a source, and the manifest's images they are of.

Letters: R images with regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.datasets.listing import check_lengths
from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts
from pipeline.errors import GmpipeError, InputError
from pipeline.files import sha256_json
from pipeline.settings import ExtractSettings, difficult_settings
from pipeline.shards.failures import Failure
from pipeline.shards.imports import KnownImage, NpzFile, match_lines, region_rows
from pipeline.shards.schema import Recipe, RegionRows, format_recipe
from stages.checkout.params import Request
from stages.commands.regions.forms import Form, ListedSource, Source


@dataclass(frozen=True, eq=False)
class RegionImport:
    """What is imported, and under which ids.

    Attributes:
        source: the file or files.
        names: of the files, for messages.
        manifest: of the data set.
        images: (R,) ascending numbers, in the source, of the images that the cache will hold.
        image_ids: R, as in the manifest.
        failures: the manifest's images that have no region.
        left_out: where the source has images that the manifest lacks.
        regions: m.
        settings: of the cache.
    """

    source: Source
    names: str
    manifest: Manifest
    images: npt.NDArray[np.int64]
    image_ids: list[str]
    failures: list[Failure]
    left_out: list[str]
    settings: ExtractSettings

    @property
    def regions(self) -> int:
        """m: no more than the image with the most regions has."""
        return int(min(self.settings.regions, self.source.counts.max()))

    @property
    def has_whole(self) -> bool:
        """Whether the cache will hold the vectors of whole views."""
        return self.source.whole_sha256 is not None

    def recipe(self, form: Form, *, whole: bool) -> Recipe:
        """What decides the rows, except the images: with vectors of ``whole`` views or without."""
        sha256 = self.source.sha256
        if whole:
            sha256 = sha256_json([sha256, self.source.whole_sha256])
        return {
            **format_recipe(whole=whole),
            "imported_from": form,
            "source_sha256": sha256,
            "regions": self.regions,
            "feature_dtype": self.settings.feature_dtype,
        }

    def shards(self, numbers: npt.NDArray[np.int64]) -> Iterator[RegionRows]:
        """The rows of some of the R images, one shard's at a time.

        Raises:
            InputError: a region is impossible.
        """
        read = self.source.read(self.images[numbers])
        for start in range(0, len(numbers), self.settings.rows_per_shard):
            some = numbers[start : start + self.settings.rows_per_shard].tolist()
            yield region_rows(
                read,
                [self.image_ids[number] for number in some],
                regions=self.regions,
                feature_size=self.source.feature_size,
                feature_dtype=self.settings.feature_dtype,
                whole=self.has_whole,
            )


def from_npz(source: NpzFile, request: Request, names: str) -> RegionImport:
    """The import of an npz, which makes the manifest."""
    images = np.flatnonzero(source.counts > 0)
    if not len(images):
        raise InputError(
            f"{source.path}: count is 0 for all {len(source.counts)} images; expected at least one "
            "region.",
            "Import another file.",
        )
    paths = [f"images/{image_id}.jpg" for image_id in source.image_ids]
    failures = [
        Failure(source.image_ids[row], paths[row], f"{names} has no region of this image")
        for row in np.flatnonzero(source.counts == 0).tolist()
    ]
    return RegionImport(
        source=source,
        names=names,
        manifest=_manifest_of(source, paths, request),
        images=images,
        image_ids=[source.image_ids[row] for row in images.tolist()],
        failures=failures,
        left_out=[],
        settings=request.extract,
    )


def _manifest_of(source: NpzFile, paths: Sequence[str], request: Request) -> Manifest:
    """The manifest that an npz makes.

    Raises:
        InputError: the arrays make no sound manifest.
    """
    columns = [
        source.image_ids,
        paths,
        source.splits,
        [np.flatnonzero(row == 1).tolist() for row in source.labels],
        [np.flatnonzero(row == 0).tolist() for row in source.labels],
        source.sizes[:, 0],
        source.sizes[:, 1],
    ]
    table = pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, COLUMNS, strict=True)],
        schema=COLUMNS,
    )
    try:
        check_lengths(table, source.label_names, str(source.path))
        return Manifest(
            dataset=request.dataset,
            split_name="imported",
            vocabulary=source.label_names,
            sources=source.manifest_sources,
            counts=full_counts(table),
            table=table,
            difficult=difficult_settings(request.prepare),
        )
    except GmpipeError as error:  # of whatever kind: the npz is the input
        raise InputError(
            f"{source.path} makes no sound manifest: {error.problem}", error.remedy
        ) from error


def from_lines(
    source: ListedSource, manifest: Manifest, request: Request, names: str
) -> RegionImport:
    """The import of a source without labels, whose images are matched to the manifest."""
    rows = manifest.table.select(["image_id", "path", "width", "height"]).to_pylist()
    matches = match_lines(source.lines, [KnownImage(**row) for row in rows])
    images = np.flatnonzero((matches >= 0) & (source.counts > 0))
    if not len(images):
        raise InputError(
            f"{source.lines[0].where}: neither this image nor one of the {len(matches) - 1} others "
            f"with regions is in the manifest of {manifest.dataset}, whose first image is "
            f"{rows[0]['image_id']!r} ({rows[0]['path']}); expected the same ids, file names with "
            "any suffix or none, or ids that end in the same number.",
            "Import regions of its images.",
        )
    matched = set(matches[images].tolist())
    failures = [
        Failure(row["image_id"], row["path"], f"{names} has no region of this image")
        for number, row in enumerate(rows)
        if number not in matched
    ]
    return RegionImport(
        source=source,
        names=names,
        manifest=manifest,
        images=images,
        image_ids=[rows[number]["image_id"] for number in matches[images].tolist()],
        failures=failures,
        left_out=[source.lines[number].where for number in np.flatnonzero(matches < 0).tolist()],
        settings=request.extract,
    )
