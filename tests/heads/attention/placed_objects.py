"""A toy problem of boxes: what an image shows never changes, only where it shows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import D, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, ranking

from pipeline.heads.contract import RegionBatch


def place(images: int, seed: int) -> tuple[RegionBatch, Tensor]:
    """Two regions, an object and a filler, side by side.

    Returns:
        the batch, and the labels (B, 2): the object is on the left, the object is on the right.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(images, generator=generator) < 0.5
    x = torch.where(left[:, None], torch.tensor([0.1, 0.6]), torch.tensor([0.6, 0.1]))
    corners = torch.stack([x, torch.full_like(x, 0.4)], dim=2)
    corners = corners + 0.1 * torch.rand(images, 2, 2, generator=generator)
    features = torch.zeros(images, 2, D)
    features[:, 0, 0] = features[:, 1, 1] = 2.0
    batch = make_batch(images, 2, full=True, dtype=torch.float32)
    boxes = torch.cat([corners, corners + 0.2], dim=2)
    return replace(batch, features=features, boxes=boxes), torch.stack([left, ~left], 1).long()


def learn_places(variant: str, **changes: object) -> float:
    """Train a head on 50 such images; return how well it ranks others (0.5: by chance)."""
    head = make_head(variant, labels=2, dtype=torch.float32, **changes)
    labels = make_label_set(2, dtype=torch.float32)
    batch, truth = place(50, seed=0)
    fit(head, batch, labels, truth, steps=60, rate=0.02)
    batch, truth = place(50, seed=1)
    return ranking(head, batch, labels, truth)
