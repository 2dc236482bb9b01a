"""The encoder, equation (4): one MLP for each kind of node and edge of the assignment graph.

Letters: B images, M instances (padding included), C labels, D feature size, W label vector size,
H latent size.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.heads.matching.graphs import Structure
from pipeline.heads.matching.layers import MLP, listed
from pipeline.heads.matching.states import AssignmentGraph, Edges
from pipeline.settings import GmMlicSettings


class Encoder(nn.Module):
    """Encode nodes and edges to one latent size, by an MLP for each kind, since sizes differ.

    The label vectors and the edges between labels are the same for every image, so they are encoded
    once. Boxes enter the network here, by the instance edges, and nowhere else.

    Args:
        feature_size: D.
        vector_size: W.
        settings: latent size, graphs, normalisation and dropout.
    """

    def __init__(self, feature_size: int, vector_size: int, settings: GmMlicSettings) -> None:
        super().__init__()
        latent, norm = settings.latent_size, settings.node_norm

        def mlp(*inputs: int, exists: bool) -> MLP | None:
            return MLP(inputs, latent) if exists else None

        self.instance = MLP((feature_size,), latent)
        self.label = MLP((vector_size,), latent)
        self.instance_edge = mlp(4, 4, exists=settings.instance_graph)
        self.label_edge = mlp(vector_size, vector_size, exists=settings.label_graph)
        self.matching_edge = mlp(feature_size, vector_size, exists=settings.matching_states)
        self.instance_norm = nn.LayerNorm(latent) if norm else nn.Identity()
        self.label_norm = nn.LayerNorm(latent) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.0 if settings.residual else settings.dropout)

    def forward(
        self, features: Tensor, boxes: Tensor, vectors: Tensor, structure: Structure
    ) -> AssignmentGraph:
        """Encode the attributes of equations (1)-(3).

        Args:
            features: (B, M, D), standardised.
            boxes: (B, M, 4), standardised.
            vectors: (C, W), standardised.
            structure: the neighbours of every node.
        """
        words = vectors[None]
        instance_edges = label_edges = matching_edges = None
        if (mlp := self.instance_edge) is not None:  # e_ij^o = [B_i, B_j]
            pair, index = mlp.pair(boxes, boxes), structure.instance_neighbors.index
            instance_edges = Edges(listed(pair, index), mlp.second)
        if (mlp := self.label_edge) is not None:  # e_ij^l = [w_i, w_j]
            pair, sparse = mlp.pair(words, words), structure.label_neighbors
            label_edges = Edges(pair if sparse is None else listed(pair, sparse[None]), mlp.second)
        if (mlp := self.matching_edge) is not None:  # e_ij^m = [f_i, w_j]
            matching_edges = Edges(mlp.pair(features, words), mlp.second)
        return AssignmentGraph(
            self.dropout(self.instance_norm(self.instance(features))),
            self.label_norm(self.label(words)),
            instance_edges,
            label_edges,
            matching_edges,
        )
