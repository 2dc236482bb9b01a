"""Command `import-regions`: regions that were made elsewhere -> cache/<dataset>/.

An npz carries split and labels, and so makes the manifest; a TSV of bottom-up-attention does not,
and is matched to the manifest that `prepare` wrote.

Letters: R images with regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.datasets.manifest import (
    COLUMNS,
    Manifest,
    full_counts,
    read_manifest,
    write_manifest,
)
from pipeline.errors import GmpipeError
from pipeline.files import begin_turn, folder_lock, replacing_folder, sha256_json
from pipeline.settings import ExtractSettings, ImportedSettings
from pipeline.shards.failures import FAILURES_NAME, Failure, write_failures
from pipeline.shards.imports import BottomUpFiles, NpzFile, region_rows
from pipeline.shards.reader import read_header, read_ids, whole_shards
from pipeline.shards.schema import (
    FORMAT_VERSION,
    IMAGES,
    INDEX_NAME,
    Recipe,
    RegionRows,
    check_same_recipe,
    without_images,
)
from pipeline.shards.writer import free_shard_names, update_index, write_shard
from stages.checkout.layout import cache_folder, manifest_file, prepared_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request, load_params
from stages.console.messages import say
from stages.console.progress import progress_bar

Form = Literal["npz", "bottom-up"]

_SUFFIXES: dict[str, Form] = {".npz": "npz", ".tsv": "bottom-up"}

_BLOCKS = """\
prepare:
  {dataset}:
    source: {source}
detector:
  {dataset}:
    source: imported
extract:
  {dataset}:
    regions: 10
train:
  {dataset}:
    label_vectors: wordllama
