"""Runs that take a moment, on a data set of imported regions that is named as one of the paper's.

It has 48 images of 3 regions with 6 numbers each, and the 20 labels of VOC 2007. A region's feature
says a little about which label its image has. No test image has the label `tvmonitor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flows import Flow
from ruamel.yaml import YAML

from pipeline.datasets.readers.voc import VOCABULARY as VOC_LABELS

TRAIN, TEST, M, D = 30, 18, 3, 6
PARAMS: dict[str, Any] = {
    "datasets": ["voc2007"],
    "variants": ["full", "max-pool"],
    "seeds": [0],
    "prepare": {"voc2007": {"source": "imported"}},
    "detector": {"voc2007": {"source": "imported"}},
    "extract": {"voc2007": {"regions": M}},
    "train": {
        "voc2007": {
            "network": {"latent_size": 4, "neighbors": 1},
            "label_vectors": "vectors.npz",
            "epochs": 2,
            "batch_size": 16,
        }
    },
}


def write_params(folder: Path, train: dict[str, Any] | None = None, **lists: Any) -> None:
    """Write params.yaml with other train settings, and other lists at its top."""
    block = {**PARAMS["train"]["voc2007"], **(train or {})}
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump({**PARAMS, **lists, "train": {"voc2007": block}}, stream)


def make_small(folder: Path) -> Flow:
    """Make the data set, with its regions in the cache."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images, labels = TRAIN + TEST, len(VOC_LABELS)
    truth = np.where(rng.random((images, labels)) < 0.2, 1, -1).astype(np.int8)  # 0: ignored
    truth[np.arange(images), np.arange(images) % (labels - 1)] = 1
    truth[TRAIN:, -1] = -1
    truth[TRAIN + 1, 0] = 0
    corners = np.sort(rng.random((images, M, 2, 2)), axis=2).reshape(images, M, 4)
    hints = (truth == 1) @ rng.normal(size=(labels, D))
    np.savez(
        folder / "regions.npz",
        image_id=np.array([f"{image:06d}" for image in range(images)]),
        features=(hints[:, None] + rng.normal(size=(images, M, D))).astype(np.float16),
        boxes=corners.astype(np.float32),
        scores=rng.random((images, M)).astype(np.float32),
        classes=rng.integers(0, 20, (images, M)).astype(np.int16),
        count=np.full(images, M, dtype=np.int16),
        size_wh=np.full((images, 2), 100, dtype=np.int32),
        split=np.where(np.arange(images) < TRAIN, "train", "test"),
        labels=truth,
        label_names=np.array(VOC_LABELS),
    )
    vectors = rng.normal(size=(labels, 4)).astype(np.float32)
    np.savez(folder / "vectors.npz", labels=np.array(VOC_LABELS), vectors=vectors)
    write_params(folder)
    flow = Flow(folder)
    flow.ok("import-regions", "regions.npz")
    return flow


def run_names(flow: Flow) -> set[str]:
    """Names of the runs that are evaluated."""
    return {path.parent.name for path in (flow / "runs/voc2007").glob("*/metrics.json")}


@contextmanager
def no_run_is_made() -> Iterator[None]:
    """Fail if `compare` or `sweep` make a run."""
    with (
        mock.patch.dict("stages.commands.compare._STAGES", clear=True),
        mock.patch("stages.commands.compare.run_jobs", side_effect=AssertionError),
    ):
        yield
