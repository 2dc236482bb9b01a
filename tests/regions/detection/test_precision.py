"""Features in other precisions, and what a GPU is asked for, as far as can be seen without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import TINY, draw_scenes, tiny_model
from builders import S as SIDE
from lively import CLASSES, NARROW, S, narrow_model, soft_noise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection import FasterRCNN

from pipeline.datasets.scenes import KINDS
from pipeline.regions import choosing, extraction
from pipeline.regions.detection import (
    convolve,
    describe,
    detect,
    find,
    prepare_for_extraction,
)
from pipeline.regions.detector import build_model, write_detector
from pipeline.regions.extraction import ShardExtractor, load_detector
from pipeline.regions.given_boxes import GivenRegions
from pipeline.regions.plan import ViewJob
from pipeline.regions.pooling import LevelPool
from pipeline.settings import ExtractSettings, Precision
from pipeline.tensors import computing_in


@pytest.fixture(scope="module")
def model() -> FasterRCNN:
    return narrow_model()


# Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "slack"), [("bfloat16", 0.5), ("float16", 0.1)])
def test_features_differ_by_the_precision_and_boxes_stay_in_float32(
    model: FasterRCNN, precision: Precision, slack: float
) -> None:
    """Fifty random layers amplify rounding far more than layers that were trained."""
    views = soft_noise(2, seed=2)
    ours = prepare_for_extraction(model, precision)
    kinds = {name: parameter.dtype for name, parameter in ours.named_parameters()}
    low = {name for name, kind in kinds.items() if kind == getattr(torch, precision)}
    assert low == {name for name in kinds if "box_predictor" not in name}
    for detections in detect(ours, views):
        for part in (detections.boxes, detections.scores, detections.features):
            assert part.dtype == torch.float32
    convolved = convolve(ours, views)
    whole = find(ours, convolved, whole=True).whole
    exact = prepare_for_extraction(model)
    expected = find(exact, convolve(exact, views), whole=True).whole
    assert whole is not None
    assert expected is not None
    deviation = ((whole - expected).norm(dim=1) / expected.norm(dim=1)).max()
    assert slack / 50 < deviation < slack


def test_tf32_is_float32_on_a_cpu(model: FasterRCNN) -> None:
    views = soft_noise(2, seed=2)
    pairs = zip(
        detect(prepare_for_extraction(model), views),
        detect(prepare_for_extraction(model, "tf32"), views),
        strict=True,
    )
    for one, other in pairs:
        assert torch.equal(one.features, other.features)


@pytest.fixture(params=[(True, False), (False, True)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """Whether convolutions and products are rounded to TF32 before the test."""
    former = allowed_tf32()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = former


def allowed_tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_products_are_rounded_to_tf32_only_where_it_was_asked_for(
    before: tuple[bool, bool],
) -> None:
    """torch itself rounds in convolutions, unless it is told not to."""
    wanted: dict[Precision, bool] = {"float32": False, "tf32": True, "bfloat16": False}
    for precision, allowed in wanted.items():
        with computing_in(precision):
            assert allowed_tf32() == (allowed, allowed)
        assert allowed_tf32() == before
    with pytest.raises(KeyError), computing_in("tf32"):
        raise KeyError
    assert allowed_tf32() == before


# On an accelerator ---------------------------------------------------------------------------


class StandInPool(nn.Module):
    """Pools nothing: which boxes belong to a level depends on the boxes."""

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _: Any) -> Tensor:
        return torch.cat(boxes).new_zeros(sum(map(len, boxes)), maps["0"].shape[1], 7, 7)


def convert(module: nn.Module, dtype: torch.dtype | None = None, **_: Any) -> None:
    """`Module.to`, which can't convert fake tensors."""
    for part in module.modules() if dtype else ():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_is_not_waited_for_where_nothing_depends_on_numbers(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """Fake tensors refuse to mix devices, and to be read: `tolist`, `nonzero`, boolean indexing.

    What depends on numbers is left out: the rounds of the suppression, and the levels of boxes.
    """
    monkeypatch.setattr(choosing, "survive", lambda boxes, scores, valid, *_, **__: valid)
    monkeypatch.setattr(choosing, "_EXAMINED", 300 * CLASSES)
    monkeypatch.setattr(copy, "deepcopy", lambda model: model)  # fake tensors can't be copied
    monkeypatch.setattr(nn.Module, "to", convert)
    with FakeTensorMode(), torch.device("cuda"):
        model = build_model(
            NARROW, CLASSES, size=S, regions=10, score_threshold=0, nms_threshold=0.5
        ).eval()
        ours = prepare_for_extraction(model, precision)
        assert isinstance(ours.roi_heads.box_roi_pool, LevelPool)
        ours.roi_heads.box_roi_pool = StandInPool()
        for _ in range(2):  # anchors are made for the first batch only
            convolved = convolve(ours, torch.empty(3, 3, S, S))
            found = find(ours, convolved, whole=True)
        given = GivenRegions(np.zeros((4, 4)), np.zeros(4, np.float32), np.zeros(4, np.int16))
        described = describe(ours, convolved, [given] * 3, whole=True)
    for batch, m in ((found, 10), (described, 4)):
        assert batch.whole is not None
        for part, shape in (
            (batch.boxes, (3, m, 4)),
            (batch.scores, (3, m)),
            (batch.classes, (3, m)),
            (batch.features, (3, m, NARROW.feature_size)),
            (batch.count, (3,)),
            (batch.whole, (3, NARROW.feature_size)),
        ):
            assert (part.device.type, part.shape) == ("cuda", shape)


# Extraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_a_precision_is_that_of_the_whole_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    scenes = draw_scenes(tmp_path)
    settings = ExtractSettings(size=SIDE, regions=6, precision=precision)
    classes = ("background", *KINDS)
    description = write_detector(
        tmp_path, tiny_model().state_dict(), source="fit", architecture=TINY, classes=classes
    )
    model, allowed = load_detector(tmp_path, description, settings), []
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert model.roi_heads.box_head.fc6.weight.dtype == kind

    def noted(*args: Any, **options: Any) -> Any:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return find(*args, **options)

    monkeypatch.setattr(extraction, "find", noted)
    jobs = [ViewJob(image.image_id, str(image.path), 0) for image in scenes.annotated[:3]]
    rows, _, _ = ShardExtractor(model, settings, threads=1).detect(jobs, tmp_path)
    assert rows is not None
    rows.check()
    assert allowed == [precision == "tf32"]
