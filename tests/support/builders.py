"""Small inputs for tests, each made from a seed, and how to compare what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from pipeline.datasets.manifest import BoxTable, Manifest
from pipeline.datasets.scenes import KINDS, make_scenes
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
