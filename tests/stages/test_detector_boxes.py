"""Boxes from a data set's files to the fit of a detector: frames, sizes, objects without one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from flows import PARAMS, Flow, write_params
from PIL import ExifTags, Image
from trees import VocObject, voc_xml

from pipeline.datasets.manifest import read_boxes, read_manifest

SIZE = (96, 72)  # of the stored pictures; the upright ones are 72 x 96
BOX = (1, 1, 32, 24)  # in pixels from 1, the upper left third of the stored picture
TRAIN = [f"bee_{number}" for number in range(5)]


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    """Photographs that a camera stored turned, and boxes that were drawn on the stored pictures."""
    top = tmp_path / "data/garden/VOCdevkit/VOC2007"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (top / folder).mkdir(parents=True)
    (top / "ImageSets/Main/trainval.txt").write_text("\n".join(TRAIN))
    (top / "ImageSets/Main/test.txt").write_text("bee_9")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in (*TRAIN, "bee_9"):
        picture = Image.new("RGB", SIZE)
        picture.paste("white", (0, 0, 32, 24))
        picture.save(top / f"JPEGImages/{name}.jpg", exif=exif.tobytes())
        annotate(tmp_path, name, voc_xml([VocObject("bee", BOX)], SIZE))
    write_params(
        tmp_path,
        datasets=["garden"],
        prepare={"garden": {"source": "voc", "vocabulary": ["bee"]}},
        **{part: {"garden": PARAMS[part]["tiny"]} for part in ("detector", "extract", "train")},
    )
    return Flow(tmp_path)


def annotate(folder: Path, name: str, xml: str) -> None:
    (folder / f"data/garden/VOCdevkit/VOC2007/Annotations/{name}.xml").write_text(xml)


def photograph(flow: Flow, name: str) -> Path:
    return flow / f"data/garden/VOCdevkit/VOC2007/JPEGImages/{name}.jpg"


def test_boxes_of_stored_pictures_are_turned_and_said(flow: Flow) -> None:
    outcome = flow.gmpipe("prepare")
    assert outcome.code == 0
    for part in ("6 photographs", "bee_0.jpg", "`prepare.garden.box_frame`"):
        assert part in outcome.out
    boxes = read_boxes(flow / "data/garden/prepared/boxes.parquet", TRAIN)
    expected = np.float32([[2 / 3, 0, 1, 1 / 3]])  # upper right in the upright picture
    np.testing.assert_allclose(boxes.images["bee_0"].boxes, expected, rtol=1e-6)
    manifest = read_manifest(flow / "data/garden/prepared/manifest.parquet")
    sizes = {(row["width"], row["height"]) for row in manifest.table.to_pylist()}
    assert sizes == {SIZE[::-1]}
    again = flow.ok("prepare")
    checked = flow.ok("prepare", "--check")
    assert "unchanged" in again
    for text in (again, checked):
        assert re.findall("^Note: .*box_frame.*$", text, re.MULTILINE) == re.findall(
            "^Note: .*box_frame.*$", outcome.out, re.MULTILINE
        )


def test_images_without_all_boxes_are_left_out_of_the_fit(flow: Flow) -> None:
    without = voc_xml([VocObject("bee", BOX)], SIZE).replace("bndbox", "polygon")
    annotate(flow.folder, "bee_3", without)
    assert "bee_3" in flow.ok("prepare")
    outcome = flow.gmpipe("detector")
    assert outcome.code == 0, outcome.err
    assert "1 of 5" in outcome.err
    assert "`gmpipe prepare --check --dataset garden`" in outcome.err
    for name in TRAIN[:3]:
        annotate(flow.folder, name, without)
    flow.ok("prepare")
    assert flow.gmpipe("detector").refused("4 of 5.*`gmpipe prepare --check --dataset garden`")


def test_photograph_that_changed_after_prepare_is_not_fitted_on(flow: Flow) -> None:
    flow.ok("prepare")
    for name in (*TRAIN, "bee_9"):
        Image.new("RGB", SIZE).save(photograph(flow, name))  # without its orientation
    assert flow.gmpipe("detector").refused(
        r"bee_\d\.jpg has 96 x 72.*72 x 96.*data/garden/prepared.*`gmpipe prepare --dataset garden`"
    )


@pytest.mark.parametrize("wrong", ["other", "broken"])
def test_the_right_photograph_in_place_of_a_wrong_one_is_noticed(flow: Flow, wrong: str) -> None:
    """The note asks for it, so `prepare` must see it."""
    path = photograph(flow, "bee_1")
    right = path.read_bytes()
    xml = voc_xml([VocObject("bee", BOX)], SIZE)
    if wrong == "other":
        Image.new("RGB", (50, 31)).save(path)
    else:
        path.write_text("not a photograph")
        xml = re.sub("<size>.*</size>", "", xml)
    annotate(flow.folder, "bee_1", xml)
    boxes = flow / "data/garden/prepared/boxes.parquet"
    for number in range(2):
        out = flow.ok("prepare")
        assert ("unchanged" in out) == (number == 1)
        assert re.search("^Note: .*left out.*bee_1.jpg|^Note: .*bee_1.jpg.*left out", out, re.M)
        assert read_boxes(boxes, TRAIN).incomplete == {"bee_1"}
    path.write_bytes(right)
    out = flow.ok("prepare")
    assert "unchanged" not in out
    assert "left out" not in out
    assert len(read_boxes(boxes, TRAIN).images["bee_1"].boxes) == 1
    assert "unchanged" in flow.ok("prepare")


def test_photograph_that_is_missing_is_only_missing(flow: Flow) -> None:
    xml = re.sub("<size>.*</size>", "", voc_xml([VocObject("bee", BOX)], SIZE))
    annotate(flow.folder, "bee_1", xml)
    photograph(flow, "bee_1").unlink()
    outcome = flow.gmpipe("prepare", "--check")
    assert "missing: 1" in outcome.out
    assert "can't be read" not in outcome.out + outcome.err
