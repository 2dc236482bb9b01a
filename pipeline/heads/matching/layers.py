"""The two-layer MLP that every part of the network is made of, and its pieces.

A linear layer on a concatenation is the sum of smaller linear layers on its pieces. So an MLP that
reads ``[own_i, other_j]`` for every pair (i, j) multiplies each node once and adds the products.

Letters: B images, R nodes that read, N nodes that are read, K listed neighbours of a node,
H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.heads.layers import apply, scaled_linear
from pipeline.heads.matching.grids import Pair


class MLP(nn.Module):
    """Linear, ReLU, linear.

    Nine MLPs are stacked here without a residual connection, so that with PyTorch's own
    initialisation, which shrinks a signal at every layer, the network would hardly train.

    Args:
        inputs: sizes of the pieces whose concatenation is the input.
        outputs: size of the output.
        hidden: size of the hidden state; None for the output's.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = outputs if hidden is None else hidden
        self.inputs = inputs
        self.first = scaled_linear(sum(inputs), hidden)
        self.second = scaled_linear(hidden, outputs, gain=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., sum of inputs) -> (..., outputs)."""
        return apply(self.second, apply(self.first, x).relu())

    def pieces(self) -> tuple[Tensor, ...]:
        """The first layer's weights, split by the pieces of the input: (hidden, piece) each."""
        return torch.split(self.first.weight, list(self.inputs), dim=1)

    def of_pieces(self, *pieces: Tensor) -> Tensor:
        """Apply the MLP to a concatenation of tensors that broadcast to each other.

        Label nodes, for example, lack the image axis (have size 1) where all images share them.
        """
        hidden: Tensor = self.first.bias
        for piece, weight in zip(pieces, self.pieces(), strict=True):
            hidden = hidden + linear(piece, weight)
        return apply(self.second, hidden.relu())

    def pair(self, own: Tensor, other: Tensor) -> Pair:
        """Hidden states of the MLP on ``[own_i, other_j]`` for all pairs, as the sum's two terms.

        Args:
            own: (B, R, size of the first piece).
            other: (B or 1, N, size of the second piece).
        """
        left, right = self.pieces()
        return Pair(linear(own, left, self.first.bias), linear(other, right))


def neighbor_rows(nodes: Tensor, index: Tensor) -> Tensor:
    """Gather the rows of each node's listed neighbours: (B, N, H), (B, R, K) -> (B, R, K, H)."""
    images, readers, neighbors = index.shape
    flat = index.reshape(images, readers * neighbors, 1).expand(-1, -1, nodes.shape[-1])
    return nodes.gather(1, flat).view(images, readers, neighbors, nodes.shape[-1])


def listed(pair: Pair, index: Tensor) -> Tensor:
    """A pair's hidden states at each node's listed neighbours: (B, R, K) -> (B, R, K, H)."""
    return (pair.left[:, :, None] + neighbor_rows(pair.right, index)).relu()
