"""The training loop of stage two, section 4.2 of the paper.

Letters: B images of a batch, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import evaluate
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.data import SplitData, region_statistics
from pipeline.learning.seeds import seed_everything
from pipeline.matching.loss import matching_loss
from pipeline.matching.network import MatchingNetwork, MaxPoolNetwork, build_network, image_logits
from pipeline.settings import TrainSettings
from pipeline.tensors import best_device, save_tensors

Network = MatchingNetwork | MaxPoolNetwork


@dataclass(frozen=True)
class Predictions:
    """What a network says of a split of N images.

    Attributes:
        scores: (N, C) float32, probabilities.
        regions: (N, C) int16, place of the region that won each label's max (14).
    """

    scores: np.ndarray
    regions: np.ndarray


def split_validation(split: SplitData, share: float, seed: int) -> tuple[SplitData, SplitData]:
    """Cut a validation part out of the training split: (to train on, to validate on)."""
    order = np.random.default_rng([seed, 2]).permutation(len(split))
    held = min(max(1, round(share * len(split))), len(split) - 1)
    return split.take(np.sort(order[held:])), split.take(np.sort(order[:held]))


def train_network(
    split: SplitData,
    vectors: LabelVectors,
    seed: int,
    settings: TrainSettings,
    *,
    state_file: Path,
    validation: SplitData | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[Network, list[dict[str, float]]]:
    """Train a network on a split; the last epoch's weights are the result.

    What is needed to resume is written to ``state_file`` after each epoch; a training that was
    killed continues from there and ends with the same weights as one that was not.

    Args:
        split: the training split.
        vectors: of the C labels.
        seed: of the initial weights, the shuffling, the views and the dropout.
        settings: the variant's own settings.
        state_file: where the state lies between two attempts.
        validation: a part on which mAP is measured each epoch; it decides nothing.
        on_epoch: called after each epoch with its row of the history.

    Returns:
        the network in eval mode, and the history, a row an epoch: ``epoch`` (from 1),
        ``learning_rate``, ``train_loss`` (mean over the images), ``gradient_norm`` (largest before
        clipping) and, with a validation part, ``validation_mAP`` (percent).

    Raises:
        GmpipeError: the loss is not finite.
    """
    device = best_device()
    seed_everything(seed)
    network = build_network(
        split.cache.feature_size,
        len(vectors.names),
        vectors.vectors.shape[1],
        settings.network,
    )
    label_vectors = torch.from_numpy(vectors.vectors)
    statistics = region_statistics(split)
    network.inputs.set_statistics(
        statistics.feature_mean,
        statistics.feature_std,
        statistics.box_mean,
        statistics.box_std,
        label_vectors,
    )
    network.to(device)
    label_vectors = label_vectors.to(device)
    ratio = torch.from_numpy((split.truth == 1).mean(axis=0)).float().to(device)
    optimizer = _optimizer(network, settings)
    schedule = _schedule(optimizer, settings)
    history: list[dict[str, float]] = []
    if state_file.is_file():
        history = _restore(state_file, network, optimizer, schedule)
    for epoch in range(len(history), settings.epochs):
        rate = optimizer.param_groups[0]["lr"]
        # Seeded by the epoch alone, so a resumed training sees the same batches.
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(split))
        views = rng.integers(split.rows.shape[1], size=len(split))
        network.train()
        total = largest = 0.0
        for start in range(0, len(order), settings.batch_size):
            images = order[start : start + settings.batch_size]
            batch, truth = split.batch(images, views[images])
            logits = network(batch.to(device, torch.float32), label_vectors)
            loss = matching_loss(image_logits(logits)[0], truth.to(device), ratio, settings.beta)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            value, gradient = loss.item(), norm.item()
            if not math.isfinite(value) or not math.isfinite(gradient):
                step = epoch * math.ceil(len(order) / settings.batch_size)
                step += start // settings.batch_size + 1
                raise GmpipeError(
                    f"training diverged in step {step} (epoch {epoch + 1}): loss "
                    f"{value}, largest gradient norm before {largest:.3g}. Lower "
                    "train.<dataset>.learning_rate or clip_norm."
                )
            optimizer.step()
            total += value * len(images)
            largest = max(largest, gradient)
        schedule.step()
        row = {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": total / len(order),
            "gradient_norm": largest,
        }
        if validation is not None:
            found = predict_split(network.eval(), validation, label_vectors)
            row["validation_mAP"] = evaluate(found.scores, validation.truth, vectors.names)["mAP"]
        history.append(row)
        on_epoch(row)
        _save(state_file, network, optimizer, schedule, history)
    return network.eval(), history


def _optimizer(network: Network, settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings
) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    return torch.optim.lr_scheduler.StepLR(optimizer, settings.step_epochs, gamma=0.1)


def _save(
    file: Path, network: Network, optimizer: Any, schedule: Any, history: list[dict[str, float]]
) -> None:
    save_tensors(
        file,
        {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": history,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        },
    )


def _restore(file: Path, network: Network, optimizer: Any, schedule: Any) -> list[dict[str, float]]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    history: list[dict[str, float]] = state["history"]
    return history


@torch.inference_mode()
def predict_split(
    network: Network, split: SplitData, label_vectors: Tensor, batch_size: int = 64
) -> Predictions:
    """Scores of a split in view 0, by a network in eval mode."""
    device = label_vectors.device
    scores, regions = [], []
    for start in range(0, len(split), batch_size):
        batch, _ = split.batch(np.arange(start, min(start + batch_size, len(split))))
        best, winners = image_logits(network(batch.to(device, torch.float32), label_vectors))
        scores.append(best.sigmoid().cpu().numpy())
        regions.append(winners.cpu().numpy().astype(np.int16))
    return Predictions(np.concatenate(scores), np.concatenate(regions))
