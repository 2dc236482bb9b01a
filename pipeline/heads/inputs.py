"""Standardisation of a head's inputs with statistics of the training split.

Letters: C labels, D feature size, W label vector size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

_LEAST_BOX_DEVIATION = 0.1  # of the root mean square deviation of the four coordinates


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the training images: mean and standard deviation of each component.

    Those of features and boxes are over the real regions of view 0.

    Attributes:
        feature_mean, feature_std: (D,) float32.
        box_mean, box_std: (4,) float32.
        whole_mean, whole_std: (D,) float32, of the vectors of whole views; None where the cache
            holds none.
        classes: one more than the largest class number of the detector.
    """

    feature_mean: Tensor
    feature_std: Tensor
    box_mean: Tensor
    box_std: Tensor
    whole_mean: Tensor | None
    whole_std: Tensor | None
    classes: int


class Inputs(nn.Module):
    """Standardise features, boxes and label vectors; the statistics are saved with the weights.

    Features and box coordinates get mean 0 and variance 1 over the real regions of the training
    split, each component by itself, and vectors of whole views over its whole views. A component
    that varies less than ``least_deviation`` times the root mean square deviation of all components
    is divided by that instead: a detector's features have components that are almost always 0, and
    dividing by their tiny deviation would make single regions stand out by a hundred. Label vectors
    are divided by the root mean square of all their components, which keeps their geometry.

    Args:
        feature_size: D.
        least_deviation: share of the root mean square deviation, for features.
        classes: one more than the largest class number of the detector. It is kept here, so that
            the network can be built again from its state.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    box_mean: Tensor
    box_scale: Tensor
    whole_mean: Tensor
    whole_scale: Tensor
    vector_scale: Tensor
    classes: Tensor

    def __init__(self, feature_size: int, least_deviation: float = 0.1, classes: int = 1) -> None:
        super().__init__()
        self.least_deviation = least_deviation
        for name, size in (("feature", feature_size), ("box", 4), ("whole", feature_size)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.register_buffer("vector_scale", torch.ones(()))
        self.register_buffer("classes", torch.tensor(classes))

    def set_statistics(
        self, statistics: InputStatistics, label_vectors: Tensor | None = None
    ) -> None:
        """Take the statistics of the training split.

        Args:
            statistics: of the images.
            label_vectors: (C, W); None if `vectors` is not used.
        """
        if label_vectors is not None:
            self.vector_scale.copy_(label_vectors.square().mean().rsqrt())
        one = statistics
        for name, mean, std, least in (
            ("feature", one.feature_mean, one.feature_std, self.least_deviation),
            ("box", one.box_mean, one.box_std, _LEAST_BOX_DEVIATION),
            ("whole", one.whole_mean, one.whole_std, self.least_deviation),
        ):
            if mean is not None and std is not None:
                cast(Tensor, getattr(self, f"{name}_mean")).copy_(mean)
                cast(Tensor, getattr(self, f"{name}_scale")).copy_(_inverse(std, least))

    def features(self, features: Tensor) -> Tensor:
        """Standardise features: (..., D) -> (..., D)."""
        return (features - self.feature_mean) * self.feature_scale

    def whole(self, whole: Tensor) -> Tensor:
        """Standardise vectors of whole views: (B, D) -> (B, D)."""
        return (whole - self.whole_mean) * self.whole_scale

    def boxes(self, boxes: Tensor) -> Tensor:
        """Standardise boxes: (..., 4) -> (..., 4)."""
        return (boxes - self.box_mean) * self.box_scale

    def vectors(self, vectors: Tensor) -> Tensor:
        """Scale label vectors: (C, W) -> (C, W)."""
        return vectors * self.vector_scale


def _inverse(std: Tensor, least: float) -> Tensor:
    floor = least * std.square().mean().sqrt()
    return 1 / torch.maximum(std, floor).clamp(min=1e-6)
