"""Stage `extract`: images -> cache/<dataset>/, shard by shard."""

from __future__ import annotations

from pathlib import Path

from pipeline.datasets.manifest import read_manifest
from pipeline.errors import GmpipeError
from pipeline.files import folder_lock
from pipeline.regions.detector import read_description
from pipeline.regions.extraction import (
    extract_shard,
    extraction_recipe,
    load_detector,
    plan_views,
)
from pipeline.shards.reader import RegionCache, read_header, read_ids, whole_shards
from pipeline.shards.schema import DROP_OR_RESTORE, INDEX_NAME, Recipe, check_same_recipe
from pipeline.shards.writer import shard_name, write_index
from stages.layout import cache_folder, data_root, detector_folder, manifest_file
from stages.params import DatasetSettings
from stages.progress import progress_bar


def extract(settings: DatasetSettings, *, replace: bool) -> str:
    """Extract what the cache lacks; whole shards of the same recipe are kept.

    Args:
        settings: of the data set.
        replace: drop shards of another recipe; without it they are an error.

    Returns:
        a line that says what was done.

    Raises:
        GmpipeError: the cache is of another recipe, an image is missing or broken, the detector is
            missing or damaged.
    """
    dataset = settings.dataset
    folder, root = cache_folder(dataset), data_root(dataset)
    manifest = read_manifest(manifest_file(dataset))
    description = read_description(detector_folder(dataset), dataset)
    recipe = extraction_recipe(manifest, root, description, settings.extract)
    jobs = plan_views(manifest, settings.extract.views)
    with folder_lock(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder, recipe, replace=replace)
        done: set[tuple[str, int]] = set()
        number = -1
        for path in whole_shards(folder):
            ids, views = read_ids(path)
            done.update(zip(ids, views.tolist(), strict=True))
            number = int(path.stem.rsplit("-", 1)[1])
        todo = [job for job in jobs if (job.image_id, job.view) not in done]
        if todo:
            model = load_detector(detector_folder(dataset), description, settings.extract)
            with progress_bar(
                total=len(jobs), initial=len(done), desc="extract", unit="image"
            ) as bar:
                size = settings.extract.rows_per_shard
                for start in range(0, len(todo), size):
                    number += 1
                    extract_shard(
                        model,
                        todo[start : start + size],
                        root,
                        settings.extract,
                        path=folder / shard_name(number),
                        dataset=dataset,
                        recipe=recipe,
                        on_images=bar.update,
                    )
        if not _index_is_current(folder, recipe):
            write_index(folder, dataset, recipe)
    return f"{folder}: {len(jobs)} rows, {len(todo)} of them extracted now"


def _index_is_current(folder: Path, recipe: Recipe) -> bool:
    """Whether the index lists the shards there are: a killed run may have left an older one."""
    try:
        listed = {entry.name for entry in RegionCache.open(folder, recipe).shards}
    except GmpipeError:
        return False
    return listed == {path.name for path in whole_shards(folder)}


def _sweep(folder: Path, recipe: Recipe, *, replace: bool) -> None:
    """Clear away what a killed run left, and shards that are damaged or of another recipe."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    next_step = "It was dropped." if replace else DROP_OR_RESTORE
    for path in whole_shards(folder):
        try:
            check_same_recipe(read_header(path).recipe, recipe, str(path), next_step)
        except GmpipeError as error:
            if not replace:
                raise
            print(error, flush=True)
            path.unlink()
            (folder / INDEX_NAME).unlink(missing_ok=True)
