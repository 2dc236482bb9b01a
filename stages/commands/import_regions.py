"""Command `import-regions`: regions that were made elsewhere -> cache/<dataset>/.

An npz holds split and labels as well, and so makes the manifest. The other forms don't; their
images are matched to the manifest that `prepare` wrote.

Letters: R images with regions.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.datasets.manifest import (
    Manifest,
    read_manifest,
    write_manifest,
)
from pipeline.errors import GmpipeError, InputError, MismatchError
from pipeline.files import folder_lock, replacing_folder, tidy
from pipeline.formats.text import counted
from pipeline.settings import ImportedSettings
from pipeline.shards.failures import FAILURES_NAME
from pipeline.shards.imports import (
    NpzFile,
)
from pipeline.shards.schema import IMAGES, Recipe
from pipeline.shards.store import ImagesById, ShardStore, StaleShard, Survey, open_store
from stages.checkout.caches import (
    amount_of,
    drop_message,
    how_to_keep,
    reasons_of,
    recipes_of,
    shown_failures,
)
from stages.checkout.layout import cache_folder, manifest_file, prepared_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request, check_dataset_name, load_params
from stages.commands.regions.forms import Form, form_of, open_source
from stages.commands.regions.job import RegionImport, from_lines, from_npz
from stages.console.labels import shown_counts
from stages.console.messages import say
from stages.console.progress import progress_bar

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


def check_described(
    dataset: str | None, overrides: Sequence[str], files: Sequence[Path], form: Form | None
) -> Form:
    """Check that params.yaml describes the data set, or say what to add to it.

    Args:
        dataset: name of the data set; None for the first one of params.yaml.
        overrides: the `--set` options.
        files: to import.
        form: of the files, if it was given.

    Returns:
        the form of the files, as `form_of`.

    Raises:
        InputError: params.yaml lacks the data set, or as `form_of`.
    """
    chosen = form_of(files, form)
    params = load_params(overrides)
    if dataset is not None and dataset not in params.prepare:
        check_dataset_name(dataset, "--dataset")
        source = "imported" if chosen == "npz" else "coco  # or voc, yolo, nuswide, table"
        blocks = _BLOCKS.format(dataset=dataset, source=source)
        raise InputError(
            f"--dataset: params.yaml describes {', '.join(params.prepare)}, but not {dataset!r}.",
            f"Add these blocks to its sections, and import again:\n\n{blocks}",
        )
    return chosen


def import_regions(request: Request, files: Sequence[Path], form: Form, *, replace: bool) -> str:
    """Write the regions of files that the cache lacks. Whole shards of the same import are kept.

    An image's regions beyond ``extract.<dataset>.regions`` are left out, lowest scores first.
    Images without any region are listed in the cache's `failures.parquet`. Files are read through
    before anything is written.

    Args:
        request: of the data set; ``detector.source`` and, for an npz, ``prepare.source`` must say
            that the regions are imported.
        files: as `form_of` accepts them.
        form: of the files.
        replace: drop shards that were made from something else; without it they are an error.

    Returns:
        a line that says what was done, and one on the manifest that an npz makes.

    Raises:
        InputError: the settings contradict the import, a file is damaged or breaks its form, its
            images are not those of the manifest, or more images than ``max_failures`` have no
            regions.
        MismatchError: the cache was made from something else.
    """
    _check_settings(request, files, form)
    folder = cache_folder(request.dataset)
    with open_store(folder, request.dataset) as store:
        job = _read_through(request, files, form)
        recipe = job.recipe(form, whole=job.has_whole)
        images = ImagesById(job.image_ids)
        survey = store.survey(recipe, images)
        if not replace:
            _refuse_to_drop(request, files, survey, job.recipe(form, whole=False))
        _agree_to_drop(request, job, survey)
        store.drop(survey.stale)
        if form == "npz":
            _write_manifest(job.manifest)
        written = _write_missing(store, job, recipe, images, survey)
        store.finish(recipe, store.survey(recipe, images), job.failures)
    return _summary(folder, job, written)


def _read_through(request: Request, files: Sequence[Path], form: Form) -> RegionImport:
    """Read the files through, and match them to the manifest.

    Raises:
        InputError: as `import_regions`.
    """
    names = ", ".join(path.name for path in files)
    with progress_bar(desc="check", unit="B", unit_scale=True, delay=2) as bar:

        def on_bytes(read: int, total: int) -> None:
            bar.total = total
            bar.update(read)

        source = open_source(files, form, on_bytes, whole=request.extract.whole)
    if isinstance(source, NpzFile):
        job = from_npz(source, request, names)
    else:
        job = from_lines(source, dataset_manifest(request.dataset), request, names)
    if len(job.failures) > request.extract.max_failures:
        others = (
            f" Not in the manifest: {counted(len(job.left_out), 'image')} there; the first is "
            f"{job.left_out[0]}."
            if job.left_out
            else ""
        )
        raise InputError(
            f"{names}: no region of {len(job.failures)} of {len(job.manifest)} images of "
            f"{request.dataset} is there; the first is {job.failures[0].image_id!r}.{others}",
            "Import what has them (several files or folders can be named at once), or tolerate "
            f"that: `--set extract.{request.dataset}.max_failures={len(job.failures)}`.",
        )
    return job


def _made_otherwise(survey: Survey) -> list[StaleShard]:
    """The stale shards that were made from something else.

    Those whose images are no longer wanted may be dropped in any case: the manifest has changed.
    """
    return [shard for shard in survey.stale if shard.kind not in ("images", "removed")]


def _refuse_to_drop(
    request: Request, files: Sequence[Path], survey: Survey, without_whole: Recipe
) -> None:
    """Refuse an import that would have to drop shards.

    Args:
        request, files: as `import_regions`.
        survey: of the cache.
        without_whole: the recipe of the import without the vectors of whole views.

    Raises:
        MismatchError: shards were made from something else.
    """
    stale = _made_otherwise(survey)
    if not stale:
        return
    arguments = [*map(str, files), "--dataset", request.dataset, *request.set_options]
    restore = "To keep them, restore the former settings, or import the former files."
    keep = how_to_keep(request.dataset, recipes_of(stale), without_whole, restore)
    folder = cache_folder(request.dataset)
    raise MismatchError(
        f"{folder}: the import would have to drop {amount_of(stale)}:\n{reasons_of(stale)}",
        f"To drop them and import again, run `gmpipe import-regions {shlex.join(arguments)} "
        f"--replace`. {keep}",
    )


def _agree_to_drop(request: Request, job: RegionImport, survey: Survey) -> None:
    """Say once what is dropped and why, after a check that it can be imported again.

    Raises:
        InputError: one of the rows that would replace shards made from something else is
            impossible.
    """
    if not survey.stale:
        return
    if _made_otherwise(survey):
        for rows in job.shards(np.arange(len(job.images))):
            rows.check()
    say(drop_message(cache_folder(request.dataset), survey.stale))


def _write_missing(
    store: ShardStore, job: RegionImport, recipe: Recipe, images: ImagesById, survey: Survey
) -> int:
    """Write the images that the current shards lack; return how many these are."""
    done = np.zeros(len(images), dtype=np.bool_)
    done[survey.numbers] = True
    missing = np.flatnonzero(~done)
    if not len(missing):
        return 0
    names = store.free_names()
    with progress_bar(total=len(images), desc="import", unit="image") as bar:
        bar.resume(len(images) - len(missing))
        for rows in job.shards(missing):
            numbers = images.numbers([stored.decode() for stored in rows.image_id.tolist()])
            digest = images.digest(numbers, rows.view)
            store.write(next(names), rows, {**recipe, IMAGES: digest})
            bar.update(len(rows))
    return len(missing)


def _summary(folder: Path, job: RegionImport, written: int) -> str:
    """A line that says what was done; one more on the manifest that an npz makes."""
    line = (
        f"{folder}: {counted(len(job.images), 'row')} of {job.regions} x {job.source.feature_size} "
        f"{job.settings.feature_dtype}{', with those of whole views' if job.has_whole else ''}, "
        f"{written} of them imported now"
        f"{'' if written else '; nothing to import'}"
    )
    most = int(job.source.counts.max())
    if job.regions < most:
        line += (
            f"; the best {job.regions} of up to {most} regions of each image, "
            f"`extract.{job.manifest.dataset}.regions: {most}` keeps all"
        )
    if job.left_out:
        line += f"; {counted(len(job.left_out), 'image')} of {job.names} not in the manifest"
    if job.failures:
        without = counted(len(job.failures), "image")
        line += f"; {without} without a region, see {folder / FAILURES_NAME}:\n"
        line += shown_failures(job.failures)
    if isinstance(job.source, NpzFile):
        dataset = job.manifest.dataset
        line += (
            f"\n{prepared_folder(dataset)}: {shown_counts(job.manifest)}; `gmpipe prepare "
            f"--dataset {dataset}` lists them, with what is odd about them"
        )
    return line


def _check_settings(request: Request, files: Sequence[Path], form: Form) -> None:
    """Refuse settings that contradict the import."""
    dataset = request.dataset
    makes_manifest = isinstance(request.prepare, ImportedSettings)
    if (form == "npz") != makes_manifest:
        why, expected = (
            ("an npz brings the manifest", "imported")
            if form == "npz"
            else ("regions of this form have no labels", "that of their labels, e.g. coco")
        )
        raise InputError(
            f"params.yaml: prepare.{dataset}.source is {request.prepare.source}, but {why}; "
            f"expected {expected}.",
            "Change it, or choose another data set with `--dataset`.",
        )
    if request.detector.source != "imported":
        raise InputError(
            f"params.yaml: detector.{dataset}.source is {request.detector.source}; expected "
            "imported, or the next `gmpipe extract` would replace the imported regions.",
            "Change it.",
        )
    if request.extract.views != 1:
        raise InputError(
            f"params.yaml: extract.{dataset}.views is {request.extract.views}; expected 1, since "
            "imported regions are of the whole image.",
            "Change it.",
        )


def _write_manifest(manifest: Manifest) -> None:
    """Write the manifest unless it is there already, since DVC runs again what depends on it."""
    folder = prepared_folder(manifest.dataset)
    with folder_lock(folder):
        tidy(folder)
        try:
            if read_manifest(manifest_file(manifest.dataset)) == manifest:
                return
        except GmpipeError:  # missing or damaged, so it is written again
            pass
        with replacing_folder(folder) as temporary:
            write_manifest(temporary / manifest_file(manifest.dataset).name, manifest)
