"""Stage `prepare`: the files of the world -> data/<dataset>/prepared/."""

from __future__ import annotations

from pipeline.datasets.manifest import read_boxes, read_manifest, write_boxes, write_manifest
from pipeline.datasets.scenes import make_scenes, scenes_sources
from pipeline.errors import GmpipeError
from pipeline.files import folder_lock, replacing_folder
from pipeline.regions.extraction import check_images
from stages.layout import boxes_file, data_root, manifest_file, prepared_folder
from stages.params import DatasetSettings
from stages.progress import progress_bar


def prepare(settings: DatasetSettings) -> str:
    """Write the manifest anew unless it is of the same sources and its images and boxes are there.

    Returns:
        a line that says what was done.
    """
    dataset = settings.dataset
    folder = prepared_folder(dataset)
    with folder_lock(folder):
        if _is_current(settings):
            return f"{folder}: unchanged"
        with replacing_folder(folder) as temporary:
            manifest, boxes = make_scenes(
                temporary / "images",
                f"{folder.name}/images",
                dataset,
                settings.prepare,
                lambda numbers: progress_bar(numbers, desc="prepare", unit="scene"),
            )
            write_boxes(temporary / "boxes.parquet", boxes)
            write_manifest(temporary / "manifest.parquet", manifest)
    counts = ", ".join(f"{len(manifest.image_ids(s))} {s}" for s in ("train", "test"))
    return f"{folder}: {counts}, {len(manifest.vocabulary)} labels"


def _is_current(settings: DatasetSettings) -> bool:
    try:
        manifest = read_manifest(manifest_file(settings.dataset))
        check_images(manifest, data_root(settings.dataset))
        read_boxes(boxes_file(settings.dataset), ())
    except GmpipeError:
        return False
    return manifest.sources == scenes_sources(settings.prepare)
