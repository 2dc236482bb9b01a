"""The last layer of heads that make a vector of each label in each image.

Letters: B images, C labels, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LabelClassifiers(nn.Module):
    """A linear classifier for each label, which reads that label's vector only.

    Args:
        labels: C.
        size: H.
    """

    def __init__(self, labels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(labels, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits of the labels: (B, C, H) -> (B, C)."""
        return (nodes * self.weight).sum(dim=2) + self.bias
