"""What heads that attend to regions share: attention, feed-forward layers, positions of boxes.

Letters: B images, M regions, N queries, H attention heads, E hidden size.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.heads.inputs import Inputs
from pipeline.heads.layers import apply, scaled_linear
from pipeline.settings.heads import RegionSettings

Boxes = Literal["none", "sine", "mlp"]

_TEMPERATURE = 10000.0  # of the sine positions of DETR and Query2Label


class AttentionSettings(RegionSettings):
    """What the heads that are made of transformer layers have in common."""

    hidden_size: int = Field(128, ge=1, description="Size of the vectors of regions and queries.")
    feedforward_size: int = Field(
        256, ge=1, description="Size of the hidden layer of the feed-forward parts."
    )
    attention_heads: int = Field(4, ge=1, description="Number of attention heads.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout in the transformer layers.")
    boxes: Boxes = Field(
        "mlp",
        description="How attention knows where a region is: by `sine` waves of its box's centre, "
        "width and height, or by an `mlp` of its corners. `none`: it does not.",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Any:
        for divisor, reason in (
            (self.attention_heads, "attention_heads"),
            (8 if self.boxes == "sine" else 1, "8, since `boxes` is `sine`"),
        ):
            if self.hidden_size % divisor:
                nearest = math.lcm(self.attention_heads, 8 if self.boxes == "sine" else 1)
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of {reason}: set "
                    f"hidden_size to a multiple of {nearest}"
                )
        return self


class Attention(nn.Module):
    """Multi-head attention of queries to regions, which also tells the weights.

    Keys have no bias: it would add the same to all weights of a query before the softmax.

    Args:
        size: E, a multiple of ``heads``.
        heads: H.
        dropout: on the weights.
    """

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = scaled_linear(size, size)
        self.key = scaled_linear(size, size, bias=False)
        self.value = scaled_linear(size, size)
        self.out = scaled_linear(size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend to the real regions.

        Args:
            queries: (B, N, E), or (1, N, E) if they are the same for all images.
            keys, values: (B, M, E).
            mask: (B, M) bool, False for padding.

        Returns:
            (B, N, E), and the weights (B, N, M), the mean over the heads; 0 for padding.
        """
        query = self._split(apply(self.query, queries))
        key = self._split(apply(self.key, keys))
        products = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        weights = products.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=3)
        mixed = apply(self.dropout, weights) @ self._split(apply(self.value, values))
        return apply(self.out, mixed.transpose(1, 2).flatten(2)), weights.mean(dim=1)

    def _split(self, vectors: Tensor) -> Tensor:
        """(B, N, E) -> (B, H, N, E / H)."""
        images, number, size = vectors.shape
        return vectors.view(images, number, self.heads, size // self.heads).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU, added to their input and normalised.

    Args:
        size: E.
        hidden_size: of the layer between.
        dropout: after the ReLU and on the result.
    """

    def __init__(self, size: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.first = scaled_linear(size, hidden_size)
        self.second = scaled_linear(hidden_size, size, gain=2.0)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        hidden = apply(self.dropout, apply(self.first, x).relu())
        return apply(self.norm, x + apply(self.dropout, apply(self.second, hidden)))


class AttentionLayer(nn.Module):
    """A layer of a transformer: attention and a feed-forward part, each normalised.

    Args:
        settings: its sizes and dropout.
    """

    def __init__(self, settings: AttentionSettings) -> None:
        super().__init__()
        size, dropout = settings.hidden_size, settings.dropout
        self.attention = Attention(size, settings.attention_heads, dropout)
        self.norm = nn.LayerNorm(size)
        self.feedforward = FeedForward(size, settings.feedforward_size, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update states by what their queries find.

        Args:
            states: (B, N, E), or (1, N, E) if they are the same for all images.
            queries, keys, values, mask: as `Attention` takes them.

        Returns:
            the states (B, N, E), and the weights of the attention (B, N, M).
        """
        found, weights = self.attention(queries, keys, values, mask)
        states = apply(self.norm, states + apply(self.dropout, found))
        return apply(self.feedforward, states), weights


class BoxPositions(nn.Module):
    """Vectors that say where a region is, to be added to what attention compares.

    `sine` takes the formula of the positions that Query2Label takes from DETR, for the four numbers
    centre x and y, width and height instead of x and y: with t one of them, in [0, 1], its part of
    the vector is sin and cos of 2 pi t / 10000^(2i/n) for i = 0 .. n/2 - 1, with n = E / 4.

    Args:
        size: E; a multiple of 8 for `sine`.
        kind: `sine`, or `mlp`: a linear layer, a ReLU and another linear layer, of the box's
            standardised corners; `none` makes vectors of 0.
    """

    scales: Tensor

    def __init__(self, size: int, kind: Boxes) -> None:
        super().__init__()
        self.size = size
        self.kind = kind
        if kind == "mlp":
            self.first = scaled_linear(4, size)
            # Without a bias, which would add the same to the keys of all regions.
            self.second = scaled_linear(size, size, gain=2.0, bias=False)
        elif kind == "sine":
            exponents = torch.arange(size // 8) / (size // 8)
            scales = 2 * math.pi / _TEMPERATURE**exponents
            self.register_buffer("scales", scales, persistent=False)

    def forward(self, boxes: Tensor, inputs: Inputs) -> Tensor:
        """Boxes (B, M, 4), xyxy in [0,1] of the view -> (B, M, E)."""
        if self.kind == "none":
            return boxes.new_zeros(*boxes.shape[:2], self.size)
        if self.kind == "mlp":
            return apply(self.second, apply(self.first, inputs.boxes(boxes)).relu())
        low, high = boxes[..., :2], boxes[..., 2:]
        numbers = torch.cat([(low + high) / 2, high - low], dim=2)
        angles = numbers[..., None] * self.scales
        return torch.stack([angles.sin(), angles.cos()], dim=4).flatten(2)
