"""Runs with fitted decisions: what they are fitted on, where they are kept, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from flows import Flow
from pydantic import ValidationError
from toys import LABELS, N_TRAIN, make_checkout
from trainings import float_batch, rewritten

from pipeline.datasets.manifest import read_manifest
from pipeline.decisions.fitting import fit_decisions
from pipeline.errors import DamagedError
from pipeline.inference.export import INPUTS
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import open_split, split_validation
from pipeline.settings import DecisionSettings, TrainSettings
from pipeline.shards.reader import RegionCache

DECISIONS = {"thresholds": "f1", "calibration": "platt"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A checkout with a run that fitted decisions, and was evaluated; to be read only."""
    folder = tmp_path_factory.mktemp("decided")
    flow = make_checkout(folder, validation=0.5, epochs=1, decisions=DECISIONS)
    said = flow.gmpipe("train")
    assert said.code == 0, said.err
    (flow / "said").write_text(said.err)
    assert re.search(r"mAP \d+\.\d\d, OF1 .*, decided OF1 \d+\.\d\d", flow.ok("evaluate"))
    return flow


def checkpoint_file(flow: Flow) -> Path:
    return flow / "runs/toy/full-s0/checkpoint.pt"


def test_they_are_fitted_on_the_images_that_validate(checkout: Flow) -> None:
    found = load_checkpoint(checkpoint_file(checkout))
    manifest = read_manifest(checkout / "data/toy/prepared/manifest.parquet")
    whole = open_split(RegionCache.open(checkout / "cache/toy"), manifest, "train", 2)
    _, validation = split_validation(whole, 0.5, 0)
    assert len(validation) == round(0.5 * N_TRAIN)
    logits = Scorer.of_checkpoint(found, "the run").predict(validation).logits
    expected = fit_decisions(logits, validation.truth, DecisionSettings.model_validate(DECISIONS))
    assert found.decisions is not None
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(found.decisions, name), value), name
    assert found.decisions.positives.tolist() == (validation.truth == 1).sum(axis=0).tolist()


def test_labels_that_share_what_all_have_are_named(checkout: Flow) -> None:
    found = load_checkpoint(checkpoint_file(checkout)).decisions
    assert found is not None
    said = (checkout / "said").read_text()
    for what, own in (("threshold", found.own_threshold), ("calibration", found.own_calibration)):
        [named] = re.findall(rf"Note: labels without a {what} of their own: (.*?)\.", said)
        assert named.split(", ") == [LABELS[label] for label in np.flatnonzero(~own)]


def test_a_precision_that_all_labels_together_never_reach_is_said(tmp_path: Path) -> None:
    decisions = {"thresholds": "precision", "precision": 0.97}
    flow = make_checkout(tmp_path, validation=0.5, epochs=1, decisions=decisions)
    with mock.patch("pipeline.decisions.fitting.lowest_reaching", return_value=None):
        said = flow.gmpipe("train").err
    [note] = re.findall(rf"Note: .*threshold of their own: {', '.join(LABELS)}\. (.*)", said)
    assert "0.5," in note
    assert "0.97" in note
    assert "share" not in note
    found = load_checkpoint(checkpoint_file(flow)).decisions
    assert found is not None
    assert set(found.probabilities.tolist()) == {0.5}


def test_metrics_stand_beside_those_at_a_half(checkout: Flow) -> None:
    stored = json.loads((checkout / "runs/toy/full-s0/metrics.json").read_text())
    assert stored["decided"].keys() == stored["top3"].keys()
    assert stored["calibration_error"].keys() == {
        "before", "after", "before_by_label", "after_by_label"
    }  # fmt: skip
    assert "damaged" not in checkout.ok("verify")


