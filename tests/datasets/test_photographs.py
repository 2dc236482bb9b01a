"""Real photographs through every stage: the samples of VOC 2007 and COCO, with a narrow detector
whose weights are random. It finds something everywhere, which is all that is asked of it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import CLASSES, TINY
from flows import PARAMS, Flow
from ruamel.yaml import YAML

from pipeline.regions.detector import build_model
from pipeline.shards.reader import RegionCache


def own_params(folder: Path, prepare: dict[str, Any]) -> None:
    """params.yaml of one data set, `photos`."""
    torch.manual_seed(0)
    model = build_model(TINY, CLASSES, size=64, regions=1, score_threshold=0, nms_threshold=0.5)
    torch.save(model.state_dict(), folder / "weights.pt")
    raw = json.loads(json.dumps(PARAMS))
    blocks = {
        "prepare": prepare,
        "detector": {
            "source": "file",
            "weights": "weights.pt",
            "architecture": TINY.model_dump(mode="json"),
        },
        "extract": {"size": 64, "regions": 5, "views": 2, "rows_per_shard": 100, "batch_size": 16},
        "train": {**raw["train"]["tiny"], "epochs": 1, "batch_size": 64},
    }
    raw["datasets"] = ["photos"]
    for section, block in blocks.items():
        raw[section] = {"photos": block}
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump(raw, stream)


@pytest.mark.parametrize(
    ("sample", "prepare", "counts", "labels"),
    [
        (
            "voc2007-sample",
            {"source": "voc", "folder": "VOCdevkit/VOC2007"},
            {"train": 240, "test": 160},
            20,
        ),
        ("coco-sample", {"source": "coco"}, {"train": 16, "test": 16}, 80),
    ],
)
def test_real_photographs_go_all_the_way(
    shared: Path,
    tmp_path: Path,
    sample: str,
    prepare: dict[str, Any],
    counts: dict[str, int],
    labels: int,
) -> None:
    flow = Flow(tmp_path)
    own_params(tmp_path, prepare)
    (tmp_path / "data").mkdir()
    root = tmp_path / "data/photos"
    root.mkdir()
    for part in (shared / "data" / sample).iterdir():
        (root / part.name).symlink_to(part)
    assert f"{counts['train']} train" in flow.ok("prepare")
    said = flow.ok("prepare", "--check")
    assert "Every image is there and can be read." in said
    flow.ok("detector")
    rows = 2 * counts["train"] + counts["test"]
    assert f"{rows} rows, {rows} of them extracted now" in flow.ok("extract")
    cache = RegionCache.open(tmp_path / "cache/photos")
    found = cache.gather(range(len(cache)))
    found.check()
    assert found.count.min() >= 1
    assert (found.count == 5).mean() > 0.9
    flow.ok("train")
    flow.ok("evaluate")
    metrics = json.loads((tmp_path / "runs/photos/full-s0/metrics.json").read_text())
    assert (metrics["images"], metrics["left_out"]) == (counts["test"], 0)
    assert metrics["counts"]["test"]["listed"] == counts["test"]
    assert len(metrics["AP"]) == labels
    scores = pq.read_table(tmp_path / "runs/photos/full-s0/predictions.parquet")["scores"]
    assert len(scores) == counts["test"]
