"""Checkpoints: a trained network in one file, which is loaded without running code from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DamagedError, MissingError
from pipeline.matching.network import Network, build_network
from pipeline.settings import TrainSettings
from pipeline.shards.schema import Recipe
from pipeline.tensors import save_tensors

_log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 3
"""2 had a direct term in the network's settings; its parameters had other names."""

_TRAIN = "Train this run again."


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, and what must match wherever it is used.

    Letters: C labels, W size of a label vector, D feature size.

    Attributes:
        dataset: name of the data set that it was trained on.
        variant: its name in params.yaml.
        seed: of the training.
        settings: the variant's own train settings.
        epoch: after which the weights were taken, counted from 1.
        vocabulary: the C label names, in the order of the scores.
        labels_sha256: `Manifest.labels_sha256` of the labels that it was trained on.
        label_vectors: (C, W) float32.
        label_vectors_sha256: `LabelVectors.sha256`, over names and vectors.
        recipe: of the regions that it was trained on.
        feature_size: D.
        state: the network's parameters and the statistics of its inputs.
    """

    dataset: str
    variant: str
    seed: int
    settings: TrainSettings
    epoch: int
    vocabulary: tuple[str, ...]
    labels_sha256: str
    label_vectors: Tensor
    label_vectors_sha256: str
    recipe: Recipe
    feature_size: int
    state: dict[str, Tensor]

    def network(self) -> Network:
        """Build the network with these weights, in eval mode."""
        network = build_network(
            self.feature_size,
            len(self.vocabulary),
            self.label_vectors.shape[1],
            self.settings.network,
        )
        network.load_state_dict(self.state)
        return network.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; the same content gives the same bytes."""
    content = {field: getattr(checkpoint, field) for field in Checkpoint.__dataclass_fields__}
    content["settings"] = checkpoint.settings.model_dump(mode="json")
    content["vocabulary"] = list(checkpoint.vocabulary)
    save_tensors(path, {"gmpipe_checkpoint": CHECKPOINT_VERSION, **content})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        MissingError: there is no file at ``path``.
        DamagedError: the file is damaged, is no checkpoint, or has another version.
    """
    if not path.is_file():
        raise MissingError(f"There is no checkpoint at {path}.", _TRAIN)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        raise DamagedError(
            f"{path} is not a checkpoint: torch can't load it ({type(error).__name__}).", _TRAIN
        ) from error
    version = content.pop("gmpipe_checkpoint", None) if isinstance(content, dict) else None
    if version != CHECKPOINT_VERSION:
        holds = "is not a gmpipe checkpoint" if version is None else f"has version {version}"
        raise DamagedError(
            f"{path} {holds}; expected a checkpoint of version {CHECKPOINT_VERSION}.", _TRAIN
        )
    try:
        content["settings"] = TrainSettings.model_validate(content["settings"])
        content["vocabulary"] = tuple(content["vocabulary"])
        checkpoint = Checkpoint(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}).", _TRAIN) from error
    _log.info("read %s: %s, seed %d", path, checkpoint.variant, checkpoint.seed)
    return checkpoint
