"""A split `val` with difficult labels, through the whole flow."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from flows import Flow
from small import TEST, TRAIN, make_small

HELD_OUT = 10
SPLITS = np.array(["train"] * (TRAIN - HELD_OUT) + ["val"] * HELD_OUT + ["test"] * TEST)


def run(flow: Flow, split: str, treatment: str) -> float:
    """Train, and return the mAP of the held out images, which are the split ``split``."""
    sets = ("--set", f"prepare.voc2007.difficult.{split}={treatment}")
    flow.ok("import-regions", "regions.npz", *sets)
    flow.ok("train", *sets)
    folder = flow / "runs/voc2007/full-s0"
    if split == "val":
        with (folder / "history.csv").open(newline="") as stream:
            return float(list(csv.DictReader(stream))[-1]["validation_mAP"])
    flow.ok("evaluate", *sets)
    return float(json.loads((folder / "metrics.json").read_text())["mAP"])


@pytest.mark.slow
def test_difficult_labels_of_the_split_count_as_the_setting_says(tmp_path: Path) -> None:
    """The same images as the split `test` of the same training have the same mAP."""
    flow = make_small(tmp_path / "val")
    with np.load(flow / "regions.npz") as stored:
        arrays = dict(stored)
    rng = np.random.default_rng(5)
    held = SPLITS == "val"
    difficult = held[:, None] & (rng.random(arrays["labels"].shape) < 0.3)
    arrays["labels"][difficult] = 0
    arrays["split"] = SPLITS
    np.savez(flow / "regions.npz", **arrays)
    tested = make_small(tmp_path / "test")
    kept = {name: one[:TRAIN] for name, one in arrays.items() if len(one) == TRAIN + TEST}
    kept["split"] = np.where(SPLITS == "val", "test", SPLITS)[:TRAIN]
    np.savez(tested / "regions.npz", **{**arrays, **kept})
    tested.ok("import-regions", "regions.npz", "--replace")
    found = set()
    for treatment in ("ignored", "positive", "negative"):
        score = run(flow, "val", treatment)
        assert score == pytest.approx(run(tested, "test", treatment), abs=1e-6)
        found.add(round(score, 3))
    assert len(found) == 3
