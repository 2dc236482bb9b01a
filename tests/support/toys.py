"""The toy problem that training is tested on, and a checkout to train it in.

A region belongs to one of three kinds, or to none, and its feature shows which. An image has the
labels of the kinds of its regions, and two views with the same kinds and different noise.

Letters: N images, M instances, C labels, D feature size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from builders import make_rows
from flows import Flow
from ruamel.yaml import YAML

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts, write_manifest
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.losses import compute_loss
from pipeline.learning.splits import SplitData, open_split
from pipeline.shards.index import write_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import Recipe, RegionRows
from pipeline.shards.shard import shard_name, whole_shards, write_shard

N_TRAIN, N_TEST, M, C, D, VIEWS = 42, 9, 3, 3, 6, 2
RECIPE: Recipe = {"regions": M, "views": VIEWS}
LABELS = ("cat", "dog", "owl")
VECTORS = LabelVectors(
    LABELS, np.random.default_rng(5).normal(size=(C, 4)).astype(np.float32), "somewhere", LABELS
)


def toy_rows(kinds: np.ndarray, view: int, *, whole: bool = False) -> RegionRows:
    """Make rows whose real regions belong to ``kinds`` (N, M), with C for none.

    The vector of the whole view is the sum of the regions'.
    """
    rows = make_rows(len(kinds), regions=M, feature_size=D, view=view, whole=whole)
    noise = np.random.default_rng([11, view]).normal(scale=0.3, size=rows.features.shape)
    features = noise + 2.0 * (kinds[..., None] == np.arange(D)) * (kinds < C)[..., None]
    real = np.arange(M) < rows.count[:, None]
    features = (features * real[..., None]).astype(np.float16)
    return replace(rows, features=features, whole=features.sum(axis=1) if whole else None)


@dataclass(frozen=True)
class Toy:
    """A region cache, and the manifest of its images."""

    cache: RegionCache
    manifest: Manifest

    @property
    def train(self) -> SplitData:
        return open_split(self.cache, self.manifest, "train", VIEWS)


def make_toy(folder: Path, recipe: Recipe = RECIPE, *, whole: bool = False) -> Toy:
    """Write the cache to ``folder``, and make the manifest.

    Args:
        whole: whether the cache holds the vectors of whole views.
    """
    images = N_TRAIN + N_TEST
    kinds = np.random.default_rng(3).integers(0, C + 1, size=(images, M))
    for view in range(VIEWS):
        rows_of_view = toy_rows(kinds, view, whole=whole)
        write_shard(folder / shard_name(view), rows_of_view, dataset="toy", recipe=recipe)
    write_index(folder, "toy", recipe, whole_shards(folder))
    counts = np.arange(images) % M + 1
    rows = []
    for image in range(images):
        present = set(kinds[image, : counts[image]].tolist()) - {C}
        rows.append(
            {
                "image_id": f"image-{image}",
                "path": f"{image}.png",
                "split": "train" if image < N_TRAIN else "test",
                "labels": sorted(present),
                "ignored": [],
                "width": None,
                "height": None,
            }
        )
    # Image 4 has only an ignored label, whatever its regions are.
    rows[4]["labels"], rows[4]["ignored"] = [], [1]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("toy", "made", LABELS, {}, full_counts(table), table)
    return Toy(RegionCache.open(folder), manifest)


TRAIN: dict[str, Any] = {
    "network": {"latent_size": 8, "neighbors": 2},
    "label_vectors": "vectors.npz",
    "epochs": 4,
    "batch_size": 16,
    "learning_rate": 0.02,
    "step_epochs": 2,
}


def make_checkout(folder: Path, **changes: Any) -> Flow:
    """Make a folder where `gmpipe train` and `evaluate` find the toy problem.

    Args:
        changes: of `TRAIN`, the train settings.
    """
    toy = make_toy(folder / "cache/toy")
    write_manifest(folder / "data/toy/prepared/manifest.parquet", toy.manifest)
    np.savez(folder / "vectors.npz", labels=np.array(LABELS), vectors=VECTORS.vectors)
    params = {
        "datasets": ["toy"],
        "variants": ["full"],
        "seeds": [0],
        "prepare": {"toy": {"source": "imported"}},
        "detector": {"toy": {"source": "imported"}},
        "extract": {"toy": {"regions": M, "views": VIEWS}},
        "train": {"toy": {**TRAIN, **changes}},
    }
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump(params, stream)
    return Flow(folder)


def copied(checkout: Flow, folder: Path) -> Flow:
    """Copy a checkout without what was trained in it."""
    ignored = shutil.ignore_patterns("runs", ".state")
    return Flow(Path(shutil.copytree(checkout.folder, folder / "checkout", ignore=ignored)))


KILLED_AT = """
import os, signal, sys, time
from functools import partial

from pipeline.learning import loop, steps
from stages import train as stage
from stages.cli.main import main

step, where = int(sys.argv[1]), sys.argv[2]
sys.argv[1:] = ["train"]
losses = 0

def kill():
    # Of several processes the first one, which writes the state, ends first.
    time.sleep(5 * int(os.environ.get("RANK", "0")))
    os.kill(os.getpid(), signal.SIGKILL)

def loss(*inputs, of=steps.compute_loss):
    global losses
    losses += 1
    if losses > step:
        kill()
    return of(*inputs)

def save(path, content, of=loop.save_tensors):
    if where == "saving" and losses == step:
        path.with_name(path.name + ".12345678.tmp").write_bytes(b"a part of it")
        kill()
    of(path, content)

def checkpoint(*inputs, of=stage.save_checkpoint):
    if where == "checkpoint":
        kill()
    of(*inputs)

steps.compute_loss, loop.save_tensors = loss, save
stage.save_checkpoint = checkpoint
stage.train_network = partial(stage.train_network, save_every=0)
main()
"""
"""`gmpipe train`, in a process that kills itself after so many steps: before the next step's loss,
while it writes its state, or before it writes the checkpoint."""


class Killed(Exception):
    """Stands for the end of a process."""


def killed_after(step: int) -> Callable[..., torch.Tensor]:
    """A loss that ends the process in the step after that many."""
    done = 0

    def loss(*inputs: Any) -> torch.Tensor:
        nonlocal done
        if done == step:
            raise Killed
        done += 1
        return compute_loss(*inputs)

    return loss
