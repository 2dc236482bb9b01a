"""What the tiny detector finds in drawn scenes: torchvision's detections, with sound features.

The detector is the real architecture made very narrow, with random weights from a seed; a score
threshold of 0 lets it find regions all the same.
"""

from __future__ import annotations

import pytest
import torch
from builders import TINY, S, Scenes, draw_scenes, tiny_model
from torchvision.models.detection import FasterRCNN

from pipeline.regions.detection import detect


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    return tiny_model()


@pytest.mark.parametrize("batch", [1, 5])
def test_detect_is_the_models_own_forward(detector: FasterRCNN, scenes: Scenes, batch: int) -> None:
    seen: set[int] = set()
    for views in scenes.views[:10].split(batch):
        with torch.inference_mode():
            expected = detector(list(views))
        detections = detect(detector, views)
        assert len(detections) == len(views)
        for ours, theirs in zip(detections, expected, strict=True):
            assert ours.boxes.shape == theirs["boxes"].shape
            assert (ours.boxes * S - theirs["boxes"]).abs().max() < 0.05
            torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-6, rtol=1e-5)
            assert torch.equal(ours.classes, theirs["labels"])
            seen |= set(ours.classes.tolist())
    assert len(seen) > 3


def test_regions_are_sound_and_features_belong_to_their_boxes(
    detector: FasterRCNN, scenes: Scenes
) -> None:
    views = scenes.views[:4]
    heads = detector.roi_heads
    for detections in (detect(detector, views), detect(tiny_model(0.999), views)):
        with torch.inference_mode():
            images, _ = detector.transform(list(views))
            pooled = heads.box_roi_pool(
                detector.backbone(images.tensors),
                [image.boxes * S for image in detections],
                images.image_sizes,
            )
            expected = heads.box_head(pooled).split([len(image.boxes) for image in detections])
        for image, features in zip(detections, expected, strict=True):
            assert image.features.shape == (len(image.scores), TINY.feature_size)
            error = (image.features - features).norm(dim=1)
            assert (error <= 1e-3 * features.norm(dim=1)).all()
            assert (features.norm(dim=1) > 0).all()
            assert (image.scores[1:] <= image.scores[:-1]).all()
            assert ((image.boxes >= 0) & (image.boxes <= 1)).all()
            assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()


def test_a_view_without_detections_has_the_whole_view_as_its_region(scenes: Scenes) -> None:
    for regions in detect(tiny_model(score_threshold=0.999), scenes.views[:3]):
        assert regions.boxes.tolist() == [[0, 0, 1, 1]]
        assert regions.scores.tolist() == [0]
        assert regions.classes.tolist() == [0]


def test_a_stand_in_region_does_not_affect_other_images_of_the_batch(scenes: Scenes) -> None:
    model, views = tiny_model(), scenes.views[:4]
    plain = detect(model, views)
    best = sorted(image.scores[0].item() for image in plain)
    model.roi_heads.score_thresh = (best[1] + best[2]) / 2
    mixed = detect(model, views)
    empty = [image.scores[0].item() == 0 for image in mixed]
    assert sum(empty) == 2
    for image, before, stands_in in zip(mixed, plain, empty, strict=True):
        if not stands_in:
            n = len(image.scores)
            torch.testing.assert_close(image.boxes, before.boxes[:n])
            torch.testing.assert_close(image.features, before.features[:n], atol=1e-5, rtol=1e-4)


def test_views_of_another_size_are_refused(detector: FasterRCNN) -> None:
    for height, width in ((S, 2 * S), (2 * S, 2 * S)):
        with pytest.raises(ValueError, match=rf"1, 3, {height}, {width}.*\({S},\)"):
            detect(detector, torch.zeros(1, 3, height, width))


def test_the_best_regions_are_kept_and_no_more_than_asked_for(
    detector: FasterRCNN, scenes: Scenes
) -> None:
    views = scenes.views[:2]
    for few, many in zip(
        detect(tiny_model(regions=3), views), detect(detector, views), strict=True
    ):
        assert len(many.scores) > 3
        torch.testing.assert_close(few.scores, many.scores[:3])
