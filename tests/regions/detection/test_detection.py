"""`detect` gives what torchvision's own model gives, whether prepared for extraction or not.

Letters: B images of a batch, S side of a view in pixels, n boxes, K classes including the
background.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lively import CLASSES, NARROW, S, disturbed, generator, narrow_model, soft_noise
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from benchmarks.extraction import enliven
from pipeline.regions import pooling
from pipeline.regions.detection import (
    Detections,
    detect,
    prepare_for_extraction,
    trained_faster,
)
from pipeline.regions.detector import build_model, fit_state
from pipeline.regions.pooling import LevelPool, TapsPool
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings


@pytest.fixture(scope="module", params=["frozen", "batch"])
def model(request: pytest.FixtureRequest) -> FasterRCNN:
    return narrow_model(request.param)


def photographs(shared: Path, images: int, size: int) -> Tensor:
    """Return views of real photographs, (images, 3, size, size)."""
    paths = sorted((shared / "data/voc2007-sample").rglob("*.jpg"))[:images]
    views = [
        view_of(load_image(path), 0, size=size, image_id=path.stem, seed=0, flip=False)
        for path in paths
    ]
    return torch.stack([to_tensor(view) for view in views])


def check_same(
    detections: list[Detections],
    expected: list[dict[str, Tensor]],
    size: int,
    *,
    slack: float = 1e-4,
) -> None:
    """Check for boxes within 0.05 pixel, equal classes, and scores within ``slack``; rows whose
    scores are closer than that may be swapped."""
    assert len(detections) == len(expected)
    for ours, theirs in zip(detections, expected, strict=True):
        assert len(ours.scores) == len(theirs["scores"]) > 0
        assert (ours.scores - theirs["scores"]).abs().max() <= slack
        assert (ours.scores[1:] <= ours.scores[:-1]).all()
        free = list(range(len(ours.scores)))
        for box, score, label in zip(
            theirs["boxes"], theirs["scores"], theirs["labels"], strict=True
        ):
            match = next(
                row
                for row in free
                if ours.classes[row] == label
                and (ours.scores[row] - score).abs() <= slack
                and (ours.boxes[row] * size - box).abs().max() <= 0.05
            )
            free.remove(match)


@torch.inference_mode()
def check_features(detections: list[Detections], theirs: FasterRCNN, views: Tensor) -> None:
    """Check that each feature is what torchvision's box head computes at the stored box, within
    1e-3 of its norm."""
    images, _ = theirs.transform(list(views))
    heads = theirs.roi_heads
    pooled = heads.box_roi_pool(
        theirs.backbone(images.tensors),
        [image.boxes * views.shape[-1] for image in detections],
        images.image_sizes,
    )
    expected = heads.box_head(pooled)
    error = (torch.cat([image.features for image in detections]) - expected).norm(dim=1)
    assert (error <= 1e-3 * expected.norm(dim=1)).all()
    assert (expected.norm(dim=1) > 0).all()


# Detecting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_detections_are_torchvisions(model: FasterRCNN, threshold: float) -> None:
    """In batches of one and of several images, and with or without preparation."""
    theirs = copy.deepcopy(model)
    theirs.roi_heads.score_thresh = threshold
    prepared = prepare_for_extraction(theirs)
    classes: set[int] = set()
    for views in (soft_noise(3, seed=2), torch.rand(3, 3, S, S, generator=generator(3))):
        with torch.inference_mode():
            expected = theirs(list(views))
        for ours in (theirs, prepared):
            for batch in (1, 3):
                detections = [image for some in views.split(batch) for image in detect(ours, some)]
                check_same(detections, expected, S)
                check_features(detections, theirs, views)
                classes |= {number for image in detections for number in image.classes.tolist()}
    assert len(classes) > 3


def test_detections_on_photographs_are_torchvisions(model: FasterRCNN, shared: Path) -> None:
    views = photographs(shared, 8, S)
    ours = prepare_for_extraction(model)
    for some in views.split(5):
        with torch.inference_mode():
            expected = model(list(some))
        detections = detect(ours, some)
        check_same(detections, expected, S)
        check_features(detections, model, some)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_detections_of_the_full_network_are_torchvisions(norm: str, shared: Path) -> None:
    """The weights of torchvision's `fasterrcnn_resnet50_fpn` are loaded into our model."""
    size, options = 448, {"box_nms_thresh": 0.5, "box_detections_per_img": 10}
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=size, max_size=size, **options
    ).eval()
    if norm == "frozen":  # as its COCO weights have it
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    views = torch.cat([photographs(shared, 2, size), soft_noise(1, size, seed=2)])
    enliven(theirs, views, disturbed())
    state = theirs.state_dict()
    if norm == "frozen":
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for threshold in (0.0, 0.05):
        model = build_model(
            ArchitectureSettings.model_validate({"norm": norm}),
            91,
            size=size,
            regions=10,
            score_threshold=threshold,
            nms_threshold=0.5,
        )
        fit_state(model, dict(state), Path("theirs"))
        ours = prepare_for_extraction(model.eval())
        theirs.roi_heads.score_thresh = threshold
        for some in (views, views[:1]):
            with torch.inference_mode():
                expected = theirs(list(some))
            detections = detect(ours, some)
            # Fifty random layers amplify rounding: torchvision itself is 3e-5 off double precision.
            check_same(detections, expected, size, slack=3e-4)
            check_features(detections, theirs, some)


