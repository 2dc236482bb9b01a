"""Tiny trainings, to show that a head learns what it claims to."""

from __future__ import annotations

import torch
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


def accuracy(head: Head, batch: RegionBatch, labels: LabelSet, truth: Tensor) -> float:
    """Share of the images and labels that the head decides rightly."""
    return float(((head(batch, labels).image > 0) == (truth == 1)).double().mean())
