"""The settings of the baseline without a graph."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.settings.heads import RECIPE, RegionSettings


class MaxPoolSettings(RegionSettings):
    """An MLP on each region's feature and box, then the maximum over the regions."""

    head: Literal["max-pool"] = "max-pool"
    hidden_size: int = Field(256, ge=1, description="Size of the MLP's hidden layer.")
    boxes: bool = Field(True, description="Read the coordinates of each box, too.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the hidden layer.")


VARIANTS: dict[str, dict[str, Any]] = {
    "max-pool": {
        **RECIPE,
        "network": {"head": "max-pool", "least_deviation": 1.0, "dropout": 0.2},
    },
}
