"""Images -> one shard of regions; and the recipe that says what decided them.

Letters: R rows (a row is one view of one image), m regions, d feature size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import FasterRCNN

from pipeline.datasets.manifest import SPLITS, Manifest
from pipeline.errors import GmpipeError
from pipeline.files import canonical_json, sha256_file
from pipeline.regions.detector import (
    WEIGHTS_FILE,
    DetectorDescription,
    best_device,
    build_model,
    detect,
    fit_state,
    load_state,
)
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ExtractSettings
from pipeline.shards.schema import FORMAT_VERSION, Recipe, RegionRows
from pipeline.shards.writer import write_shard


@dataclass(frozen=True)
class ViewJob:
    """A row to extract: one view of one image.

    Attributes:
        image_id: as in the manifest.
        path: relative to the data set's root.
        view: 0 for the whole image, else the number of a random crop.
    """

    image_id: str
    path: str
    view: int


def plan_views(manifest: Manifest, views: int) -> list[ViewJob]:
    """All rows of a cache: ``views`` of each training image, view 0 of each test image."""
    jobs = []
    for split in SPLITS:
        for row in manifest.rows(split).to_pylist():
            for view in range(views if split == "train" else 1):
                jobs.append(ViewJob(row["image_id"], row["path"], view))
    return jobs


def check_images(manifest: Manifest, root: Path) -> None:
    """See that every image is there before hours are spent on the others.

    Raises:
        GmpipeError: images are missing; says how many and names the first.
    """
    rows = manifest.table.select(["image_id", "path"]).to_pylist()
    missing = [row for row in rows if not (root / row["path"]).is_file()]
    if missing:
        first = missing[0]
        raise GmpipeError(
            f"{len(missing)} of {len(rows)} images of {manifest.dataset} are missing; the first is "
            f"{first['image_id']!r} at {root / first['path']}. Put them there, or run "
            f"`gmpipe prepare --dataset {manifest.dataset}` if they should be made anew."
        )


def extraction_recipe(
    manifest: Manifest, root: Path, detector: DetectorDescription, settings: ExtractSettings
) -> Recipe:
    """All that decides the regions, and nothing else: what the cache's fingerprint is taken of.

    Labels, batch size and shard size are left out on purpose: they may change without a new
    extraction. How random crops are drawn counts only where there are any.

    Raises:
        GmpipeError: an image is missing.
    """
    check_images(manifest, root)
    digest = hashlib.sha256()
    for row in manifest.table.select(["image_id", "path", "split"]).to_pylist():
        path = root / row["path"]
        content = sha256_file(path) if settings.hash_images else path.stat().st_size
        views = settings.views if row["split"] == "train" else 1
        digest.update(canonical_json([row["image_id"], row["path"], content, views]).encode())
    crops = {"views.flip": settings.flip, "views.seed": settings.seed}
    architecture = {
        f"architecture.{name}": value if isinstance(value, int | str) else canonical_json(value)
        for name, value in detector.architecture.model_dump(mode="json").items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "images": digest.hexdigest(),
        "images.hashed_by": "content" if settings.hash_images else "size",
        "views": settings.views,
        **(crops if settings.views > 1 else {}),
        "size": settings.size,
        "regions": settings.regions,
        "score_threshold": settings.score_threshold,
        "nms_threshold": settings.nms_threshold,
        "feature_dtype": settings.feature_dtype,
        "compute_dtype": "float32",
        "weights_sha256": detector.weights_sha256,
        **architecture,
    }


def load_detector(
    folder: Path, description: DetectorDescription, settings: ExtractSettings
) -> FasterRCNN:
    """The detector of a folder, in eval mode on the best device, set up for extraction.

    Raises:
        GmpipeError: the weights can't be read or don't fit their description.
    """
    model = build_model(
        description.architecture,
        len(description.classes),
        size=settings.size,
        regions=settings.regions,
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
    )
    weights = folder / WEIGHTS_FILE
    fit_state(model, load_state(weights), weights)
    return model.to(best_device()).eval()


def extract_rows(
    model: FasterRCNN,
    jobs: Sequence[ViewJob],
    root: Path,
    settings: ExtractSettings,
    on_images: Callable[[int], None] = lambda images: None,
) -> RegionRows:
    """Decode, view, detect.

    Args:
        model: of `load_detector`.
        jobs: the R rows, in this order.
        root: the data set's root.
        settings: sizes, as the model was set up with.
        on_images: called after each batch with its number of images.

    Raises:
        GmpipeError: an image is missing or can't be decoded.
    """
    device = next(model.parameters()).device
    rows, m, d = len(jobs), settings.regions, model.roi_heads.box_head.fc7.out_features
    features = np.zeros((rows, m, d), dtype=settings.feature_dtype)
    boxes = np.zeros((rows, m, 4), dtype=np.float32)
    scores = np.zeros((rows, m), dtype=np.float32)
    classes = np.zeros((rows, m), dtype=np.int16)
    count = np.zeros(rows, dtype=np.int16)
    for start in range(0, rows, settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        views = [
            to_tensor(
                view_of(
                    load_image(root / job.path),
                    job.view,
                    size=settings.size,
                    image_id=job.image_id,
                    seed=settings.seed,
                    flip=settings.flip,
                )
            )
            for job in batch
        ]
        for row, found in enumerate(detect(model, torch.stack(views).to(device)), start):
            n = len(found.scores)
            count[row] = n
            features[row, :n] = found.features.cpu().numpy()
            boxes[row, :n] = found.boxes.cpu().numpy()
            scores[row, :n] = found.scores.cpu().numpy()
            classes[row, :n] = found.classes.cpu().numpy()
        on_images(len(batch))
    return RegionRows(
        features=features,
        boxes=boxes,
        scores=scores,
        classes=classes,
        count=count,
        image_id=np.array([job.image_id.encode() for job in jobs]),
        view=np.array([job.view for job in jobs], dtype=np.int16),
    )


def extract_shard(
    model: FasterRCNN,
    jobs: Sequence[ViewJob],
    root: Path,
    settings: ExtractSettings,
    *,
    path: Path,
    dataset: str,
    recipe: Recipe,
    on_images: Callable[[int], None] = lambda images: None,
) -> None:
    """Extract ``jobs`` and write them as the shard ``path``; arguments as `extract_rows`."""
    rows = extract_rows(model, jobs, root, settings, on_images)
    write_shard(path, rows, dataset=dataset, recipe=recipe)
