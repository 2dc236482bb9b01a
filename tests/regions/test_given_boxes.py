"""Regions at given boxes: those of the data set or of a file, in every view, as the detector's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import CLASSES, TINY, S, Scenes, draw_scenes, tiny_model
from PIL import Image
from pydantic import ValidationError
from region_files import write_box_file
from torch import nn
from trees import placed

from pipeline.datasets.listing import listed_manifest
from pipeline.datasets.manifest import COLUMNS, BoxTable, ImageBoxes, Manifest, full_counts
from pipeline.datasets.readers.voc import VOCABULARY, read_voc
from pipeline.datasets.scenes import KINDS
from pipeline.errors import InputError, MismatchError
from pipeline.evaluation.differences import describe_detector
from pipeline.regions.detector import DetectorDescription
from pipeline.regions.extraction import ShardExtractor, extraction_recipe, extraction_settings
from pipeline.regions.given_boxes import (
    GivenBoxes,
    GivenRegions,
    annotated_boxes,
    read_box_file,
    regions_in_view,
)
from pipeline.regions.plan import ViewPlan
from pipeline.regions.transforms import crop_of, view_of
from pipeline.settings import ExtractSettings, VocSettings
from pipeline.shards.schema import RegionRows

M = 6
SIDES = ("width", "height")
DETECTED = ExtractSettings(size=S, regions=M, feature_dtype="float32", batch_size=4)
ANNOTATED = DETECTED.model_copy(update={"boxes": "annotations"})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


def extracted(
    manifest: Manifest,
    root: Path,
    boxes: GivenBoxes | None,
    settings: ExtractSettings,
    ids: list[str] | None = None,
    model: nn.Module | None = None,
) -> RegionRows:
    """The rows of some images, by default of all."""
    plan = ViewPlan(manifest, settings.views, boxes)
    jobs = [job for job in plan.jobs(np.arange(len(plan))) if ids is None or job.image_id in ids]
    model = model or tiny_model(regions=settings.regions)
    rows, kept, _ = ShardExtractor(model, settings, threads=2).detect(jobs, root)
    assert rows is not None
    assert len(kept) == len(jobs)
    rows.check()
    return rows


def given(boxes: Any, scores: Any = None, classes: Any = None) -> GivenRegions:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    scores = np.ones(len(boxes)) if scores is None else scores
    classes = np.arange(1, len(boxes) + 1) if classes is None else classes
    return GivenRegions(boxes, np.array(scores, np.float32), np.array(classes, np.int16))


# Features ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voc(shared: Path) -> tuple[Path, Manifest, BoxTable]:
    """400 real photographs: their root, manifest and boxes."""
    root = shared / "data/voc2007-sample"
    settings = VocSettings(source="voc")
    listing = read_voc(root, settings)
    return root, listed_manifest(listing, "photos", settings), placed(listing, root)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_the_detectors_own_boxes_come_back_with_its_own_features(
    voc: tuple[Path, Manifest, BoxTable], tmp_path: Path, suffix: str
) -> None:
    root, manifest, _ = voc
    ids = manifest.image_ids("train")[:60:10]
    found = extracted(manifest, root, None, DETECTED, ids)
    rows: dict[str, list[Any]] = {"image_id": [], "box": [], "score": [], "class": []}
    for number in range(len(found)):
        image_id = found.image_id[number].decode()
        [path] = manifest.table.filter(pa.compute.equal(manifest.table["image_id"], image_id))[
            "path"
        ].to_pylist()
        with Image.open(root / path) as photograph:
            width, height = photograph.size
        for region in range(found.count[number]):
            x0, y0, x1, y1 = found.boxes[number, region].tolist()
            rows["image_id"].append(image_id)
            rows["box"].append([x0 * width, y0 * height, x1 * width, y1 * height])
            rows["score"].append(float(found.scores[number, region]))
            rows["class"].append(int(found.classes[number, region]))
    path = write_box_file(tmp_path / f"boxes.{suffix}", rows)
    model = tiny_model(regions=M)
    model.rpn = model.roi_heads.box_predictor = None  # neither may run
    settings = ExtractSettings.model_validate(
        {**DETECTED.model_dump(), "boxes": "file", "boxes_file": path.name}
    )
    boxes = read_box_file(path, manifest, root)
    assert boxes.classes is None
    again = extracted(manifest, root, boxes, settings, ids, model)
    assert found.count.min() > 1
    for field in ("count", "scores", "classes", "image_id"):
        np.testing.assert_array_equal(getattr(again, field), getattr(found, field), field)
    np.testing.assert_allclose(again.boxes, found.boxes, atol=1e-7)
    np.testing.assert_allclose(again.features, found.features, atol=1e-5)
    assert np.abs(found.features).max() > 0.1
    np.testing.assert_array_equal(again.whole, found.whole)
    assert np.abs(found.whole).max() > 0.1


def test_annotated_boxes_are_those_of_the_xml_by_area(
    voc: tuple[Path, Manifest, BoxTable],
) -> None:
    """Compared with regular expressions on the XML, and plain sorting."""
    root, manifest, table = voc
    boxes = annotated_boxes(table, manifest)
    assert boxes.classes is not None
    assert boxes.classes[1:] == manifest.vocabulary == VOCABULARY
    crowded = sorted(boxes.images, key=lambda image_id: -len(boxes.of(image_id).scores))[:3]
    ids = [*crowded, *manifest.image_ids("test")[:3]]
    rows = extracted(manifest, root, boxes, ANNOTATED, ids)
    assert rows.count.max() == M
    for row, image_id in enumerate(name.decode() for name in rows.image_id):
        text = (root / f"VOCdevkit/VOC2007/Annotations/{image_id}.xml").read_text()
        text = re.sub("<part>.*?</part>", "", text, flags=re.DOTALL)
        width, height = (
            int(re.findall(rf"<{side}>(\d+)<", text)[0]) for side in ("width", "height")
        )
        objects = []
        for item in text.split("<object>")[1:]:
            x0, y0, x1, y1 = map(int, re.findall(r"<[xy]m(?:in|ax)>(\d+)<", item)[:4])
            if "<difficult>0<" in item:
                box = [(x0 - 1) / width, (y0 - 1) / height, x1 / width, y1 / height]
                area = (box[2] - box[0]) * (box[3] - box[1])
                objects.append((-area, box, re.findall("<name>([a-z]+)<", item)[0]))
        objects.sort(key=lambda one: one[0])
        expected = [box for _, box, _ in objects[:M]]
        assert rows.count[row] == len(expected)
        np.testing.assert_allclose(rows.boxes[row, : len(expected)], expected, atol=1e-6)
        names = [boxes.classes[number] for number in rows.classes[row, : len(expected)]]
        assert names == [name for _, _, name in objects[:M]]
        assert (rows.scores[row, : len(expected)] == 1).all()


def test_an_image_without_a_box_gets_the_whole_view(scenes: Scenes) -> None:
    first, second = scenes.manifest.image_ids("train")[:2]
    kept = {key: one for key, one in scenes.boxes.images.items() if key != first}
    kept[second] = ImageBoxes(np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    boxes = annotated_boxes(replace(scenes.boxes, images=kept), scenes.manifest)
    assert {first, second}.isdisjoint(boxes.images)
    rows = extracted(scenes.manifest, scenes.root, boxes, ANNOTATED, [first, second])
    whole = GivenBoxes({key: given([0, 0, 1, 1], [0], [0]) for key in (first, second)}, None, "")
    expected = extracted(scenes.manifest, scenes.root, whole, ANNOTATED, [first, second])
    assert rows.count.tolist() == [1, 1]
    for field in ("boxes", "scores", "classes", "features"):
        np.testing.assert_array_equal(getattr(rows, field), getattr(expected, field), field)


def test_features_of_crops_are_those_of_the_boxes_in_the_crop(scenes: Scenes) -> None:
    settings = ANNOTATED.model_copy(update={"views": 4})
    boxes = annotated_boxes(scenes.boxes, scenes.manifest)
    ids = scenes.manifest.image_ids("train")[:3]
    rows = extracted(scenes.manifest, scenes.root, boxes, settings, ids)
    mirrored = 0
    for row in np.flatnonzero(rows.view > 0):
        image_id = rows.image_id[row].decode()
        drawn: dict[str, Any] = {"image_id": image_id, "seed": 0, "flip": True}
        mirrored += crop_of((S, S), int(rows.view[row]), **drawn).mirrored
        # The crop as a photograph of its own, with the boxes that the row has.
        own = GivenBoxes({image_id: given(rows.boxes[row, : rows.count[row]])}, None, "")
        with Image.open(scenes.root / "images" / f"{image_id}.png") as photograph:
            view = view_of(photograph.convert("RGB"), int(rows.view[row]), size=S, **drawn)
        Image.fromarray(view).save(scenes.root / f"{image_id}.png")
        table = pa.Table.from_pylist(
            [
                {**one, "path": f"{one['image_id']}.png"}
                for one in scenes.manifest.table.to_pylist()
            ],
            schema=COLUMNS,
        )
        crops = replace(scenes.manifest, table=table, counts=full_counts(table))
        alone = extracted(crops, scenes.root, own, ANNOTATED, [image_id])
        order = [
            next(n for n in range(M) if np.allclose(alone.boxes[0, n], box, atol=1e-6))
            for box in rows.boxes[row, : rows.count[row]]
        ]
        np.testing.assert_allclose(
            rows.features[row, : rows.count[row]], alone.features[0, order], atol=1e-4
        )
    assert 0 < mirrored < (rows.view > 0).sum()


# Boxes of a view ---------------------------------------------------------------------------------


def test_boxes_of_a_view_are_where_the_object_is_seen() -> None:
    """A white object on black is looked for among the pixels of the view."""
    rng = np.random.default_rng(0)
    width, height = size = (240, 130)
    seen = left = mirrored = 0
    for number in range(120):
        x0, x1 = np.sort(rng.choice(width, 2, replace=False)).tolist()
        y0, y1 = np.sort(rng.choice(height, 2, replace=False)).tolist()
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[y0:y1, x0:x1] = 255
        drawn: dict[str, Any] = {"image_id": f"{number}", "seed": 3, "flip": True}
        view = view_of(Image.fromarray(pixels), number % 4, size=S, **drawn)[..., 0]
        crop = crop_of(size, number % 4, **drawn)
        mirrored += crop.mirrored
        box = given([x0 / width, y0 / height, x1 / width, y1 / height])
        boxes = regions_in_view(box, size, crop, size=S, most=3).boxes * S
        rows, columns = np.nonzero(view > 127)
        if not len(rows):
            # It is not in the crop, or too thin to light a pixel up.
            assert not len(boxes) or (boxes[0, 2:] - boxes[0, :2]).min() < 1.5
            left += not len(boxes)
            continue
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(boxes, [expected], atol=1.01)
        seen += 1
    assert seen > 60
    assert left > 3
    assert mirrored > 20


def test_the_best_of_a_view_come_first_and_only_they_are_kept() -> None:
    """By score; of equal scores the one whose visible part is larger; compared with a loop."""
    rng = np.random.default_rng(1)
    for number in range(30):
        corners = np.sort(rng.random((9, 2, 2)), axis=1).reshape(9, 4)
        corners[0] = [0.9999, 0.9999, 1, 1]  # less than a hundredth of a pixel
        scores = rng.choice([0.25, 0.5, 1], 9)
        drawn: dict[str, Any] = {"image_id": f"{number}", "seed": 0, "flip": True}
        crop = crop_of((100, 50), number % 3, **drawn)
        expected = []
        x0, y0, x1, y1 = crop.box
        for index, (box, score) in enumerate(zip(corners.tolist(), scores.tolist(), strict=True)):
            across = [min(max((side * 100 - x0) / (x1 - x0), 0), 1) for side in (box[0], box[2])]
            down = [min(max((side * 50 - y0) / (y1 - y0), 0), 1) for side in (box[1], box[3])]
            if crop.mirrored:
                across = [1 - across[1], 1 - across[0]]
            wide, high = across[1] - across[0], down[1] - down[0]
            if wide * S >= 0.01 and high * S >= 0.01:
                place = (across[0], down[0], across[1], down[1])
                expected.append((-score, -wide * high, index + 1, place))
        expected = sorted(expected)[:4]
        regions = regions_in_view(given(corners, scores), (100, 50), crop, size=S, most=4)
        assert regions.classes.tolist() == [index for _, _, index, _ in expected]
        assert regions.scores.tolist() == [-score for score, _, _, _ in expected]
        places = np.array([place for *_, place in expected]).reshape(-1, 4)
        np.testing.assert_allclose(regions.boxes, places, atol=1e-12)


def test_a_photograph_of_another_size_is_refused(scenes: Scenes, tmp_path: Path) -> None:
    boxes = annotated_boxes(scenes.boxes, scenes.manifest)
    for job in ViewPlan(scenes.manifest, 1).jobs(np.arange(len(scenes.manifest))):
        (tmp_path / job.path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (S, 32)).save(tmp_path / job.path)
    with pytest.raises(MismatchError, match="64 x 32 pixels, expected 64 x 64"):
        extracted(scenes.manifest, tmp_path, boxes, ANNOTATED)


# Recipes and settings ----------------------------------------------------------------------------

DESCRIPTION = DetectorDescription("fit", TINY, ("background", *KINDS), "0" * 64)


def test_recipes_hold_the_boxes_and_no_threshold(scenes: Scenes) -> None:
    detected = extraction_recipe(DESCRIPTION, DETECTED)
    boxes = annotated_boxes(scenes.boxes, scenes.manifest)
    recipe = extraction_recipe(DESCRIPTION, ANNOTATED, boxes)
    assert {key: value for key, value in detected.items() if key not in recipe} == {
        "score_threshold": 0.0,
        "nms_threshold": 0.5,
    }
    assert {key: value for key, value in recipe.items() if key not in detected} == {
        "boxes": "annotations",
        "boxes_sha256": boxes.sha256,
    }
    assert extraction_settings(recipe) == ANNOTATED.model_copy(update={"batch_size": 8})
    said = describe_detector(DESCRIPTION, recipe)
    assert "upper bound" in said
    assert said.endswith(describe_detector(DESCRIPTION, detected))


def test_the_digest_covers_boxes_scores_and_classes_alone(scenes: Scenes) -> None:
    manifest, table = scenes.manifest, scenes.boxes
    digest = annotated_boxes(table, manifest).sha256
    turned = dict(reversed(table.images.items()))
    renamed = replace(table, images=turned, classes=("other", *table.classes[1:]))
    assert annotated_boxes(renamed, manifest).sha256 == digest
    rows = manifest.table.to_pylist()
    rows[0]["labels"], rows[1]["ignored"] = [], []
    labels = pa.Table.from_pylist(rows, schema=COLUMNS)
    relabelled = replace(manifest, table=labels, counts=full_counts(labels))
    assert annotated_boxes(table, relabelled).sha256 == digest
    first = next(iter(table.images))
    own = table.images[first]
    for other in (
        ImageBoxes(own.classes, own.boxes * np.float32(0.99)),
        ImageBoxes(own.classes % len(KINDS) + 1, own.boxes),
        ImageBoxes(own.classes[:-1], own.boxes[:-1]),
    ):
        changed = replace(table, images={**table.images, first: other})
        assert annotated_boxes(changed, manifest).sha256 != digest


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"boxes": "file"}, "boxes_file"),
        ({"boxes_file": "a.npz"}, "boxes_file"),
        ({"boxes": "annotations", "boxes_file": "a.npz"}, "boxes_file"),
        ({"boxes": "annotations", "score_threshold": 0.1}, "score_threshold"),
        ({"boxes": "file", "boxes_file": "a.npz", "nms_threshold": 0.6}, "nms_threshold"),
        ({"boxes": "truth"}, "annotations"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ExtractSettings.model_validate(settings)


def test_classes_of_the_scenes_are_the_detectors(scenes: Scenes) -> None:
    boxes = annotated_boxes(scenes.boxes, scenes.manifest)
    assert boxes.classes == ("background", *KINDS)
    assert len(boxes.classes) == CLASSES
    assert set(boxes.images) == set(scenes.boxes.images)
    empty = replace(scenes.boxes, images={})
    with pytest.raises(InputError, match="tiny has an annotated box"):
        annotated_boxes(empty, scenes.manifest)
