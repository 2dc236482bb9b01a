"""Print by how many bytes this process's anonymous memory (RssAnon) grew at its peak.

`memory_probe.py extract ROWS` extracts a data set of ROWS images with a detector that finds the
same regions everywhere, on a worker in this process. `memory_probe.py read ROWS` reads all of that
cache in shuffled batches. Run it in a folder with a params.yaml.
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from distributed import LocalCluster
from PIL import Image

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts, write_manifest
from pipeline.regions import extraction
from pipeline.regions.detection import BatchDetections
from pipeline.regions.detector import DetectorDescription
from pipeline.settings import ArchitectureSettings
from pipeline.shards.reader import RegionCache
from stages import extract as stage
from stages.checkout.params import read_request
from stages.workers import cluster, tasks


def found(model: torch.nn.Module, views: int, *, whole: bool) -> BatchDetections:
    """The same region in each of so many views."""
    ones = torch.ones(views, 1, dtype=torch.int64)
    boxes = torch.tensor([0.1, 0.1, 0.5, 0.5]).expand(views, 1, 4)
    features = torch.ones(views, 1, 8)
    return BatchDetections(boxes, ones.float(), ones, features, ones[:, 0], features[:, 0])


class Stub(torch.nn.Module):
    """A detector, as far as extraction looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.roi_heads = SimpleNamespace(
            box_head=SimpleNamespace(fc7=SimpleNamespace(out_features=8))
        )


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match
    return int(match[1]) * 1024


def make(rows: int) -> None:
    root = Path("data/tiny")
    (root / "detector").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / "one.png")
    table = pa.table(
        {
            "image_id": [f"{number:012d}" for number in range(rows)],
            "path": ["one.png"] * rows,
            "split": ["test" if number % 2 else "train" for number in range(rows)],
            "labels": [[0]] * rows,
            "ignored": [[]] * rows,
            "width": [8] * rows,
            "height": [8] * rows,
        },
        schema=COLUMNS,
    )
    manifest = Manifest("tiny", "own", ("red",), {}, full_counts(table), table)
    write_manifest(root / "prepared/manifest.parquet", manifest)


def extract() -> None:
    description = DetectorDescription("fit", ArchitectureSettings(), ("none", "one"), "0" * 64)
    settings = read_request(
        "tiny",
        ["extract.tiny.rows_per_shard=500", "extract.tiny.views=1", "extract.tiny.size=32",
         "extract.tiny.batch_size=50"],
    )  # fmt: skip
    stage.dataset_detector = lambda dataset: description
    tasks.read_description = lambda folder: description
    tasks.load_detector = lambda folder, description, settings: Stub()
    extraction.convolve = lambda model, views, rpn: len(views)
    extraction.find = found

    def local() -> Any:
        return LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        )

    cluster._local_cluster = local
    stage.extract(settings, replace=False)


def read() -> None:
    cache = RegionCache.open(Path("cache/tiny"))
    cache.lookup([f"{number:012d}" for number in range(len(cache))])
    for rows in np.array_split(np.random.default_rng(0).permutation(len(cache)), len(cache) // 32):
        cache.gather(rows)


def main(what: str, rows: int) -> None:
    if what == "extract":
        make(rows)
    begun, peak, ended = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        {"extract": extract, "read": read}[what]()
    finally:
        ended.set()
        watcher.join()
    print(peak - begun)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
