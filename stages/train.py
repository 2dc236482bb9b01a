"""Stage `train`: cached regions -> runs/<dataset>/<variant>-s<seed>/{checkpoint.pt,history.csv}."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.files import folder_lock, replacing
from pipeline.labels.vectors import LabelVectors, load_label_vectors
from pipeline.learning.checkpoint import Checkpoint, save_checkpoint
from pipeline.learning.data import open_split
from pipeline.learning.training import split_validation, train_network
from pipeline.settings import TrainSettings
from pipeline.shards.reader import RegionCache
from stages.layout import cache_folder, manifest_file, run_folder, state_file
from stages.params import DatasetSettings, variant_settings
from stages.progress import progress_bar

CHECKPOINT_FILE = "checkpoint.pt"
HISTORY_FILE = "history.csv"


@dataclass(frozen=True)
class RunPlan:
    """What a run is made from, and where it goes."""

    dataset: str
    variant: str
    seed: int
    settings: TrainSettings
    views: int
    folder: Path


def plan_run(settings: DatasetSettings, variant: str, seed: int) -> RunPlan:
    """A run of a data set; overridden settings get a folder of their own."""
    own = variant_settings(settings.train, variant)
    views = settings.extract.views
    different = None
    if settings.overridden(variant):
        different = {"train": own.model_dump(mode="json"), "views": views}
    folder = run_folder(settings.dataset, variant, seed, different)
    return RunPlan(settings.dataset, variant, seed, own, views, folder)


def open_inputs(
    dataset: str, settings: TrainSettings
) -> tuple[Manifest, RegionCache, LabelVectors]:
    """What training and evaluation read of a data set."""
    manifest = read_manifest(manifest_file(dataset))
    cache = RegionCache.open(cache_folder(dataset))
    return manifest, cache, load_label_vectors(manifest.vocabulary, settings.label_vectors)


def train(run: RunPlan) -> str:
    """Train a run and write its checkpoint and history.

    Returns:
        a line that says where they are.
    """
    manifest, cache, vectors = open_inputs(run.dataset, run.settings)
    split = open_split(cache, manifest, "train", run.views)
    left_out = ""
    if split.left_out:
        left_out = f"; {split.left_out} images without regions left out"
    validation = None
    if run.settings.validation:
        split, validation = split_validation(split, run.settings.validation, run.seed)
    key = {
        "seed": run.seed,
        "settings": run.settings.model_dump(mode="json"),
        "cache": cache.fingerprint,
        "vectors": vectors.sha256,
        "labels": manifest.labels_sha256,
    }
    state = state_file("train", key)
    with folder_lock(run.folder):
        with progress_bar(total=run.settings.epochs, desc=run.folder.name, unit="epoch") as bar:

            def on_epoch(row: dict[str, float]) -> None:
                bar.update(int(row["epoch"]) - bar.n)
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", refresh=False)

            network, history = train_network(
                split,
                vectors,
                run.seed,
                run.settings,
                state_file=state,
                validation=validation,
                on_epoch=on_epoch,
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        with (
            replacing(run.folder / HISTORY_FILE) as temporary,
            temporary.open("w", newline="") as stream,
        ):
            writer = csv.DictWriter(stream, history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        save_checkpoint(
            run.folder / CHECKPOINT_FILE,
            Checkpoint(
                dataset=run.dataset,
                variant=run.variant,
                seed=run.seed,
                settings=run.settings,
                vocabulary=manifest.vocabulary,
                labels_sha256=manifest.labels_sha256,
                label_vectors=torch.from_numpy(vectors.vectors),
                label_vectors_sha256=vectors.sha256,
                recipe=dict(cache.recipe),
                feature_size=cache.feature_size,
                state=network.cpu().state_dict(),
            ),
        )
        state.unlink(missing_ok=True)
    loss = history[-1]["train_loss"]
    return f"{run.folder}: {run.settings.epochs} epochs, loss {loss:.3f}{left_out}"
