"""Runs and detectors that compute nan or infinity are refused, never shown."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import write_other_weights
from flows import Flow
from PIL import Image

from pipeline.api import TrainedRun, explain, load_run
from pipeline.errors import DamagedError
from pipeline.inference import trained
from pipeline.learning.checkpoint import load_checkpoint, save_checkpoint
from pipeline.learning.prediction import NotFinite
from pipeline.regions.detector import read_description
from pipeline.shards.schema import RegionRows

RUN = "runs/tiny/full-s0"
TENSOR = "decoder.mlp.second.bias"


def damage(folder: Path, values: dict[str, float]) -> None:
    """Fill tensors of a run's network with a number."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    changes = {key: torch.full_like(checkpoint.state[key], values[key]) for key in values}
    state = {**checkpoint.state, **changes}
    save_checkpoint(folder / "checkpoint.pt", replace(checkpoint, state=state))


def photograph(made: Flow) -> Path:
    return next((made / "data/tiny").rglob("*.png"))


def test_commands_refuse_a_run_whose_scores_are_not_finite(flow: Flow) -> None:
    damage(flow / RUN, {"decoder.mlp.first.bias": 1e38, "decoder.mlp.second.weight": 3e38})
    image = str(photograph(flow).relative_to(flow.folder))
    label = load_checkpoint(flow / RUN / "checkpoint.pt").vocabulary[0]
    before = flow.bytes(RUN)
    score = rf"full-s0: .*'{image}'.*'{label}'.*gmpipe train\b"
    for form in ([], ["--csv"], ["--json"], ["-o", "labels.csv"]):
        assert flow.gmpipe("predict", image, "--run", RUN, *form).refused(score)
    assert flow.gmpipe("explain", image, "--run", RUN, "-o", "why.png").refused(score)
    assert flow.gmpipe("evaluate").refused(
        rf"{RUN}: .*'{label}'.*gmpipe train --dataset tiny.*gmpipe cache verify "
    )
    assert not any((flow / name).exists() for name in ("labels.csv", "why.png"))
    assert flow.bytes(RUN) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_commands_refuse_a_run_whose_weights_are_not_finite(flow: Flow, value: float) -> None:
    damage(flow / RUN, {TENSOR: value})
    image = str(photograph(flow).relative_to(flow.folder))
    for command in (
        ("predict", image, "--run", RUN),
        ("explain", image, "--run", RUN, "-o", "why.png"),
        ("export", "--run", RUN, "-o", "model.onnx"),
        ("evaluate",),
    ):
        assert flow.gmpipe(*command).refused(rf"{RUN}/checkpoint\.pt .*{TENSOR}.*gmpipe train\b")
    assert not any((flow / name).exists() for name in ("why.png", "model.onnx"))


@pytest.fixture(scope="module")
def run(made: Flow) -> TrainedRun:
    return load_run(made / RUN)


def changed(run: TrainedRun) -> TrainedRun:
    """A copy of a run, to be changed."""
    again = copy.copy(run)
    again.network, again.detector = copy.deepcopy(run.network), copy.deepcopy(run.detector)
    return again


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_in_memory(made: Flow, run: TrainedRun, value: float) -> None:
    broken = changed(run)
    broken.network.state_dict()[TENSOR][0] = value
    image = Image.open(photograph(made))
    with pytest.raises(NotFinite, match=rf"full-s0: .*image '0'.*'{run.vocabulary[0]}'.*{TENSOR}"):
        broken.predict([image, image])
    with pytest.raises(NotFinite, match=TENSOR):
        explain(broken, image)


def test_the_image_with_the_score_is_named(made: Flow, run: TrainedRun) -> None:
    """The second image of the second batch."""
    broken, calls = changed(run), 0

    def hook(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            logits[1, 0, 2] = torch.inf
        return logits

    broken.network.register_forward_hook(hook)
    with pytest.raises(NotFinite, match=rf"image '4'.*'{run.vocabulary[2]}'.*too large"):
        broken.predict([Image.open(photograph(made))] * 5, batch_size=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_features_of_the_detector(made: Flow, run: TrainedRun, value: float) -> None:
    """1e30 is finite, but not in float16, the type of the run's regions."""
    broken = changed(run)
    with torch.no_grad():
        broken.detector.roi_heads.box_head.fc7.bias[0] = value
    path = photograph(made)
    with pytest.raises(NotFinite, match=rf"full-s0: .*features of image '{path}'.*region 0"):
        list(broken.predict_files([path]))
    with pytest.raises(NotFinite, match=r"features of image '0'"):
        explain(broken, Image.open(path))


def test_the_vector_of_the_whole_view(
    made: Flow, run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = trained.fill_rows

    def filled(rows: RegionRows, *arguments: Any) -> None:
        fill(rows, *arguments)
        assert rows.whole is not None
        rows.whole[1, 3] = np.inf

    monkeypatch.setattr(trained, "fill_rows", filled)
    with pytest.raises(NotFinite, match=r"full-s0: .*the whole view of image '1'"):
        run.predict([Image.open(photograph(made))] * 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["roi_heads.box_predictor.cls_score.bias", "rpn.head.bbox_pred.bias"]
)
def test_weights_of_the_detector(flow: Flow, name: str, value: float) -> None:
    """With nan for a class's score, it would find nothing, and the whole image be a region."""
    folder = flow / "data/tiny/detector"
    write_other_weights(folder, folder, name, lambda weights: weights[1].fill_(value))
    # As if the run had been trained with this detector.
    checkpoint = load_checkpoint(flow / RUN / "checkpoint.pt")
    recipe = {**checkpoint.recipe, "weights_sha256": read_description(folder).weights_sha256}
    save_checkpoint(flow / RUN / "checkpoint.pt", replace(checkpoint, recipe=recipe))
    with pytest.raises(DamagedError, match=rf"weights\.pt.*{name}"):
        load_run(flow / RUN)
    image = str(photograph(flow))
    assert flow.gmpipe("predict", image, "--run", RUN).refused(
        rf"weights\.pt.*{name}.*gmpipe detector --dataset tiny"
    )
