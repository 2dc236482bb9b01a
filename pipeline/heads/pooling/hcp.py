r"""HCP: every region is scored by one classifier, and the best region of a label scores the image.

Wei et al., "HCP: A Flexible CNN Framework for Multi-Label Image Classification", TPAMI 38(9), 2016
(arXiv 1406.5726, doi 10.1109/TPAMI.2015.2491929).

.. math:: s_{mc} = U_c\,x_m + u_c ,\qquad s_c = \max_m s_{mc}

with :math:`x_m` the feature of region m, there a hypothesis. The paper's abstract has the shared
network for any number of hypotheses, and max pooling over them. No public code was found. Two
things are from memory: the loss, :math:`\sum_c (\mathrm{softmax}(s)_c - y_c / \lVert y \rVert_1)^2`
(`loss: {name: softmax-squared}`), and the training by SGD with momentum, first on whole images and
then on hypotheses. Scores that are trained with this loss rank labels, but say nothing at a
threshold; `hcp-bce` is trained with the cross-entropy instead.

On regions: the detector's regions take the place of the hypotheses (from memory: about 500 an image
from BING or EdgeBoxes, clustered). Lost: fine-tuning the network on hypotheses and, before that, on
whole images. Boxes are not read, as in the original; `max-pool` is this head with a hidden layer
and boxes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, zero_linear
from pipeline.settings.heads import RECIPE, RegionSettings


class HcpSettings(RegionSettings):
    """HCP (TPAMI 2016): a linear layer on each region, then the maximum over the regions."""

    head: Literal["hcp"] = "hcp"


VARIANTS: dict[str, dict[str, Any]] = {
    "hcp": {
        **RECIPE,
        "epochs": 10,
        "loss": {"name": "softmax-squared"},
        "network": {"head": "hcp", "least_deviation": 1.0, "input_dropout": 0.3},
    },
    "hcp-bce": {
        **RECIPE,
        "learning_rate": 0.01,
        "network": {"head": "hcp", "least_deviation": 1.0, "input_dropout": 0.3},
    },
    "hcp-published": {
        **RECIPE,
        "optimizer": "sgd",
        "learning_rate": 0.01,  # this project's choice: the published one was not found
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "averaging": 0.0,
        "loss": {"name": "softmax-squared"},
        "network": {"head": "hcp"},
    },
}


class Hcp(Head):
    """Score each region with a linear layer, and each image by its best region."""

    attribution = "logits"

    def __init__(self, sizes: HeadSizes, settings: HcpSettings) -> None:
        super().__init__(sizes, settings)
        self.dropout = nn.Dropout(settings.input_dropout)
        self.classifier = zero_linear(sizes.features, sizes.labels)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read."""
        features = apply(self.dropout, self.inputs.features(batch.features))
        logits = apply(self.classifier, features).masked_fill(~batch.mask[..., None], -torch.inf)
        return HeadOutput(logits.amax(dim=1), logits)
