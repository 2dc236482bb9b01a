"""Trainings of the toy problem in this process, which may be cut off at any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from toys import LABELS, VECTORS, Toy

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.learning.loop import Training
from pipeline.learning.prediction import Predictions, Scorer
from pipeline.learning.splits import SplitData, label_set
from pipeline.learning.training import train_network
from pipeline.settings import (
    GmMlicSettings,
    HeadSettings,
    TrainSettings,
    WeightedLoss,
    head_of_variant,
    settings_class,
    variant_changes,
)

SETTINGS = TrainSettings(
    network=GmMlicSettings(latent_size=8, neighbors=2, dropout=0.2, input_dropout=0.1),
    epochs=4,
    batch_size=16,
    learning_rate=0.02,
    step_epochs=2,
    loss=WeightedLoss(beta=0.4),
)

LABEL_VECTORS = torch.from_numpy(VECTORS.vectors)


def settings(**changes: Any) -> TrainSettings:
    """`SETTINGS` with changes."""
    return SETTINGS.model_copy(update=changes)


def tiny(variant: str, size: int = 8, **changes: Any) -> HeadSettings:
    """The head of a built-in variant with small layers and without dropout.

    Args:
        size: of the layers.
        changes: of the head's settings.
    """
    kind = settings_class(head_of_variant(variant) or variant)
    small = {"latent_size": size, "hidden_size": size, "neighbors": 2, "dropout": 0.0}
    own = {name: value for name, value in small.items() if name in kind.model_fields}
    return kind.model_validate({**variant_changes(variant)["network"], **own, **changes})


def wild(**changes: Any) -> TrainSettings:
    """Settings that diverge, because nothing holds the gradient back."""
    return settings(**{"learning_rate": 1e20, "clip_norm": 1e30, **changes})


def train(
    toy: Toy,
    state_file: Path,
    *,
    seed: int = 0,
    chosen: TrainSettings = SETTINGS,
    split: SplitData | None = None,
    **options: Any,
) -> Training:
    """`train_network` on the toy problem."""
    return train_network(
        toy.train if split is None else split,
        VECTORS,
        seed,
        chosen,
        state_file=state_file,
        **options,
    )


def known(split: SplitData) -> LabelSet:
    """What a training on a split of the toy problem knows of the labels."""
    return label_set(split, VECTORS, conditional=True)


def predict(
    network: Head,
    split: SplitData,
    batch_size: int = SETTINGS.batch_size,
    *,
    trained_on: SplitData | None = None,
) -> Predictions:
    """What a network predicts for a split of the toy problem, which it was trained on or not."""
    labels = known(trained_on or split)
    return Scorer(network, labels, LABELS, name="the run", batch_size=batch_size).predict(split)


def same(one: Training, other: Training) -> bool:
    """Whether two trainings have the same result, bit for bit."""
    states = [training.network.state_dict() for training in (one, other)]
    assert states[0].keys() == states[1].keys()
    return (
        one.history == other.history
        and one.epoch == other.epoch
        and all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    )


def float_batch(split: SplitData, images: np.ndarray, views: Any = 0) -> RegionBatch:
    """The instances of some images in float32."""
    return split.instances(images, views).to(torch.device("cpu"), torch.float32)


def rewritten(path: Path, **changes: object) -> None:
    """Change entries of a file that `torch.save` wrote."""
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)