"""

_REPLACE_OR_RESTORE = (
    "Pass `--replace` to drop these shards and import again, or restore what they were made from."
)


@dataclass(frozen=True, eq=False)
class _Import:
    """What is to be imported, and under which ids.

    Attributes:
        source: the file, or files.
        images: (R,) places in the source, ascending, of the images that the cache will hold.
        image_ids: R, as in the manifest.
        failures: the manifest's images that have no region.
        left_out: images of the source that the manifest lacks.
    """

    source: NpzFile | BottomUpFiles
    manifest: Manifest
    images: npt.NDArray[np.int64]
    image_ids: list[str]
    failures: list[Failure]
    left_out: int


def check_described(
    dataset: str | None, overrides: Sequence[str], files: Sequence[Path], form: Form | None
) -> Form:
    """See that params.yaml has the data set, or say what to add to it.

    Returns:
        the form of the files: ``form``, or else the one of their suffix.

    Raises:
        GmpipeError: it lacks the data set, or a suffix is of no form.
    """
    forms = {form or _SUFFIXES.get(path.suffix.lower()) for path in files}
    if len(forms) != 1 or None in forms:
        names = ", ".join(str(path) for path in files)
        raise GmpipeError(
            f"{names}: expected files that end in .npz, or all in .tsv. Name one form of files, or "
            "say which it is with `--form npz` or `--form bottom-up`."
        )
    (chosen,) = forms
    assert chosen is not None
    params = load_params(overrides)
    if dataset is not None and dataset not in params.prepare:
        source = "imported" if chosen == "npz" else "coco  # or voc, nuswide, table"
        blocks = _BLOCKS.format(dataset=dataset, source=source)
        raise GmpipeError(
            f"--dataset: params.yaml describes {', '.join(params.prepare)}, but not {dataset!r}. "
            f"Add these blocks to its sections, and import again:\n\n{blocks}"
        )
    return chosen


def import_regions(request: Request, files: Sequence[Path], form: Form, *, replace: bool) -> str:
    """Write what the cache lacks of the files' regions; whole shards of the same import are kept.

    An image's regions beyond ``extract.<dataset>.regions`` are left out, the least scores first.
    Images without any region are listed in the cache's `failures.parquet`.

    Args:
        request: of the data set; ``detector.source`` and, for an npz, ``prepare.source`` must say
            that the regions are imported.
        files: one npz, or one or more TSVs.
        form: of the files.
        replace: drop shards that were made otherwise; without it they are an error.

    Returns:
        a line that says what was done.

    Raises:
        GmpipeError: the settings say otherwise, a file is damaged or breaks its form, its images
            are not those of the manifest, more images than ``max_failures`` have no regions, or
            the cache was made from something else. Files are read through before anything is
            written.
    """
    dataset, chosen = request.dataset, request.extract
    _check_settings(request, files, form)
    folder = cache_folder(dataset)
    with folder_lock(folder):
        folder.mkdir(parents=True, exist_ok=True)
        begin_turn(folder)
        for leftover in folder.glob("*.tmp"):  # of a killed run
            leftover.unlink()
        with progress_bar(desc="check", unit="B", unit_scale=True, delay=2) as bar:

            def on_bytes(read: int, total: int) -> None:
                bar.total = total
                bar.update(read)

            if form == "npz":
                job = _from_npz(NpzFile.open(files[0], on_bytes), dataset)
            else:
                manifest = dataset_manifest(dataset)
                job = _from_bottom_up(BottomUpFiles.open(files, on_bytes), manifest)
        if len(job.failures) > chosen.max_failures:
            raise GmpipeError(
                f"{_named(files)}: {len(job.failures)} of {len(job.manifest)} images of {dataset} "
                f"have no region there; the first is {job.failures[0].image_id!r}. Import a file "
                "that has them (several TSVs can be named at once), or go on without them: "
                f"`--set extract.{dataset}.max_failures={len(job.failures)}`."
            )
        regions = int(min(chosen.regions, job.source.counts.max()))
        recipe: Recipe = {
            "format_version": FORMAT_VERSION,
            "imported_from": form,
            "source_sha256": job.source.sha256,
            "regions": regions,
            "feature_dtype": chosen.feature_dtype,
        }
        if replace and not all(_is_of(path, recipe) for path in whole_shards(folder)):
            # Nothing is dropped for regions of which one is found to be wrong later.
            for _, rows in _shards(job, list(range(len(job.image_ids))), regions, chosen):
                rows.check()
        done = _survey(folder, recipe, set(job.image_ids), replace=replace)
        if form == "npz":
            _write_manifest(job.manifest)
        todo = [place for place, image_id in enumerate(job.image_ids) if image_id not in done]
        with progress_bar(
            total=len(job.images), initial=len(done), desc="import", unit="image"
        ) as bar:
            names = free_shard_names(folder)
            for image_ids, rows in _shards(job, todo, regions, chosen):
                write_shard(
                    folder / next(names),
                    rows,
                    dataset=dataset,
                    recipe={**recipe, IMAGES: _images_digest(image_ids)},
                )
                bar.update(len(image_ids))
        write_failures(folder, job.failures)
        update_index(
            folder,
            dataset,
            {**recipe, IMAGES: _images_digest(job.image_ids)},
            {path: read_header(path).fingerprint for path in whole_shards(folder)},
        )
    line = (
        f"{folder}: {len(job.images)} rows of {regions} x {job.source.feature_size} "
        f"{chosen.feature_dtype}, {len(todo)} of them imported now"
    )
    most = int(job.source.counts.max())
    if regions < most:
        line += (
            f"; the best {regions} of up to {most} regions of an image, "
            f"`extract.{dataset}.regions: {most}` keeps all"
        )
    if job.left_out:
        line += f"; {job.left_out} images of {_named(files)} are not in the manifest"
    if job.failures:
        line += f"; {len(job.failures)} images have no region, see {folder / FAILURES_NAME}"
    return line


def _check_settings(request: Request, files: Sequence[Path], form: Form) -> None:
    dataset = request.dataset
    if form == "npz" and len(files) != 1:
        raise GmpipeError(
            f"found {len(files)} files of npz; expected one, since it holds the whole data set. "
            "Name one file."
        )
    makes_manifest = isinstance(request.prepare, ImportedSettings)
    if (form == "npz") != makes_manifest:
        why, expected = (
            ("an npz brings the manifest", "imported")
            if form == "npz"
            else ("a TSV of bottom-up-attention has no labels", "that of its labels, e.g. coco")
        )
        raise GmpipeError(
            f"params.yaml: prepare.{dataset}.source is {request.prepare.source}, but {why}; "
            f"expected {expected}. Change it, or choose another data set with `--dataset`."
        )
    if request.detector.source != "imported":
        raise GmpipeError(
            f"params.yaml: detector.{dataset}.source is {request.detector.source}; expected "
            "imported, or the next `gmpipe extract` would replace the imported regions. Change it."
        )
    if request.extract.views != 1:
        raise GmpipeError(
            f"params.yaml: extract.{dataset}.views is {request.extract.views}; expected 1, since "
            "imported regions are of the whole image. Change it."
        )


def _from_npz(source: NpzFile, dataset: str) -> _Import:
    images = np.flatnonzero(source.counts > 0)
    if not len(images):
        raise GmpipeError(
            f"{source.path}: count is 0 for all {len(source.counts)} images; expected a region of "
            "at least one. Import another file."
        )
    paths = [f"images/{image_id}.jpg" for image_id in source.image_ids]
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
        manifest = Manifest(
            dataset=dataset,
            split_name="imported",
            vocabulary=source.label_names,
            sources=source.manifest_sources,
            counts=full_counts(table),
            table=table,
        )
    except GmpipeError as error:
        raise GmpipeError(f"{source.path} makes no manifest: {error}") from error
    failures = [
        Failure(source.image_ids[place], paths[place], f"{source.path.name} has no region of it")
        for place in np.flatnonzero(source.counts == 0).tolist()
    ]
    image_ids = [source.image_ids[place] for place in images.tolist()]
    return _Import(source, manifest, images, image_ids, failures, left_out=0)


def _from_bottom_up(source: BottomUpFiles, manifest: Manifest) -> _Import:
    rows = manifest.table.select(["image_id", "path", "width", "height"]).to_pylist()
    sizes = [(row["width"], row["height"]) for row in rows]
    places = source.match([row["image_id"] for row in rows], sizes)
    images = np.flatnonzero((places >= 0) & (source.counts > 0))
    if not len(images):
        raise GmpipeError(
            f"{source.lines[0].where}: neither this image nor one of the {len(places) - 1} others "
            f"with regions is in the manifest of {manifest.dataset}, whose first image is "
            f"{rows[0]['image_id']!r}; expected the same ids, or ids that end in the same number. "
            "Import regions of its images."
        )
    there = set(places[images].tolist())
    names = ", ".join(sorted({line.path.name for line in source.lines}))
    failures = [
        Failure(row["image_id"], row["path"], f"{names} has no region of it")
        for place, row in enumerate(rows)
        if place not in there
    ]
    image_ids = [rows[place]["image_id"] for place in places[images].tolist()]
    return _Import(source, manifest, images, image_ids, failures, int((places < 0).sum()))


def _shards(
    job: _Import, places: list[int], regions: int, settings: ExtractSettings
) -> Iterator[tuple[list[str], RegionRows]]:
    """The images at these places, a shard's at a time: their ids and rows."""
    found = job.source.read(job.images[places])
    for start in range(0, len(places), settings.rows_per_shard):
        image_ids = [job.image_ids[p] for p in places[start : start + settings.rows_per_shard]]
        yield (
            image_ids,
            region_rows(
                found,
                image_ids,
                regions=regions,
                feature_size=job.source.feature_size,
                feature_dtype=settings.feature_dtype,
            ),
        )


