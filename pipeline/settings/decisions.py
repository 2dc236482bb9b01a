"""The block `train.NAME.decisions`: how the scores of a trained network become decisions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.settings.blocks import Settings


class DecisionSettings(Settings):
    """How scores become decisions: calibration first, then thresholds, fitted after the training.

    Both are fitted on the images that validate the training, never on the test split.
    """

    thresholds: Literal["fixed", "common", "f1", "precision"] = Field(
        "fixed",
        description="Which probability a predicted label must exceed. `fixed`: 0.5. `common`: one "
        "for all labels, with the best OF1. `f1`: for each label the one with its best F1. "
        "`precision`: for each label the lowest one that reaches `precision`.",
    )
    precision: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Precision that thresholds of the kind `precision` reach. No other kind takes "
        "one.",
    )
    calibration: Literal["none", "temperature", "platt"] = Field(
        "none",
        description="How scores become probabilities. `none`: by the sigmoid. `temperature`: after "
        "division by a number for all labels. `platt`: after a scale and a shift for each label.",
    )

    @property
    def fitted(self) -> bool:
        """Whether there is something to fit."""
        return self.thresholds != "fixed" or self.calibration != "none"
