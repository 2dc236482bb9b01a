"""Tiny trainings, to show that a head learns what it claims to."""

from __future__ import annotations

from dataclasses import replace

import torch
from sklearn.metrics import roc_auc_score
from tiny import CLASSES, C, D, make_batch
from torch import Tensor

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.learning.losses import compute_loss
from pipeline.settings import Loss, WeightedLoss


def fit(
    head: Head,
    batch: RegionBatch,
    labels: LabelSet,
    truth: Tensor,
    *,
    steps: int = 200,
    rate: float = 0.01,
    loss: Loss | None = None,
) -> float:
    """Train a head on one batch with Adam; return the last loss."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    value = float("nan")
    head.train()
    for _ in range(steps):
        output = head(batch, labels, truth)
        found = compute_loss(output, truth, labels.ratio, loss or WeightedLoss())
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        value = found.item()
    head.eval()
    return value


def ranking(head: Head, batch: RegionBatch, labels: LabelSet, truth: Tensor) -> float:
    """How well image scores rank positives over negatives: the mean area under the ROC curve."""
    with torch.no_grad():
        scores = head(batch, labels).image
    return float(roc_auc_score((truth == 1).numpy(), scores.numpy(), average="macro"))


def kinds_problem(images: int = 48, regions: int = 4) -> tuple[RegionBatch, Tensor, Tensor]:
    """Regions of C kinds, or of none; an image has the labels of the kinds of its regions.

    The feature, the detector's class and, for the whole view, the mean feature show the kinds.

    Returns:
        the regions, the truth (B, C), and the kind (B, M) of each region, C for none.
    """
    generator = torch.Generator().manual_seed(9)
    kinds = torch.randint(0, C + 2, (images, regions), generator=generator).clamp(max=C)
    batch = make_batch(images, regions, full=True, dtype=torch.float32)
    shown = torch.nn.functional.one_hot(kinds, D + 1)[..., :D] * (kinds < C)[..., None]
    features = 0.15 * batch.features + 2 * shown
    truth = torch.stack([(kinds == c).any(dim=1) for c in range(C)], dim=1).long()
    assert C + 1 < CLASSES
    return (
        replace(batch, features=features, classes=kinds + 1, whole=features.mean(dim=1)),
        truth,
        kinds,
    )


def right_regions(head: Head, batch: RegionBatch, labels: LabelSet, kinds: Tensor) -> float:
    """In `kinds_problem`: how often the winner of a label is the one region that shows it."""
    shows = kinds[..., None] == torch.arange(C)  # (B, M, C)
    image, label = (shows.sum(dim=1) == 1).nonzero().T
    winners = head(batch, labels).winners()[image, label]
    return float((winners == shows[image, :, label].long().argmax(dim=1)).double().mean())
