"""Statistics of the labels: counted on the images that are trained on, and kept with the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flows import Flow
from small import TEST, TRAIN, D, M, make_small
from tiny import make_batch

from pipeline.api import TrainedRun
from pipeline.datasets.manifest import read_manifest
from pipeline.inference.export import CacheToScores
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import open_split, split_validation, training_part
from pipeline.settings import ExtractSettings
from pipeline.shards.reader import RegionCache

HEAD, SEED = "ssgrl", 0
BLOCK = "train.voc2007"


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    return make_small(tmp_path / "small")


def trained(flow: Flow, *options: str) -> tuple[Checkpoint, list[str]]:
    """Train a head that reads the co-occurrence.

    Returns:
        its checkpoint, and the arguments that name the run.
    """
    sets = [f"{BLOCK}.variants.{HEAD}.epochs=1", *options]
    run = ["--variant", HEAD, *(word for option in sets for word in ("--set", option))]
    flow.ok("train", *run)
    [path] = flow.folder.glob(f"runs/voc2007/{HEAD}-s{SEED}-*/checkpoint.pt")
    return load_checkpoint(path), run


def shares(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By plain loops: the share of the images with each label, and P(j|i) in row i, column j."""
    images, labels = truth.shape
    ratio, conditional = np.zeros(labels), np.zeros((labels, labels))
    for i in range(labels):
        with_i = [image for image in range(images) if truth[image, i] == 1]
        ratio[i] = len(with_i) / images
        for j in range(labels):
            if i != j and with_i:
                conditional[i, j] = sum(truth[image, j] == 1 for image in with_i) / len(with_i)
    return ratio, conditional


def all_truth(flow: Flow) -> np.ndarray:
    with np.load(flow / "regions.npz") as stored:
        return np.asarray(stored["labels"])


def counted_on(checkpoint: Checkpoint, truth: np.ndarray) -> bool:
    assert checkpoint.conditional is not None
    ratio, conditional = shares(truth)
    return np.allclose(checkpoint.ratio, ratio) and np.allclose(checkpoint.conditional, conditional)


def test_the_validation_part_is_not_counted(flow: Flow) -> None:
    checkpoint, _ = trained(flow, f"{BLOCK}.validation=0.3")
    manifest = read_manifest(flow / "data/voc2007/prepared/manifest.parquet")
    split = open_split(RegionCache.open(flow / "cache/voc2007"), manifest, "train")
    kept, held_out = split_validation(split, 0.3, SEED)
    assert (len(kept), len(held_out)) == (21, 9)
    of_kept = [int(name) for name in kept.image_ids]
    truth = all_truth(flow)
    assert counted_on(checkpoint, truth[of_kept])
    assert not counted_on(checkpoint, truth[:TRAIN])


def test_only_the_drawn_share_is_counted(flow: Flow) -> None:
    """The checkpoint says which images these are: by its hash, its settings and its seed."""
    checkpoint, _ = trained(flow, f"{BLOCK}.validation=0.3", f"{BLOCK}.training_share=0.5")
    manifest = read_manifest(flow / "data/voc2007/prepared/manifest.parquet")
    assert checkpoint.train_sha256 == manifest.train_sha256
    split = open_split(RegionCache.open(flow / "cache/voc2007"), manifest, "train")
    settings, seed = checkpoint.settings, checkpoint.seed
    kept, _ = split_validation(split, settings.validation, seed)
    part = training_part(kept, settings.training_share, seed)
    assert checkpoint.trained_images == len(part) == 10
    truth = all_truth(flow)
    assert counted_on(checkpoint, truth[[int(name) for name in part.image_ids]])
    assert not counted_on(checkpoint, truth[[int(name) for name in kept.image_ids]])


def test_neither_the_split_val_nor_the_test_split_is_counted(flow: Flow, tmp_path: Path) -> None:
    held_out = 10
    splits = ["train"] * (TRAIN - held_out) + ["val"] * held_out + ["test"] * TEST
    with np.load(flow / "regions.npz") as stored:
        arrays: dict[str, Any] = {**stored, "split": np.array(splits)}
    np.savez(flow / "regions.npz", **arrays)
    flow.ok("import-regions", "--replace", "regions.npz")
    checkpoint, _ = trained(flow)
    truth = all_truth(flow)
    assert counted_on(checkpoint, truth[: TRAIN - held_out])
    for others in (truth[:TRAIN], truth):
        assert not counted_on(checkpoint, others)


def test_nothing_is_counted_again_where_a_run_is_used(flow: Flow) -> None:
    checkpoint, run = trained(flow)
    again = AssertionError("counted again")
    with (
        mock.patch("pipeline.learning.training.label_set", side_effect=again),
        mock.patch("pipeline.learning.splits.label_set", side_effect=again),
    ):
        flow.ok("evaluate", *run)

    batch = make_batch(3, M, features=D, whole=False, dtype=torch.float32)
    assert checkpoint.conditional is not None
    other = replace(checkpoint, conditional=1 - checkpoint.conditional)
    scores: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for one in (checkpoint, other):
            scorer = Scorer.of_checkpoint(one, "run")
            used = TrainedRun(one, mock.Mock(), (), ExtractSettings())
            exported = CacheToScores(one.network(), one.labels)
            on_device = batch.to(used.device, torch.float32)
            found = [
                scorer.network(on_device, scorer.labels).image.sigmoid(),
                used.outputs(on_device).image.sigmoid(),
                exported(
                    batch.features, batch.boxes, batch.scores, batch.classes, batch.mask.sum(dim=1)
                )[0],
            ]
            scores.append([tensor.cpu() for tensor in found])
    for kept, changed in zip(*scores, strict=True):
        torch.testing.assert_close(kept, scores[0][0])
        assert (kept - changed).abs().max() > 1e-4
