"""What a run's decisions do to its predictions: in memory, as rows, and as ONNX."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flows import Flow
from tiny import C, D, make_batch, make_head, make_label_set

from pipeline.decisions.decisions import Decisions
from pipeline.inference.export import INPUTS, CacheToScores
from pipeline.inference.formats import csv_writer, json_writer, label_rows
from pipeline.inference.trained import Prediction
from pipeline.learning.checkpoint import load_checkpoint, save_checkpoint
from pipeline.settings import DecisionSettings

LOGITS = np.array([1.0, -1.0, 3.0], dtype=np.float32)
NAMES = ("cat", "dog", "owl")
RUN: Any = SimpleNamespace(vocabulary=NAMES, class_name=lambda number: None)


def decisions(scale: list[float], shift: list[float], thresholds: list[float]) -> Decisions:
    labels = len(scale)
    return Decisions(
        *(np.array(values) for values in (scale, shift, thresholds)),
        *(np.zeros(labels, dtype=np.bool_) for _ in range(2)),
        *(np.zeros(labels, dtype=np.int64) for _ in range(2)),
    )


FITTED = decisions([1.0, 2.0, 0.5], [0.0, 4.0, -1.0], [1.5, -0.5, 0.0])
"""Calibrated, the logits are 1, 2 and 0.5: the first is under its threshold."""


def prediction(fitted: Decisions | None) -> Prediction:
    return Prediction(
        logits=LOGITS,
        scores=(1 / (1 + np.exp(-LOGITS))).astype(np.float32),
        regions=np.zeros(3, np.int64),
        region_scores=None,
        boxes=np.array([[0, 0, 1, 1]], np.float32),
        detector_scores=np.ones(1, np.float32),
        detector_classes=np.zeros(1, np.int64),
        size=(10, 10),
        decisions=fitted,
    )


def sigmoid(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def test_a_prediction_decides_as_the_run_fitted_it() -> None:
    plain, fitted = prediction(None), prediction(FITTED)
    assert plain.predicted.tolist() == [True, False, True]
    assert plain.order == [2, 0, 1]
    assert plain.thresholds.tolist() == [0.5] * 3
    assert plain.probabilities is plain.scores
    assert fitted.predicted.tolist() == [False, True, True]
    assert fitted.order == [1, 0, 2]
    assert fitted.probabilities == pytest.approx([sigmoid(x) for x in (1, 2, 0.5)])
    assert fitted.thresholds == pytest.approx([sigmoid(x) for x in (1.5, -0.5, 0)])
    assert np.array_equal(fitted.scores, plain.scores)


@pytest.mark.parametrize(
    ("threshold", "top", "predicted"),
    [
        (None, None, ["dog", "owl"]),
        (None, 1, ["dog"]),
        (0.7, None, ["dog", "cat"]),  # sigmoid(0.5) is 0.62
        (0.0, None, ["dog", "cat", "owl"]),
        (1.0, None, []),
    ],
)
def test_a_threshold_on_the_command_line_goes_before_the_fitted_ones(
    threshold: float | None, top: int | None, predicted: list[str]
) -> None:
    rows = label_rows(Path("a.png"), prediction(FITTED), RUN, threshold, top)
    assert [row["label"] for row in rows] == ["dog", "cat", "owl"]
    assert [row["label"] for row in rows if row["predicted"]] == predicted
    expected = {threshold} if threshold is not None else set(prediction(FITTED).thresholds.tolist())
    assert {row["threshold"] for row in rows} == expected


def test_files_say_score_probability_and_threshold() -> None:
    rows = label_rows(Path("a.png"), prediction(FITTED), RUN, None, None)
    as_json, as_csv = io.StringIO(), io.StringIO()
    for writer, stream in ((json_writer, as_json), (csv_writer, as_csv)):
        with writer(stream) as write:
            write(rows)
    [image] = json.loads(as_json.getvalue())
    for kept in (image["labels"][0], next(csv.DictReader(io.StringIO(as_csv.getvalue())))):
        assert kept["label"] == "dog"
        numbers = [float(kept[name]) for name in ("score", "probability", "threshold")]
        assert numbers == pytest.approx([sigmoid(x) for x in (-1, 2, -0.5)], abs=1e-6)


def exported(variant: str) -> tuple[CacheToScores, Decisions, Any]:
    """A head with decisions, as it is exported, and inputs."""
    fitted = decisions([1.5] * C, [0.25] * C, np.linspace(-1, 6, C).tolist())
    network = make_head(variant, dtype=torch.float32)
    model = CacheToScores(network, make_label_set(dtype=torch.float32), fitted).eval()
    batch = make_batch(4, 3, features=D, dtype=torch.float32)
    arrays = {name: getattr(batch, name) for name in INPUTS[:-1]}
    return model, fitted, {**arrays, "count": batch.mask.sum(dim=1)}


@torch.no_grad()
def test_the_exported_form_has_probabilities_and_decisions() -> None:
    model, fitted, arrays = exported("max-pool")
    results = dict(zip(model.outputs, model(**arrays), strict=True))
    scores = results["image_scores"].double()
    logits = (scores / (1 - scores)).log().numpy()
    calibrated = 1.5 * logits + 0.25
    np.testing.assert_allclose(results["probabilities"], 1 / (1 + np.exp(-calibrated)), atol=1e-5)
    chosen = results["predicted"].numpy()
    assert np.array_equal(chosen, calibrated > fitted.thresholds)
    assert 0 < chosen.mean() < 1
    plain = CacheToScores(model.network, make_label_set(dtype=torch.float32))
    assert plain.outputs == model.outputs[:-2]
    assert len(plain(**arrays)) == len(plain.outputs)


def test_the_printed_table_says_that_it_shows_probabilities(made: Flow, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "runs/tiny/full-s0", tmp_path / "full-s0"))
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    labels = len(checkpoint.vocabulary)
    fitted = decisions([1.0] * labels, [3.0] * labels, [0.0] * labels)
    settings = checkpoint.settings.model_copy(
        update={"decisions": DecisionSettings(calibration="temperature"), "validation": 0.2}
    )
    fitting = replace(checkpoint, settings=settings, decisions=fitted)
    save_checkpoint(run / "checkpoint.pt", fitting)
    words = ("predict", "data/tiny/prepared/images/test-00000.png", "--run", str(run))
    words += ("--detector", "data/tiny/detector")
    table = made.ok(*words, "--threshold", "0", "--top", "1").splitlines()
    assert table[0].split() == ["|", "image", "|", "label", "|", "probability", "|"]
    best = json.loads(made.ok(*words, "--json"))[0]["labels"][0]
    assert best["score"] < best["probability"]
    assert table[2].split()[-2] == f"{best['probability']:.3f}"
