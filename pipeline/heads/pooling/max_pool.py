r"""The baseline without a graph: an MLP on each region, then the max over the regions.

.. math:: s_{mc} = V_c\,\mathrm{ReLU}(W [x_m, b_m]) ,\quad s_c = \max_m s_{mc}

with the feature :math:`x_m` and the box :math:`b_m` of region m. It is this project's own: HCP's
pooling with cross-entropy, a hidden layer, and boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, scaled_linear
from pipeline.settings import MaxPoolSettings


class MaxPool(Head):
    """Score each region with an MLP, and each image by its best region."""

    attribution = "logits"

    def __init__(self, sizes: HeadSizes, settings: MaxPoolSettings) -> None:
        super().__init__(sizes, settings)
        self.reads_boxes = settings.boxes
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.first = scaled_linear(sizes.features + 4 * settings.boxes, settings.hidden_size)
        self.dropout = nn.Dropout(settings.dropout)
        self.second = scaled_linear(settings.hidden_size, sizes.labels, gain=2.0)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read."""
        regions = self.input_dropout(self.inputs.features(batch.features))
        if self.reads_boxes:
            regions = torch.cat([regions, self.inputs.boxes(batch.boxes)], dim=-1)
        hidden = self.dropout(apply(self.first, regions).relu())
        logits = apply(self.second, hidden).masked_fill(~batch.mask[..., None], -torch.inf)
        return HeadOutput(logits.max(dim=1).values, logits)
