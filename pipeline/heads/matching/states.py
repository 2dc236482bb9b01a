"""The assignment graph while the network computes on it: states of its nodes and edges.

Letters: B images, M instances (padding included), C labels, K neighbours of an instance,
L neighbours of a label, H hidden size, G images or 1 (where all images share something).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.heads.matching.grids import Hidden


class Edges(NamedTuple):
    """One kind of edges, kept as the hidden state of their last update.

    Their attribute is ``second(hidden)``, but it is never computed. Between an edge's update
    (linear, ReLU, linear) and the first layer of whatever reads the edge stands no nonlinearity, so
    `second` is folded into the readers' first layers.

    Attributes:
        hidden: (G, R, K, H) of edges to each node's listed neighbours, or the hidden states of a
            grid of edges from every row to every column (see `pipeline.heads.matching.grids`).
        second: the last layer of the MLP that made the edges.
    """

    hidden: Hidden
    second: nn.Linear

    def fold(self, *weights: Tensor) -> Tensor:
        """Turn weights (H', H) that read the attribute into one that reads the hidden state."""
        return torch.cat(weights) @ self.second.weight


@dataclass(frozen=True)
class AssignmentGraph:
    """States between two modules. Edges are None where the variant has none or nothing reads them.

    G is B, and 1 for labels and label edges until labels have read instances: until then they are
    the same for every image, and are computed once.

    Attributes:
        instances: (B, M, H) nodes.
        labels: (G, C, H) nodes.
        instance_edges: (B, M, K, H).
        label_edges: a grid (G, C, C, H), or (G, C, L, H) in a sparse label graph.
        matching_edges: a grid (B, M, C, H).
    """

    instances: Tensor
    labels: Tensor
    instance_edges: Edges | None
    label_edges: Edges | None
    matching_edges: Edges | None