def test_a_view_without_detections_has_the_whole_view_as_its_region(model: FasterRCNN) -> None:
    ours = prepare_for_extraction(model)
    views = soft_noise(3, seed=2)
    best = sorted(image.scores[0].item() for image in detect(ours, views))
    ours.roi_heads.score_thresh = (best[0] + best[1]) / 2
    detections = detect(ours, views)
    [empty] = [image for image in detections if image.scores[0] == 0]
    assert (empty.boxes.tolist(), empty.classes.tolist()) == ([[0, 0, 1, 1]], [0])
    assert sum(image.scores[0].item() in best for image in detections) == 2
    check_features(detections, model, views)


# Preparing -----------------------------------------------------------------------------------


def test_folding_removes_every_norm_and_changes_nothing(model: FasterRCNN) -> None:
    views = soft_noise(2, seed=4).double()
    theirs = copy.deepcopy(model).double()
    ours = prepare_for_extraction(theirs)
    assert not any(isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d) for m in ours.modules())
    with torch.inference_mode():
        for level, expected in zip(
            ours.backbone(views).values(), theirs.backbone(views).values(), strict=True
        ):
            # FrozenBatchNorm2d takes its root in single precision.
            torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-5)


def test_a_prepared_copy_is_still_torchvisions_model(model: FasterRCNN) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = prepare_for_extraction(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert ours.roi_heads.box_head.fc7.out_features == NARROW.feature_size
    views = soft_noise(2, seed=2)
    again = prepare_for_extraction(ours)
    with torch.inference_mode():
        expected = model(list(views))
        for other in (ours, again):
            for image, one in zip(other(list(views)), expected, strict=True):
                torch.testing.assert_close(image["boxes"], one["boxes"], atol=0.05, rtol=0)
                torch.testing.assert_close(image["scores"], one["scores"], atol=1e-4, rtol=0)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_model_in_training_mode_is_refused(model: FasterRCNN) -> None:
    with pytest.raises(ValueError, match=r"eval\(\)"):
        prepare_for_extraction(copy.deepcopy(model).train())


def test_views_that_torchvision_would_pad_are_refused() -> None:
    model = build_model(
        NARROW, CLASSES, size=48, regions=5, score_threshold=0, nms_threshold=0.5
    ).eval()
    with pytest.raises(ValueError, match=r"\b48\b.*\b32\b"):
        detect(model, torch.rand(1, 3, 48, 48))


# Pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TapsPool, LevelPool])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_is_roi_align(kind: type[TapsPool | LevelPool], channels_last: bool) -> None:
    maps = {
        name: torch.randn(2, 5, S >> shift, S >> shift, generator=generator(shift))
        for name, shift in (("0", 2), ("1", 3), ("2", 4), ("3", 5), ("pool", 6))
    }
    if channels_last:
        maps = {name: m.contiguous(memory_format=torch.channels_last) for name, m in maps.items()}
    corners = torch.rand(400, 2, 2, generator=generator(0)) * 1.4 * S - 0.2 * S
    boxes = corners.sort(dim=1).values.flatten(1).clamp(0, S)
    at_the_edge = torch.tensor(
        [[0, 0, S, S], [S, S, S, S], [S - 0.01, 3, S, 3.01], [0, 0, 0, 0], [0, S - 1, 1, S]]
    )
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    ours = kind(theirs)
    for batch in ([boxes, at_the_edge], [at_the_edge[:0], boxes[:7]], [boxes[:0], boxes[:0]]):
        expected = theirs(maps, batch, [(S, S)] * 2)
        pooled = ours(maps, batch, [(S, S)] * 2)
        assert pooled.shape == expected.shape
        torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-5)


def test_training_is_torchvisions_and_leaves_the_model_as_it_was(model: FasterRCNN) -> None:
    """The losses, and the gradient of every parameter, of one step."""
    theirs = copy.deepcopy(model).train().double()
    ours = copy.deepcopy(theirs)
    views = list(soft_noise(2, seed=2).double())
    boxes = torch.tensor([[10.0, 20, 60, 90], [50, 40, 120, 70]]).double()
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2

    def losses(of: FasterRCNN) -> dict[str, Tensor]:
        torch.manual_seed(0)  # anchors and proposals to learn from are sampled
        of_step: dict[str, Tensor] = of(views, targets)
        torch.stack(list(of_step.values())).sum().backward()
        return of_step

    expected = losses(theirs)
    pool, strides = ours.roi_heads.box_roi_pool, [p.stride() for p in ours.parameters()]
    with trained_faster(ours):
        assert ours.roi_heads.box_roi_pool is not pool
        for name, loss in losses(ours).items():
            torch.testing.assert_close(loss, expected[name])
    assert ours.roi_heads.box_roi_pool is pool
    assert [p.stride() for p in ours.parameters()] == strides
    learned = 0
    for (name, one), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)
            learned += bool(one.grad.any())
    assert learned > 80


def test_many_boxes_are_pooled_in_pieces(
    model: FasterRCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, views = prepare_for_extraction(model), soft_noise(2, seed=2)
    expected = detect(ours, views)
    for piece in (7, 10_000):
        monkeypatch.setattr(pooling, "_PIECE", piece)
        for image, one in zip(detect(ours, views), expected, strict=True):
            torch.testing.assert_close(image.boxes, one.boxes, atol=1e-5, rtol=0)
            torch.testing.assert_close(image.features, one.features, atol=1e-4, rtol=1e-4)
