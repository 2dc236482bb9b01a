"""Real photographs through every stage: parts of the samples of VOC 2007 and COCO.

The detector is narrow and has random weights. It finds regions everywhere, which is all that these
tests need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import CLASSES, TINY
from clusters import worker_in_this_process
from flows import PARAMS, Flow
from ruamel.yaml import YAML

from pipeline.regions.detector import build_model
from pipeline.shards.reader import RegionCache

VOC = "VOCdevkit/VOC2007"


@pytest.fixture(scope="module", autouse=True)
def _worker_in_this_process() -> Iterator[None]:
    """Extract in a thread: here the photographs matter, not the worker's process."""
    with worker_in_this_process():
        yield


def own_params(folder: Path, prepare: dict[str, Any]) -> None:
    """Write params.yaml with one data set, `photos`, and the weights of its detector."""
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
        "extract": {"size": 64, "regions": 5, "views": 2, "rows_per_shard": 40, "batch_size": 16},
        "train": {**raw["train"]["tiny"], "epochs": 1, "batch_size": 64},
    }
    raw["datasets"] = ["photos"]
    for section, block in blocks.items():
        raw[section] = {"photos": block}
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump(raw, stream)


def link_voc(sample: Path, root: Path, counts: dict[str, int]) -> None:
    """A devkit with the first images of each split."""
    lists = root / VOC / "ImageSets/Main"
    lists.mkdir(parents=True)
    for folder in ("Annotations", "JPEGImages"):
        (root / VOC / folder).symlink_to(sample / VOC / folder)
    for name, split in (("trainval", "train"), ("test", "test")):
        lines = (sample / VOC / f"ImageSets/Main/{name}.txt").read_text().splitlines()
        (lists / f"{name}.txt").write_text("\n".join(lines[: counts[split]]))


def link_all(sample: Path, root: Path, counts: dict[str, int]) -> None:
    """The whole sample."""
    for part in sample.iterdir():
        (root / part.name).symlink_to(part)


@pytest.mark.parametrize(
    ("sample", "link", "prepare", "counts", "labels"),
    [
        ("voc2007-sample", link_voc, {"source": "voc"}, {"train": 40, "test": 24}, 20),
        ("coco-sample", link_all, {"source": "coco"}, {"train": 16, "test": 16}, 80),
        pytest.param(
            *("voc2007-sample", link_all, {"source": "voc"}, {"train": 240, "test": 160}, 20),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_real_photographs_pass_every_stage(
    shared: Path,
    tmp_path: Path,
    sample: str,
    link: Any,
    prepare: dict[str, Any],
    counts: dict[str, int],
    labels: int,
) -> None:
    flow = Flow(tmp_path)
    own_params(tmp_path, prepare)
    root = tmp_path / "data/photos"
    root.mkdir(parents=True)
    link(shared / "data" / sample, root, counts)
    assert f"{counts['train']} train" in flow.ok("prepare")
    flow.ok("prepare", "--check")
    flow.ok("detector")
    flow.ok("extract")
    cache = RegionCache.open(tmp_path / "cache/photos")
    assert len(cache) == 2 * counts["train"] + counts["test"]
    rows = cache.gather(range(len(cache)))
    rows.check()
    assert rows.count.min() >= 1
    assert (rows.count == 5).mean() > 0.9
    flow.ok("train")
    flow.ok("evaluate")
    metrics = json.loads((tmp_path / "runs/photos/full-s0/metrics.json").read_text())
    assert (metrics["images"], metrics["left_out"]) == (counts["test"], 0)
    assert metrics["counts"]["test"]["listed"] == counts["test"]
    assert len(metrics["AP"]) == labels
    logits = pq.read_table(tmp_path / "runs/photos/full-s0/predictions.parquet")["logits"]
    assert len(logits) == counts["test"]
    assert len(logits[0]) == labels