def _is_of(path: Path, recipe: Recipe) -> bool:
    """Whether a shard is sound and of this import."""
    try:
        return without_images(read_header(path).recipe) == recipe
    except GmpipeError:
        return False


def _survey(folder: Path, recipe: Recipe, wanted: set[str], *, replace: bool) -> set[str]:
    """The images in shards of this import; other shards are an error or, with ``replace``, go.

    A shard of this import that holds images which are wanted no longer (the manifest has changed)
    goes in any case.
    """
    next_step = "It was dropped." if replace else _REPLACE_OR_RESTORE
    done: set[str] = set()
    for path in whole_shards(folder):
        try:
            check_same_recipe(
                without_images(read_header(path).recipe), recipe, str(path), next_step
            )
            image_ids = set(read_ids(path)[0])
        except GmpipeError as error:
            if not replace:
                # The reader speaks of `gmpipe extract`, which makes no imported shard.
                raise GmpipeError(f"{error} Import again after that.") from error
            say(str(error))
            image_ids = set()
        if image_ids and image_ids <= wanted and image_ids.isdisjoint(done):
            done |= image_ids
        else:
            (folder / INDEX_NAME).unlink(missing_ok=True)
            path.unlink()
    return done


def _write_manifest(manifest: Manifest) -> None:
    """Write the manifest, unless it is there already: DVC runs again what depends on it."""
    folder = prepared_folder(manifest.dataset)
    with folder_lock(folder):
        try:
            if read_manifest(manifest_file(manifest.dataset)) == manifest:
                return
        except GmpipeError:
            pass  # none, or a damaged one
        with replacing_folder(folder) as temporary:
            write_manifest(temporary / manifest_file(manifest.dataset).name, manifest)


def _images_digest(image_ids: Sequence[str]) -> str:
    """Hex sha256 over a set of image ids: the recipe's field ``images``."""
    return sha256_json(sorted(image_ids))


def _named(files: Sequence[Path]) -> str:
    return ", ".join(path.name for path in files)
