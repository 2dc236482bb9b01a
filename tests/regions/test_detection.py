"""`detect` gives what torchvision's own model gives, whether prepared for extraction or not.

Weights are random, with batch norm statistics taken from real activations and then disturbed, and
with predictors scaled so that scores spread over classes.

Letters: B images of a batch, S side of a view in pixels, n boxes, K classes including the
background.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from pipeline.regions import detection
from pipeline.regions.detection import (
    Detections,
    detect,
    prepare_for_extraction,
    trained_faster,
)
from pipeline.regions.detector import build_model, fit_state
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings

S = 128
CLASSES = 12
NARROW = ArchitectureSettings(
    width_per_group=4,
    fpn_channels=16,
    feature_size=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    proposals=300,
)


def soft_noise(images: int, size: int = S, seed: int = 0) -> Tensor:
    """Return (images, 3, size, size) in [0, 1]: random colours that change over 16 pixels."""
    coarse = torch.rand(images, 3, size // 16, size // 16, generator=generator(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def enliven(model: FasterRCNN, views: Tensor) -> None:
    """Give ``model`` weights with which it detects several classes, with scores from 0 to 1."""
    random = generator(1)
    seen: set[nn.Module] = set()

    def set_norm(norm: Any, inputs: tuple[Tensor]) -> None:
        channels = inputs[0].shape[1]
        spread = 0.8 + 0.4 * torch.rand(channels, generator=random)
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)) * spread)
        norm.running_var.copy_(inputs[0].var((0, 2, 3)) * spread.flip(0))
        norm.weight.copy_(0.8 + 0.4 * torch.rand(channels, generator=random))
        norm.bias.copy_(0.1 * torch.randn(channels, generator=random))

    def spread_to(deviation: float) -> Any:
        """Return a hook that gives a layer's outputs a mean of 0 and this standard deviation: each
        unit of a linear layer on its own, all of a convolution together."""

        def spread(module: Any, _: Any, output: Tensor) -> Tensor:
            if module in seen:
                return output
            seen.add(module)
            axis = 0 if output.ndim == 2 else None
            mean, factor = output.mean(axis), deviation / output.std(axis)
            module.weight.mul_(factor[:, None] if output.ndim == 2 else factor)
            module.bias.sub_(mean).mul_(factor)
            return (output - mean) * factor

        return spread

    heads = model.roi_heads
    hooks = [
        module.register_forward_pre_hook(set_norm)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)
    ]
    for module, deviation in (
        (model.rpn.head.cls_logits, 2.0),
        (model.rpn.head.bbox_pred, 0.3),
        (heads.box_head.fc6, 1.0),
        (heads.box_head.fc7, 1.0),
        (heads.box_predictor.cls_score, 1.2),
        (heads.box_predictor.bbox_pred, 0.5),
    ):
        hooks.append(module.register_forward_hook(spread_to(deviation)))
    model(list(views))
    for hook in hooks:
        hook.remove()


def narrow_model(norm: str = "frozen", *, threshold: float = 0.0, regions: int = 10) -> FasterRCNN:
    torch.manual_seed(0)
    model = build_model(
        NARROW.model_copy(update={"norm": norm}),
        CLASSES,
        size=S,
        regions=regions,
        score_threshold=threshold,
        nms_threshold=0.5,
    ).eval()
    enliven(model, torch.cat([soft_noise(2), torch.rand(2, 3, S, S, generator=generator(0))]))
    return model


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
    enliven(theirs, views)
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


@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_is_roi_align(channels_last: bool) -> None:
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
    ours = detection._TapsPool(theirs)
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
        monkeypatch.setattr(detection, "_PIECE", piece)
        for image, one in zip(detect(ours, views), expected, strict=True):
            torch.testing.assert_close(image.boxes, one.boxes, atol=1e-5, rtol=0)
            torch.testing.assert_close(image.features, one.features, atol=1e-4, rtol=1e-4)


# Choosing ------------------------------------------------------------------------------------


def heads_like(model: FasterRCNN, regions: int, threshold: float, iou: float) -> RoIHeads:
    heads = copy.copy(model.roi_heads)
    heads.detections_per_img, heads.score_thresh, heads.nms_thresh = regions, threshold, iou
    return heads


@pytest.mark.parametrize("seed", range(40))
def test_the_best_are_those_of_the_whole_nms(
    model: FasterRCNN, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With crowds of proposals, few and many detections, ties, thresholds and empty boxes; the
    search begins with 1 to 1000 of up to 4400 candidates."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([0, 1, 30, 400]))
    centers = rng.uniform(0, S, (int(rng.choice([1, 3, 50])), 2))[rng.integers(0, 1, n)]
    centers = centers + rng.normal(0, 3, (n, 2))
    sides = rng.uniform(10, 40, (n, 2))
    proposals = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1).clip(0, S)
    proposals[: n // 5, 2] = proposals[: n // 5, 0]  # decode to boxes without width
    scores = rng.dirichlet(np.full(CLASSES, 0.3), n)
    logits = np.log(scores + 1e-4)
    if seed % 2:
        logits = logits.round()  # many ties
    heads = heads_like(
        model,
        regions=int(rng.choice([1, 10, 100, 5000])),
        threshold=float(rng.choice([0.0, 0.05, 0.3])),
        iou=float(rng.choice([0.02, 0.5, 0.9])),
    )
    given = (
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(rng.normal(0, 1, (n, 4 * CLASSES)), dtype=torch.float32),
        [torch.tensor(proposals, dtype=torch.float32)],
    )
    [boxes], [best], [numbers] = heads.postprocess_detections(*given, [(S, S)])
    monkeypatch.setattr(detection, "_SHIFTED", {"cpu": int(rng.choice([1, 20, 300, 1000]))})
    chosen = detection._best(heads, given[0].softmax(-1), given[1], given[2][0], S)
    if not len(best):
        assert [part.tolist() for part in chosen] == [[[0, 0, S, S]], [0], [0]]
        return
    torch.testing.assert_close(chosen[1], best, rtol=0, atol=0)

    # Rows of equal scores may come in any order, and which of those that tie with the last is open.
    def rows(of: Any, a: Any, b: Any) -> set[tuple[float, ...]]:
        above = a > a[-1]
        return {
            (s, c, *box)
            for s, c, box in zip(
                a[above].tolist(), b[above].tolist(), of[above].tolist(), strict=True
            )
        }

    assert rows(*chosen) == rows(boxes, best, numbers)


def test_only_the_best_candidates_are_examined(
    model: FasterRCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More are examined until as many detections as wanted survive."""
    examined: list[int] = []
    coder = model.roi_heads.box_coder

    def decode(codes: Tensor, boxes: Tensor) -> Tensor:
        examined.append(len(boxes))
        return coder.decode_single(codes, boxes)

    heads = heads_like(model, regions=60, threshold=0.0, iou=0.5)
    heads.box_coder = SimpleNamespace(decode_single=decode)
    corners = torch.rand(300, 2, 2, generator=generator(0)) * S
    proposals = corners.sort(dim=1).values.flatten(1)
    scores = torch.randn(300, CLASSES, generator=generator(1)).softmax(-1)
    monkeypatch.setattr(detection, "_SHIFTED", {"cpu": 50})
    detection._best(heads, scores, torch.zeros(300, 4 * CLASSES), proposals, S)
    assert examined == [50, 200]
