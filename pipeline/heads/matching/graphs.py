"""The structure of the assignment graph: its instances, and which nodes read which others.

Nothing here has parameters. `pipeline.heads.matching.states` holds what the network computes on the
nodes and edges.

Letters: B images, M instances (padding included), C labels, K neighbours of an instance,
L neighbours of a label, D feature size, W label vector size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.heads.contract import RegionBatch
from pipeline.settings import GmMlicSettings

_BLOCK_BYTES = 2**26
"""Size of the cosines that are held at once while a label's neighbours are found. Several arrays of
this size exist at a time, and all cosines of 20,000 labels would be 3.2 GB each."""


@dataclass(frozen=True)
class Neighbors:
    """The neighbours from which each instance gathers messages.

    Attributes:
        index: (B, M, K) int64, indices of instances of the same image.
        mask: (B, M, K) bool, False where an instance has no K-th neighbour.
    """

    index: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Structure:
    """The neighbours of every node, and their weights in the mean over neighbours.

    Attributes:
        instance_weights: (B, M) float, 1 / n for each of an image's n real instances and 0 for
            padding: the weights by which a label averages over instances.
        instance_neighbors: of the instance graph.
        label_neighbors: (C, L) int64, label indices of a sparse label graph; None if the graph is
            complete.
        label_weights: (C, C) float64, 1 / (C - 1) off the diagonal and 0 on it, the weights in a
            complete label graph; None if the graph is sparse.
    """

    instance_weights: Tensor
    instance_neighbors: Neighbors
    label_neighbors: Tensor | None
    label_weights: Tensor | None


class StructureBuilder:
    """Build the `Structure` of batches that share their label vectors.

    The label graph depends on the label vectors alone, so it is built once and kept until another
    tensor of vectors comes.

    Args:
        settings: K and L.
    """

    def __init__(self, settings: GmMlicSettings) -> None:
        self._settings = settings
        self._known: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def build(
        self, batch: RegionBatch, label_vectors: Tensor, instance_graph: bool, label_graph: bool
    ) -> Structure:
        """Find the neighbours of every node.

        Args:
            batch: B images with up to M instances.
            label_vectors: (C, W), as they come from their source.
            instance_graph, label_graph: False leaves the nodes of that graph without neighbours.
        """
        weights = batch.mask.to(batch.features.dtype)
        nearest: Tensor | None = batch.mask.new_empty((len(label_vectors), 0), dtype=torch.int64)
        label_weights = None
        if label_graph:
            nearest, label_weights = self._label_graph(label_vectors)
        return Structure(
            weights / weights.sum(dim=1, keepdim=True),
            instance_neighbors(batch, self._settings.neighbors if instance_graph else 0),
            nearest,
            label_weights,
        )

    def _label_graph(self, vectors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`label_neighbors` and `label_weights` of `Structure`."""
        known = self._known
        # Compared by identity: on an accelerator, a look at the numbers would wait for all of its
        # work.
        if known is None or known[0] is not vectors:
            labels, chosen = len(vectors), self._settings.label_neighbors
            index = weights = None
            if chosen is not None and chosen < labels - 1:
                index = label_neighbors(vectors, chosen)
            else:
                others = 1 - torch.eye(labels, dtype=torch.float64, device=vectors.device)
                weights = others / max(labels - 1, 1)
            known = self._known = (vectors, index, weights)
        return known[1:]


def instance_neighbors(batch: RegionBatch, neighbors: int) -> Neighbors:
    """Find each instance's K nearest others by Euclidean distance of box centres, equation (1).

    Boxes clipped at the border often have the very same centre. Ties are broken by score (higher
    first), class, then box coordinates, so that the order of the instances never matters.

    Args:
        batch: the instances.
        neighbors: K; where an image has fewer other instances, the rest is masked.
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


def _canonical_order(batch: RegionBatch) -> Tensor:
    """Sort instance indices (B, M) int64 by score (descending), class, then box coordinates."""
    # From the least to the most significant key: each stable sort keeps the order of those before.
    keys = [*batch.boxes.flip(-1).unbind(-1), batch.classes, -batch.scores]
    order = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
    for key in keys:
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


def label_neighbors(label_vectors: Tensor, neighbors: int | None) -> Tensor:
    """Find the labels from which each label gathers messages, equation (2).

    Args:
        label_vectors: (C, W) float, none of length 0.
        neighbors: L, the number of nearest labels by cosine (ties are broken by the lower index);
            None for all other labels.

    Returns:
        (C, L) int64, label indices, without self loops.
    """
    labels = len(label_vectors)
    if neighbors is None:
        others = torch.arange(labels - 1, device=label_vectors.device)
        return others + (others >= torch.arange(labels, device=label_vectors.device)[:, None])
    directions = normalize(label_vectors.double(), dim=1)
    rows = max(1, _BLOCK_BYTES // (labels * directions.element_size()))
    nearest = []
    for first, block in enumerate(directions.split(rows)):
        # Rounded, so that labels with equal vectors tie whatever order they come in.
        similarity = (block @ directions.T).round(decimals=12)
        own = first * rows + torch.arange(len(block), device=block.device)
        itself = own[:, None] == torch.arange(labels, device=block.device)
        similarity = similarity.masked_fill(itself, -torch.inf)
        order = similarity.argsort(dim=1, descending=True, stable=True)
        nearest.append(order[:, : min(neighbors, labels - 1)].contiguous())
    return torch.cat(nearest)
