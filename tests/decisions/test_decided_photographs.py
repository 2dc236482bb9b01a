"""Decisions on real regions and labels: VOC 2007's official split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flows import Flow
from ruamel.yaml import YAML

from pipeline.learning.checkpoint import load_checkpoint

PARAMS: dict[str, Any] = {
    "datasets": ["voc"],
    "variants": ["linear-scores"],
    "seeds": [0],
    "prepare": {"voc": {"source": "imported"}},
    "detector": {"voc": {"source": "imported"}},
    "extract": {"voc": {"regions": 10}},
    "train": {
        "voc": {
            "validation": 0.2,
            "decisions": {"thresholds": "f1", "calibration": "platt"},
            "variants": {"linear-scores": {"epochs": 2, "loss": {"name": "asymmetric"}}},
        }
    },
}


@pytest.mark.slow
def test_scores_of_another_loss_are_calibrated_and_decided(shared: Path, tmp_path: Path) -> None:
    """The asymmetric loss shifts scores, so that 0.5 is no good threshold."""
    with (tmp_path / "params.yaml").open("w") as stream:
        YAML().dump(PARAMS, stream)
    flow = Flow(tmp_path)
    flow.ok("import-regions", str(shared / "data/voc2007-official/regions.npz"))
    flow.ok("train", "--variant", "linear-scores")
    flow.ok("evaluate", "--variant", "linear-scores")
    run = flow / "runs/voc/linear-scores-s0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["decided"]["CF1"] > metrics["CF1"]
    assert metrics["decided"]["OF1"] > metrics["OF1"]
    error = metrics["calibration_error"]
    assert error["after"] < error["before"] / 2
    fitted = load_checkpoint(run / "checkpoint.pt").decisions
    assert fitted is not None
    assert np.isclose(fitted.positives + fitted.negatives, 1002, atol=100).all()  # some are ignored
    assert fitted.own_threshold.all()
