"""Standardisation of the network's inputs with statistics of the training split.

Letters: C labels, D feature size, W label vector size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_LEAST_BOX_DEVIATION = 0.1  # of the root mean square deviation of the four coordinates


class Inputs(nn.Module):
    """Standardise features, boxes and label vectors; the statistics are saved with the weights.

    Features and box coordinates get mean 0 and variance 1 over the real regions of the training
    split, each component by itself. A component that varies less than ``least_deviation`` times the
    root mean square deviation of all components is divided by that instead: a detector's features
    have components that are almost always 0, and dividing by their tiny deviation would make single
    regions stand out by a hundred. Label vectors are divided by the root mean square of all their
    components, which keeps their geometry.

    Args:
        feature_size: D.
        least_deviation: share of the root mean square deviation, for features.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    box_mean: Tensor
    box_scale: Tensor
    vector_scale: Tensor

    def __init__(self, feature_size: int, least_deviation: float = 0.1) -> None:
        super().__init__()
        self.least_deviation = least_deviation
        for name, size in (("feature", feature_size), ("box", 4)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.register_buffer("vector_scale", torch.ones(()))

    def set_statistics(
        self,
        feature_mean: Tensor,
        feature_std: Tensor,
        box_mean: Tensor,
        box_std: Tensor,
        label_vectors: Tensor | None = None,
    ) -> None:
        """Take the statistics of the training split.

        Args:
            feature_mean, feature_std: (D,).
            box_mean, box_std: (4,).
            label_vectors: (C, W); None if `vectors` is not used.
        """
        if label_vectors is not None:
            self.vector_scale.copy_(label_vectors.square().mean().rsqrt())
        for name, value in (
            ("feature_mean", feature_mean),
            ("feature_scale", _inverse(feature_std, self.least_deviation)),
            ("box_mean", box_mean),
            ("box_scale", _inverse(box_std, _LEAST_BOX_DEVIATION)),
        ):
            buffer = cast(Tensor, getattr(self, name))
            buffer.copy_(value.reshape(buffer.shape))

    def features(self, features: Tensor) -> Tensor:
        """Standardise features: (..., D) -> (..., D)."""
        return (features - self.feature_mean) * self.feature_scale

    def boxes(self, boxes: Tensor) -> Tensor:
        """Standardise boxes: (..., 4) -> (..., 4)."""
        return (boxes - self.box_mean) * self.box_scale

    def vectors(self, vectors: Tensor) -> Tensor:
        """Scale label vectors: (C, W) -> (C, W)."""
        return vectors * self.vector_scale


def _inverse(std: Tensor, least: float) -> Tensor:
    floor = least * std.square().mean().sqrt()
    return 1 / torch.maximum(std, floor).clamp(min=1e-6)
