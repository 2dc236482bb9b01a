"""A checkout of data sets that are brought along: `npz` with its labels, `listed`, and `yolo`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from flows import Flow
from ruamel.yaml import YAML

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts, write_manifest
from pipeline.shards.reader import RegionCache

LABELS = ("cat", "dog", "sun")


def make_brought(folder: Path, **extract: Any) -> Flow:
    """A checkout with the data sets and no regions; ``extract`` are the settings of all."""
    folder.mkdir(exist_ok=True)
    network = {"network": {"latent_size": 8, "neighbors": 2}, "epochs": 1, "batch_size": 4}
    names = ("npz", "listed", "yolo")
    params = {
        "datasets": ["npz"],
        "variants": ["full"],
        "seeds": [0],
        "prepare": {
            "npz": {"source": "imported"},
            "listed": {"source": "table"},
            "yolo": {"source": "yolo", "test": "val"},
        },
        "detector": {name: {"source": "imported"} for name in names},
        "extract": {name: {"regions": 50, **extract} for name in names},
        "train": dict.fromkeys(names, network),
    }
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump(params, stream)
    return Flow(folder)


def list_images(flow: Flow, images: Mapping[str, tuple[int, int] | None]) -> None:
    """Write the manifest of `listed`: each image with width and height, every third for testing."""
    rows = [
        {
            "image_id": image_id,
            "path": f"{image_id}.jpg",
            "split": "test" if number % 3 == 2 else "train",
            "labels": [number % 3],
            "ignored": [(number + 1) % 3] if number % 4 == 0 else [],
            "width": size[0] if size else None,
            "height": size[1] if size else None,
        }
        for number, (image_id, size) in enumerate(images.items())
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("listed", "own", LABELS, {}, full_counts(table), table)
    write_manifest(flow / "data/listed/prepared/manifest.parquet", manifest)


def stored(flow: Flow, dataset: str) -> dict[str, dict[str, bytes]]:
    """The bytes of each field of each image's whole view, by its id."""
    cache = RegionCache.open(flow / f"cache/{dataset}")
    rows = cache.gather(np.flatnonzero(cache.views == 0))
    return {
        rows.image_id[row].decode(): {
            name: getattr(rows, name)[row].tobytes() for name in rows.fields if name != "image_id"
        }
        for row in range(len(rows))
    }


def start_again(flow: Flow, folders: Iterable[str] = ("cache",)) -> None:
    """Remove what was made."""
    for name in folders:
        shutil.rmtree(flow / name, ignore_errors=True)
