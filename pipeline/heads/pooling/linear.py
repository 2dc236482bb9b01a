r"""Linear probes: the floor that every other head should clear.

.. math:: s_c = U_c\,g + u_c

where g is the vector of the whole view, or the mean or the max of the regions' features, component
by component. The paper's row "ResNet-101" is such a layer on features that are fine-tuned with it;
here the features stay as they are cached, so that this is a probe of them, and not that method.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, masked_max, masked_mean, zero_linear
from pipeline.settings.heads import RECIPE, FeatureSettings


class LinearSettings(FeatureSettings):
    """A linear layer on one vector of the image."""

    head: Literal["linear"] = "linear"
    of: Literal["whole", "mean", "max"] = Field(
        "whole",
        description="The vector: that of the whole view, or the mean or max over the regions.",
    )

    @property
    def needs_whole(self) -> bool:
        return self.of == "whole"


VARIANTS: dict[str, dict[str, Any]] = {
    "linear-whole": {
        **RECIPE,
        "learning_rate": 0.003,
        "network": {"head": "linear", "of": "whole"},
    },
    "linear-mean": {
        **RECIPE,
        "epochs": 10,
        "learning_rate": 0.01,
        "network": {"head": "linear", "of": "mean", "least_deviation": 1.0},
    },
    "linear-max": {
        **RECIPE,
        "network": {"head": "linear", "of": "max", "least_deviation": 1.0},
    },
}


class Linear(Head):
    """Score an image by a linear layer on one vector of it."""

    def __init__(self, sizes: HeadSizes, settings: LinearSettings) -> None:
        super().__init__(sizes, settings)
        self.of = settings.of
        self.dropout = nn.Dropout(settings.input_dropout)
        self.classifier = zero_linear(sizes.features, sizes.labels)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read."""
        return HeadOutput(apply(self.classifier, self.dropout(self._vector(batch))))

    def _vector(self, batch: RegionBatch) -> Tensor:
        """The vector (B, D) of each image."""
        if self.of == "whole":
            return self.inputs.whole(batch.of_whole())
        features = self.inputs.features(batch.features)
        pool = masked_mean if self.of == "mean" else masked_max
        return pool(features, batch.mask)