def test_a_run_without_them_has_none_in_its_checkpoint(tmp_path: Path) -> None:
    flow = make_checkout(tmp_path, epochs=1)
    flow.ok("train")
    content = torch.load(checkpoint_file(flow), weights_only=True)
    assert "decisions" not in content
    assert load_checkpoint(checkpoint_file(flow)).decisions is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"validation": 0}, ["thresholds", "`f1`", "calibration", "`platt`", "validation: 0.2`"]),
        ({"decisions.precision": 1.5}, ["train.toy.decisions.precision", "1.5", "1"]),
        ({"decisions.precision": 0}, ["train.toy.decisions.precision", "0"]),
        ({"decisions.thresholds": "best"}, ["train.toy.decisions.thresholds", "best", "'f1'"]),
        ({"decisions.precision": 0.8}, ["train.toy.decisions", "`precision` is 0.8", "`f1`"]),
        (
            {"loss": "{name: softmax-squared}", "decisions": "{calibration: temperature}"},
            ["train.toy.decisions", "`softmax-squared`", "`thresholds: common`", "`platt`"],
        ),
        (
            {"network.head": "pla", "loss.name": "own"},
            ["train.toy.decisions", "`pla`", "thresholds: fixed", "calibration: none"],
        ),
    ],
)
def test_bad_settings_are_refused_before_any_training(
    checkout: Flow, changes: dict[str, Any], parts: list[str]
) -> None:
    before = checkpoint_file(checkout).stat().st_mtime_ns
    sets = [
        word for key, value in changes.items() for word in ("--set", f"train.toy.{key}={value}")
    ]
    outcome = checkout.gmpipe("train", *sets)
    assert outcome.code == 1
    message = outcome.err[outcome.err.index("Error: ") :]
    assert not [part for part in parts if part not in message], message
    assert checkpoint_file(checkout).stat().st_mtime_ns == before
    assert len(list((checkout / "runs/toy").glob("*/checkpoint.pt"))) == 1


@pytest.mark.parametrize("calibration", ["none", "temperature", "platt"])
@pytest.mark.parametrize("thresholds", ["fixed", "common", "f1", "precision"])
def test_scores_that_only_rank_need_a_threshold_or_a_shift(
    calibration: str, thresholds: str
) -> None:
    decisions = {"calibration": calibration, "thresholds": thresholds}
    block = {"loss": {"name": "softmax-squared"}, "decisions": decisions}
    if (calibration, thresholds) == ("temperature", "fixed"):
        with pytest.raises(ValidationError, match="softmax-squared"):
            TrainSettings.model_validate(block)
    else:
        TrainSettings.model_validate(block)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)),
        ("shift", torch.zeros(2, dtype=torch.float64)),
        ("thresholds", torch.full((3,), torch.nan, dtype=torch.float64)),
        ("positives", torch.ones(3)),
        ("own_threshold", None),
    ],
)
def test_decisions_that_do_not_fit_are_damage(
    checkout: Flow, tmp_path: Path, name: str, value: torch.Tensor | None
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint_file(checkout).read_bytes())
    content = torch.load(path, weights_only=True)["decisions"]
    rewritten(path, decisions={**content, name: value})
    with pytest.raises(DamagedError, match="decisions"):
        load_checkpoint(path)


def test_decisions_that_no_setting_asks_for_are_damage(checkout: Flow, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint_file(checkout).read_bytes())
    settings = torch.load(path, weights_only=True)["settings"]
    del settings["decisions"]
    rewritten(path, settings=settings)
    with pytest.raises(DamagedError, match="decisions"):
        load_checkpoint(path)


@pytest.mark.slow
def test_the_onnx_file_decides_as_the_run_does(checkout: Flow) -> None:
    checkout.ok("train", "--variant", "max-pool")
    checkout.ok("export", "--run", "runs/toy/max-pool-s0", "-o", "model.onnx")
    session = onnxruntime.InferenceSession(checkout / "model.onnx")
    found = load_checkpoint(checkout / "runs/toy/max-pool-s0/checkpoint.pt")
    manifest = read_manifest(checkout / "data/toy/prepared/manifest.parquet")
    split = open_split(RegionCache.open(checkout / "cache/toy"), manifest, "train")
    batch = float_batch(split, np.arange(len(split)))
    arrays = {name: getattr(batch, name).numpy() for name in INPUTS[:-1]}
    arrays["classes"] = arrays["classes"].astype(np.int64)
    *_, probabilities, chosen = session.run(
        None, {**arrays, "count": batch.mask.sum(dim=1).numpy()}
    )
    logits = Scorer.of_checkpoint(found, "the run").predict(split).logits
    assert found.decisions is not None
    expected = 1 / (1 + np.exp(-found.decisions.calibrated(logits)))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    sure = np.abs(expected - found.decisions.probabilities) > 1e-4
    assert np.array_equal(chosen[sure], found.decisions.predicted(logits)[sure])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["thresholds"]) == found.decisions.probabilities.tolist()
    assert json.loads(metadata["scale"]) == found.decisions.scale.tolist()
