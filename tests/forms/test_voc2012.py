"""VOC 2012: its folder, its lists, and what its annotations have that those of 2007 lack."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from trees import placed

from pipeline.datasets.readers.voc import read_voc
from pipeline.errors import MissingError
from pipeline.settings import VocSettings

FOLDER = "VOCdevkit/VOC2012"
SETTINGS = VocSettings(source="voc", folder=FOLDER, train="train", test="val")
PART = """<part><name>head</name><bndbox>
<xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def write_voc2012(sample: Path, root: Path) -> None:
    """Lay the sample of VOC 2007 out as VOC 2012 is: other lists, parts, and pixels of decimals."""
    devkit = root / FOLDER
    (devkit / "ImageSets/Main").mkdir(parents=True)
    (devkit / "Annotations").mkdir()
    (devkit / "JPEGImages").symlink_to(sample / "JPEGImages")
    for name, other in (("trainval", "train"), ("test", "val")):
        text = (sample / f"ImageSets/Main/{name}.txt").read_text()
        (devkit / f"ImageSets/Main/{other}.txt").write_text(text)
        with (devkit / "ImageSets/Main/trainval.txt").open("a") as stream:
            stream.write(text)
    for path in (sample / "Annotations").glob("*.xml"):
        text = path.read_text().replace("VOC2007", "VOC2012")
        text = re.sub(r"</(xmin|ymax)>", r".000000000001</\1>", text)
        (devkit / "Annotations" / path.name).write_text(text.replace("</object>", PART))


def test_real_annotations_have_the_labels_of_2007(shared: Path, tmp_path: Path) -> None:
    sample = shared / "data/voc2007-sample"
    write_voc2012(sample / "VOCdevkit/VOC2007", tmp_path)
    listing = read_voc(tmp_path, SETTINGS)
    other = read_voc(sample, VocSettings(source="voc"))
    assert listing.split_name == "train/val"
    for column in ("image_id", "split", "labels", "ignored", "width", "height"):
        assert listing.table[column] == other.table[column]
    ours, theirs = placed(listing, tmp_path).images, placed(other, sample).images
    assert ours.keys() == theirs.keys()
    for image_id, boxes in ours.items():
        assert boxes.classes.tolist() == theirs[image_id].classes.tolist()
        np.testing.assert_allclose(boxes.boxes, theirs[image_id].boxes, atol=1e-6)


def test_the_settings_of_2007_are_answered_with_the_lists_that_there_are(
    shared: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match=r"train\.txt.*VOCtrainval_11-May-2012\.tar"):
        read_voc(tmp_path, SETTINGS)
    write_voc2012(shared / "data/voc2007-sample/VOCdevkit/VOC2007", tmp_path)
    with pytest.raises(
        MissingError, match=r"test\.txt.*train\.txt, trainval\.txt, val\.txt.*\.test"
    ):
        read_voc(tmp_path, VocSettings(source="voc", folder=FOLDER))
