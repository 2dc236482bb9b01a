"""Small inputs for tests, each made from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from pipeline.datasets.manifest import BoxTable, Manifest
from pipeline.datasets.scenes import KINDS, make_scenes
from pipeline.heads.contract import RegionBatch
from pipeline.regions.detector import (
    WEIGHTS_FILE,
    build_model,
    load_state,
    read_description,
    write_detector,
)
from pipeline.regions.fitting import FitImage
from pipeline.regions.transforms import load_image, to_tensor
from pipeline.settings import ArchitectureSettings, ScenesSettings
from pipeline.shards.schema import RegionRows


def make_rows(
    rows: int = 4,
    *,
    regions: int = 3,
    feature_size: int = 5,
    feature_dtype: str = "float16",
    first: int = 0,
    view: int = 0,
    seed: int = 0,
    whole: bool = False,
) -> RegionRows:
    """Valid region rows of the images `image-<first>`, `image-<first + 1>`, ...

    Row 0 has one real region, row 1 has two, and so on up to ``regions``, then from one again.
    """
    rng = np.random.default_rng([seed, first, view])
    count = (np.arange(rows) % regions + 1).astype(np.int16)
    real = np.arange(regions) < count[:, None]  # (R, m)
    corners = np.sort(rng.random((rows, regions, 2, 2), dtype=np.float32), axis=2)
    return RegionRows(
        features=(rng.normal(size=(rows, regions, feature_size)) * real[..., None]).astype(
            feature_dtype
        ),
        boxes=corners.reshape(rows, regions, 4) * real[..., None],
        scores=-np.sort(-rng.random((rows, regions), dtype=np.float32), axis=1) * real,
        classes=(rng.integers(1, 9, (rows, regions)) * real).astype(np.int16),
        count=count,
        image_id=np.array([f"image-{first + row}" for row in range(rows)], dtype=np.bytes_),
        view=np.full(rows, view, dtype=np.int16),
        whole=rng.normal(size=(rows, feature_size)).astype(feature_dtype) if whole else None,
    )


def make_instances(
    images: int = 3,
    *,
    instances: int = 4,
    feature_size: int = 6,
    counts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RegionBatch:
    """A batch of B = ``images`` images with M = ``instances`` instances; padding is zero and last.

    Without ``counts`` the images have M, 1, M - 1, then M, 1, M - 1, ... real instances.

    Centres and scores come from a few values, so that there are ties. Boxes and scores are small
    multiples of powers of two, so that ties are exact in any precision. In an image of two or more
    instances, the last real one has the centre and the score of the first, in another box.
    Instances that agree in box, score and class are the same region, and have the same feature.
    """
    rng = np.random.default_rng([seed, images, instances])
    if counts is None:
        counts = [max(1, (instances, 1, instances - 1)[image % 3]) for image in range(images)]
    centers = rng.integers(3, 6, (images, instances, 2)) / 8
    halves = rng.integers(1, 4, (images, instances, 2)) / 16
    scores = rng.integers(1, 4, (images, instances)) / 4
    classes = rng.integers(1, 3, (images, instances))
    features = rng.normal(size=(images, instances, feature_size))
    for image, count in enumerate(counts):
        last = count - 1
        if last > 0:
            centers[image, last], scores[image, last] = centers[image, 0], scores[image, 0]
            halves[image, last] = halves[image, 0] + 1 / 32
        known: dict[tuple[float, ...], int] = {}
        for index in range(count):
            key = (*centers[image, index], *halves[image, index], scores[image, index])
            first = known.setdefault((*key, classes[image, index]), index)
            features[image, index] = features[image, first]
    real = np.arange(instances) < np.array(counts)[:, None]  # (B, M)
    boxes = np.concatenate([centers - halves, centers + halves], axis=-1)
    return RegionBatch(
        features=torch.tensor(features * real[..., None], dtype=dtype),
        boxes=torch.tensor(boxes * real[..., None], dtype=dtype),
        scores=torch.tensor(scores * real, dtype=dtype),
        classes=torch.tensor(classes * real),
        mask=torch.tensor(real),
    )


S = 64
CLASSES = len(KINDS) + 1
TINY = ArchitectureSettings(
    width_per_group=1,
    fpn_channels=4,
    feature_size=8,
    anchor_sizes=(8, 16, 32, 64, 128),
    proposals=20,
    norm="batch",
)


def tiny_model(score_threshold: float = 0.0, regions: int = 40, norm: str = "batch") -> FasterRCNN:
    """A detector with random weights, the same in every call."""
    torch.manual_seed(0)
    return build_model(
        TINY.model_copy(update={"norm": norm}),
        CLASSES,
        size=S,
        regions=regions,
        score_threshold=score_threshold,
        nms_threshold=0.5,
    ).eval()


@dataclass(frozen=True)
class Scenes:
    """Twelve training and two test scenes of 64 pixels. Paths are relative to ``root``."""

    root: Path
    manifest: Manifest
    boxes: BoxTable

    @property
    def views(self) -> Tensor:
        """(14, 3, S, S): the images as tensors."""
        paths = self.manifest.table.column("path").to_pylist()
        return torch.stack([to_tensor(np.asarray(load_image(self.root / p))) for p in paths])

    @property
    def annotated(self) -> list[FitImage]:
        """The training scenes."""
        return [
            FitImage(row["image_id"], self.root / row["path"], self.boxes.images[row["image_id"]])
            for row in self.manifest.rows("train").to_pylist()
        ]


def draw_scenes(root: Path) -> Scenes:
    """Draw the scenes below ``root``."""
    settings = ScenesSettings(source="scenes", train=12, test=2, size=S, seed=0)
    return Scenes(root, *make_scenes(root / "images", "images", "tiny", settings))


class Stopped(Exception):
    """Raised to end a block early."""


def tree(folder: Path) -> dict[str, str | None]:
    """The text of every file below a folder, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


def write_other_weights(
    source: Path, folder: Path, name: str, change: Callable[[Tensor], object]
) -> None:
    """Write a detector like that in ``source``, with one tensor changed in place."""
    description, state = read_description(source), load_state(source / WEIGHTS_FILE)
    change(state[name])
    write_detector(
        folder,
        state,
        source=description.source,
        architecture=description.architecture,
        classes=description.classes,
    )
