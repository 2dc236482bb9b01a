"""Scores of images by networks that were not trained on them: k-fold training from the cache.

Letters: N images of the training split, C labels, k folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.labels.vectors import LabelVectors
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import SplitData
from pipeline.learning.training import known_labels, train_network
from pipeline.settings import TrainSettings


def divide(groups: Sequence[object], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw the fold of each image. Images of one group, such as equal photographs, share a fold.

    Args:
        groups: N values; equal ones stand for one group.
        folds: k. Their numbers of groups differ by at most one.
        seed: of the choice.

    Returns:
        (N,) numbers from 0 to k - 1.
    """
    numbers: dict[object, int] = {}
    of_image = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    fold_of_group = np.random.default_rng([seed, 4]).permutation(len(numbers)) % folds
    chosen: npt.NDArray[np.int64] = fold_of_group[of_image]
    return chosen


def without_choice(settings: TrainSettings) -> TrainSettings:
    """The settings for the network of a fold: it trains on all of its images, to the last epoch."""
    return settings.model_copy(
        update={"validation": 0.0, "training_share": 1.0, "selection": "last", "patience": None}
    )


def score_fold(
    split: SplitData,
    held_out: npt.NDArray[np.bool_],
    others: Sequence[SplitData],
    vectors: LabelVectors,
    seed: int,
    settings: TrainSettings,
    *,
    state_file: Path,
    name: str,
    on_step: Callable[[int], Any] = lambda done: None,
) -> list[npt.NDArray[np.float32]]:
    """Train a network without the images of a fold, and score these and further splits.

    Args:
        split: the training split, N images.
        held_out: (N,) which of them are the fold's.
        others: further splits, on which nothing is trained.
        vectors: of the C labels.
        seed, settings, state_file, name, on_step: as `train_network` takes them; ``settings`` as
            `without_choice` returns them.

    Returns:
        logits: (n, C) of the fold's n images, in the split's order, and (N', C) of each of
        ``others``.

    Raises:
        GmpipeError: as `train_network` and `Scorer.predict`.
    """
    trained = split.take(np.flatnonzero(~held_out))
    training = train_network(
        trained, vectors, seed, settings, state_file=state_file, name=name, on_step=on_step
    )
    labels = known_labels(trained, vectors, settings)
    scorer = Scorer(
        training.network, labels, vectors.names, name=name, batch_size=settings.batch_size
    )
    scored = [split.take(np.flatnonzero(held_out)), *others]
    return [scorer.predict(images).logits for images in scored]
