"""The baseline without a graph.

Letters: B images, M instances (padding included), C labels, D feature size, W label vector size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.matching.graphs import InstanceBatch
from pipeline.matching.inputs import Inputs
from pipeline.matching.layers import MLP, apply
from pipeline.settings import NetworkSettings


class MaxPoolNetwork(nn.Module):
    """An MLP on each region's feature and box; an image's score is the max over its regions.

    Args:
        feature_size: D.
        labels: C.
        settings: hidden size (``latent_size``), inputs' scale and dropouts.
    """

    def __init__(self, feature_size: int, labels: int, settings: NetworkSettings) -> None:
        super().__init__()
        self.inputs = Inputs(feature_size, settings.least_deviation)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.mlp = MLP((feature_size, 4), labels, hidden=settings.latent_size)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, batch: InstanceBatch, label_vectors: Tensor) -> Tensor:
        """Score every region for every label.

        Args:
            batch: B images with up to M instances.
            label_vectors: (C, W), which are not read.

        Returns:
            (B, M, C) logits; -inf for padding.
        """
        features = self.input_dropout(self.inputs.features(batch.features))
        regions = torch.cat([features, self.inputs.boxes(batch.boxes)], dim=-1)
        hidden = self.dropout(apply(self.mlp.first, regions).relu())
        logits = apply(self.mlp.second, hidden)
        return logits.masked_fill(~batch.mask[..., None], -torch.inf)
