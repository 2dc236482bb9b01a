"""The decoder, equation (13): a logit for every instance and label.

Letters: B images, M instances (padding included), C labels, H hidden size.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.heads.layers import apply
from pipeline.heads.matching.layers import MLP
from pipeline.heads.matching.states import AssignmentGraph


class Decoder(nn.Module):
    """An MLP on each matching edge; where these have no states, on ``[v_i^o, v_j^l]``.

    It stops before the sigmoid.

    Args:
        size: of the nodes and edges that it reads.
        matching_states: whether matching edges have states.
        dropout: on its hidden state.
    """

    def __init__(self, size: int, matching_states: bool, dropout: float) -> None:
        super().__init__()
        pieces = (size,) if matching_states else (size, size)
        self.mlp = MLP(pieces, 1, hidden=sum(pieces))
        self.dropout = nn.Dropout(dropout)

    def forward(self, graph: AssignmentGraph) -> Tensor:
        """(B, M, C) logits; those of padding have no meaning."""
        first = self.mlp.first
        if graph.matching_edges is not None:
            hidden, second = graph.matching_edges
            bias = first.bias + first.weight @ second.bias
            read = linear(cast(Tensor, hidden), graph.matching_edges.fold(first.weight), bias)
        else:
            own, other = self.mlp.pieces()
            of_labels = linear(graph.labels, other)[:, None]
            read = linear(graph.instances, own, first.bias)[:, :, None] + of_labels
        return apply(self.mlp.second, self.dropout(read.relu())).squeeze(-1)
