"""The assignment graph's nodes and edges, before any network has seen them.

Letters: B images, M instances (m, padding included), C labels, K neighbours of an instance,
L neighbours of a label, D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class InstanceBatch:
    """The instances (regions) of a batch of images.

    Attributes:
        features: (B, M, D) float, as extracted.
        boxes: (B, M, 4) float, xyxy in [0,1] of the view.
        scores: (B, M) float, the detector's.
        classes: (B, M) int, the detector's class numbers.
        mask: (B, M) bool, False for padding. Every image has at least one instance.
    """

    features: Tensor
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> InstanceBatch:
        """The batch on another device, its floats in another precision."""
        return InstanceBatch(
            self.features.to(device, dtype, non_blocking=True),
            self.boxes.to(device, dtype, non_blocking=True),
            self.scores.to(device, dtype, non_blocking=True),
            self.classes.to(device, non_blocking=True),
            self.mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Neighbors:
    """Whom each instance gathers from.

    Attributes:
        index: (B, M, K) int64, places among the M instances.
        mask: (B, M, K) bool, False where there is no K-th neighbour.
    """

    index: Tensor
    mask: Tensor


def instance_neighbors(batch: InstanceBatch, neighbors: int) -> Neighbors:
    """Each instance's K nearest others by Euclidean distance of the box centres, equation (1).

    Boxes clipped at the border often have the very same centre. Ties go by score (higher first),
    class, then box coordinates, so that the order in which instances come never matters.

    Args:
        batch: the instances.
        neighbors: K; where an image has fewer others, the rest is masked.
    """
    boxes, mask = batch.boxes, batch.mask
    instances = boxes.shape[1]
    order = _canonical_order(batch)
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    ordered_centers = centers.gather(1, order[..., None].expand(-1, -1, 2))
    offsets = centers[:, :, None] - ordered_centers[:, None]
    distances = offsets[..., 0] ** 2 + offsets[..., 1] ** 2
    absent = ~mask.gather(1, order)[:, None] | (
        order[:, None] == torch.arange(instances, device=boxes.device)[None, :, None]
    )
    distances = distances.masked_fill(absent, torch.inf)
    nearest = distances.sort(dim=-1, stable=True)
    kept = min(neighbors, instances - 1)
    index = order[:, None].expand(-1, instances, -1).gather(2, nearest.indices[..., :kept])
    return Neighbors(index, nearest.values[..., :kept].isfinite() & mask[..., None])


def _canonical_order(batch: InstanceBatch) -> Tensor:
    """(B, M) int64: places of the instances by score (descending), class, box coordinates."""
    keys = [*batch.boxes.flip(-1).unbind(-1), batch.classes, -batch.scores]  # least to most weighty
    order = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
    for key in keys:
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


def label_neighbors(label_vectors: Tensor, neighbors: int | None) -> Tensor:
    """Whom each label gathers from, equation (2).

    Args:
        label_vectors: (C, W) float, none of length 0.
        neighbors: L, nearest by cosine (ties to the lower label number); None: all other labels.

    Returns:
        (C, L) int64, label numbers; without self loops.
    """
    labels = len(label_vectors)
    kept = labels - 1 if neighbors is None else min(neighbors, labels - 1)
    directions = normalize(label_vectors.double(), dim=1)
    # Rounded, so that labels with equal vectors tie whatever order they come in.
    similarity = (directions @ directions.T).round(decimals=12)
    itself = torch.eye(labels, dtype=torch.bool, device=similarity.device)
    nearest = similarity.masked_fill(itself, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )[:, :kept]
    return nearest.sort(dim=1).values if neighbors is None else nearest
