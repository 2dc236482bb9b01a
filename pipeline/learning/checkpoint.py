"""A trained network in one file that loads without running code from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import GmpipeError
from pipeline.matching.network import Network, build_network
from pipeline.settings import TrainSettings
from pipeline.shards.schema import Recipe
from pipeline.tensors import save_tensors

_log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 3
"""2 had a direct term in the network's settings; its parameters had other names."""


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to use a trained network, or to refuse to.

    Attributes:
        dataset: name of the data set it was trained on.
        variant: its name in params.yaml.
        seed: of the training.
        settings: the variant's own train settings.
        epoch: after which the weights were taken, from 1.
        vocabulary: the C label names, in the order of the scores.
        labels_sha256: `Manifest.labels_sha256` of the labels it was trained on.
        label_vectors: (C, W) float32.
        label_vectors_sha256: of names and vectors.
        recipe: what decided the regions it was trained on.
        feature_size: D.
        state: the network's parameters and its inputs' statistics.
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
        """The network with these weights, in eval mode."""
        network = build_network(
            self.feature_size,
            len(self.vocabulary),
            self.label_vectors.shape[1],
            self.settings.network,
        )
        network.load_state_dict(self.state)
        return network.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all; the same content gives the same bytes."""
    content = {field: getattr(checkpoint, field) for field in Checkpoint.__dataclass_fields__}
    content["settings"] = checkpoint.settings.model_dump(mode="json")
    content["vocabulary"] = list(checkpoint.vocabulary)
    save_tensors(path, {"gmpipe_checkpoint": CHECKPOINT_VERSION, **content})


TRAIN = "Run `gmpipe train` for this data set, variant and seed, with the same `--set` options."


def load_checkpoint(path: Path, remedy: str = TRAIN) -> Checkpoint:
    """Read a checkpoint.

    Args:
        remedy: the end of the error's message.

    Raises:
        GmpipeError: there is none at ``path``, or the file is damaged, something else, or of
            another version.
    """
    if not path.is_file():
        raise GmpipeError(f"there is no checkpoint at {path}. {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        raise GmpipeError(
            f"{path} is not a checkpoint: torch can't load it ({type(error).__name__}). {remedy}"
        ) from error
    version = content.pop("gmpipe_checkpoint", None) if isinstance(content, dict) else None
    if version != CHECKPOINT_VERSION:
        found = "no gmpipe checkpoint" if version is None else f"version {version}"
        raise GmpipeError(
            f"{path} holds {found}; this gmpipe reads version {CHECKPOINT_VERSION}. {remedy}"
        )
    try:
        content["settings"] = TrainSettings.model_validate(content["settings"])
        content["vocabulary"] = tuple(content["vocabulary"])
        checkpoint = Checkpoint(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise GmpipeError(f"{path} is damaged ({error!r}). {remedy}") from error
    _log.info("read %s: %s, seed %d", path, checkpoint.variant, checkpoint.seed)
    return checkpoint
