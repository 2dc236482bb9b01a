"""What labelling tools write in VOC's layout, and how it is read."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from refusals import refused
from trees import (
    VocObject,
    draw_image,
    images_of,
    placed,
    voc_xml,
)

from pipeline.datasets.listing import hash_fraction, hash_sources
from pipeline.datasets.readers.voc import read_voc
from pipeline.errors import InputError, MissingError
from pipeline.settings import VocSettings

OWN = VocSettings(source="voc", folder=".", vocabulary=["bee", "flower"])
BEE = voc_xml([VocObject("bee", (3, 2, 12, 6))])


def write_voc(root: Path, lines: list[str], files: dict[str, str | bytes]) -> None:
    """Write the training list and the files; the test split is the image `test` without a label.

    Args:
        files: path -> text or bytes; a text `image` stands for a photograph.
    """
    files = {
        "ImageSets/Main/trainval.txt": "\n".join(lines),
        "ImageSets/Main/test.txt": "test",
        "Annotations/test.xml": voc_xml([]),
        "JPEGImages/test.jpg": "image",
        **files,
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "image":
            draw_image(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("line", "image_id", "photograph"),
    [
        ("IMG_0002_jpg.rf.0a1b2c", "IMG_0002_jpg.rf.0a1b2c", "IMG_0002_jpg.rf.0a1b2c.jpg"),
        ("a b (1)", "a b (1)", "a b (1).jpg"),
        ("a b 1", "a b 1", "a b 1.jpg"),
        ('"a b"', "a b", "a b.jpg"),
        ("bee", "bee", "bee.png"),
        ("bee", "bee", "bee.jpeg"),
        ("bee", "bee", "bee.JPG"),
        ("bee.jpg", "bee", "bee.jpg"),
        ("bee.JPEG", "bee", "bee.jpg"),
        ("bee 1", "bee", "bee.jpg"),
        ("bee.png  1", "bee", "bee.png"),
        ("bee.jpg", "bee.jpg", "bee.jpg.jpg"),
        ("bee.jpg", "bee.jpg", "bee.jpg"),
        ("sub/bee", "sub/bee", "sub/bee.jpg"),
        ("sub\\bee.jpg", "sub/bee", "sub/bee.jpg"),
        ("./bee.jpg", "bee", "bee.jpg"),
        ("/home/me/VOC/JPEGImages/sub/bee.jpg", "sub/bee", "sub/bee.jpg"),
        ("C:\\photos\\bee.jpg", "bee", "bee.jpg"),
        ("data/obj/bee.jpg", "bee", "bee.jpg"),
        ("蜂-1", "蜂-1", "蜂-1.webp"),
    ],
)
def test_line_of_a_list_and_file_of_a_photograph(
    tmp_path: Path, line: str, image_id: str, photograph: str
) -> None:
    files = {f"Annotations/{image_id}.xml": BEE, f"JPEGImages/{photograph}": "image"}
    write_voc(tmp_path, [line], files)
    listing = read_voc(tmp_path, OWN)
    assert images_of(listing, tmp_path) == {image_id: (f"JPEGImages/{photograph}", ["bee"])}
    name = line if line == image_id else line.removesuffix(" 1")
    lists = {"ImageSets/Main/trainval.txt": line, "ImageSets/Main/test.txt": "test"}
    for label, value in (("bee", 1), ("flower", -1)):
        lists[f"ImageSets/Main/{label}_trainval.txt"] = f"{name} {value}"
        lists[f"ImageSets/Main/{label}_test.txt"] = "test -1"
    write_voc(tmp_path, [line], {**files, **lists})
    listing = read_voc(tmp_path, OWN.model_copy(update={"labels": "lists"}))
    assert images_of(listing, tmp_path) == {image_id: (f"JPEGImages/{photograph}", ["bee"])}


def test_names_in_another_unicode_form_are_the_same(tmp_path: Path) -> None:
    name = "Grüße été"
    apart = unicodedata.normalize("NFD", name)
    assert apart != name
    xml = voc_xml([VocObject(unicodedata.normalize("NFD", "\u200bfée\u00a0"))])
    write_voc(
        tmp_path, [name], {f"Annotations/{apart}.xml": xml, f"JPEGImages/{apart}.jpg": "image"}
    )
    settings = OWN.model_copy(update={"vocabulary": ["fée\u200b"]})
    assert images_of(read_voc(tmp_path, settings), tmp_path) == {
        name: (f"JPEGImages/{apart}.jpg", ["fée"])
    }


def test_folders_in_another_unicode_form(tmp_path: Path) -> None:
    """And of two folders, that of the listed one."""
    name, apart = (unicodedata.normalize(form, "été/bee") for form in ("NFC", "NFD"))
    files = {f"Annotations/{apart}.xml": BEE, f"JPEGImages/{apart}.png": "image"}
    write_voc(tmp_path, [name], {**files, "JPEGImages/bee.jpg": "image"})
    listing = read_voc(tmp_path, OWN)
    assert images_of(listing, tmp_path) == {name: (f"JPEGImages/{apart}.png", ["bee"])}


def test_unknown_encoding_of_what_is_no_xml_is_refused(tmp_path: Path) -> None:
    files = {"Annotations/bee.xml": "<?xml version='1.0' encoding='unicode'?><annotation>"}
    write_voc(tmp_path, ["bee"], files)
    with refused(InputError, "bee.xml", "VOC"):
        read_voc(tmp_path, OWN)


def test_the_devkits_suffix_comes_first_and_two_others_are_refused(tmp_path: Path) -> None:
    files = {
        "Annotations/bee.xml": BEE,
        "JPEGImages/bee.png": "image",
        "JPEGImages/bee.jpg": "image",
    }
    write_voc(tmp_path, ["bee"], files)
    assert images_of(read_voc(tmp_path, OWN), tmp_path)["bee"][0] == "JPEGImages/bee.jpg"
    (tmp_path / "JPEGImages/bee.jpg").rename(tmp_path / "JPEGImages/bee.jpeg")
    with refused(InputError, "'JPEGImages/bee'", "JPEGImages/bee.jpeg", "JPEGImages/bee.png"):
        read_voc(tmp_path, OWN)


@pytest.mark.parametrize(
    ("written", "ignored"),
    [
        ("", False),
        ("<difficult/>", False),
        ("<difficult>Unspecified</difficult>", False),
        ("<difficult> 0 </difficult>", False),
        ("<difficult>False</difficult>", False),
        ("<difficult>1</difficult>", True),
        ("<difficult>true</difficult>", True),
    ],
)
def test_difficult(tmp_path: Path, written: str, ignored: bool) -> None:
    xml = BEE.replace("<difficult>0</difficult>", written)
    write_voc(tmp_path, ["bee"], {"Annotations/bee.xml": xml, "JPEGImages/bee.jpg": "image"})
    row = read_voc(tmp_path, OWN).table.to_pylist()[0]
    assert (row["labels"], row["ignored"]) == (([], [0]) if ignored else ([0], []))


BOX = [0.1, 0.1, 0.6, 0.6]


@pytest.mark.parametrize(
    "change",
    [
        lambda xml: xml,
        lambda xml: xml.replace("<size><width>20</width><height>10</height></size>", ""),
        lambda xml: xml.replace("<width>20", "<width>0").replace("<height>10", "<height>0"),
        lambda xml: xml.replace("<width>20", "<width>-1"),
        lambda xml: xml.replace("<width>20", "<width>unknown"),
        lambda xml: xml.replace("<width>20", "<width>1.5"),
        lambda xml: xml.replace("<xmin>3<", "<xmin>3.0<").replace("<ymax>6<", "<ymax> 6.0 <"),
        lambda xml: xml.replace("<xmin>3<", "<xmin>12<").replace("<xmax>12<", "<xmax>3<"),
        lambda xml: xml.replace("<annotation>", '<annotation xmlns="http://example.org/voc">'),
        lambda xml: "\ufeff" + xml,
        lambda xml: xml.encode("utf-16"),
        lambda xml: '<?xml version="1.0" encoding="unicode"?>' + xml,
        lambda xml: "<?xml version='1.0' encoding='utf-16'?>" + xml,
        lambda xml: ("<?xml version='1.0' encoding='GBK'?><!-- 蜂 -->" + xml).encode("gbk"),
    ],
)
def test_sizes_corners_and_encodings(tmp_path: Path, change: Callable[[str], Any]) -> None:
    files = {"Annotations/bee.xml": change(BEE), "JPEGImages/bee.jpg": "image"}
    write_voc(tmp_path, ["bee"], files)
    listing = read_voc(tmp_path, OWN)
    assert images_of(listing, tmp_path)["bee"][1] == ["bee"]
    boxes = placed(listing, tmp_path)
    assert boxes.images["bee"].boxes.tolist() == pa.array([BOX], pa.list_(pa.float32())).to_pylist()
    assert not boxes.incomplete


def test_corners_in_another_order_are_noted(tmp_path: Path) -> None:
    xml = voc_xml([VocObject("bee", (12, 6, 3, 2))])
    write_voc(tmp_path, ["bee"], {"Annotations/bee.xml": xml, "JPEGImages/bee.jpg": "image"})
    listing = read_voc(tmp_path, OWN)
    boxes = placed(listing, tmp_path)
    assert boxes.images["bee"].boxes.tolist() == pa.array([BOX], pa.list_(pa.float32())).to_pylist()
    assert "bee.xml" in "".join(listing.notes)


@pytest.mark.parametrize("box", ["", "<bndbox/>", "<polygon><x1>3</x1></polygon>"])
def test_object_without_a_box_is_a_label(tmp_path: Path, box: str) -> None:
    start, end = BEE.index("<bndbox>"), BEE.index("</object>")
    xml = BEE[:start] + box + BEE[end:]
    write_voc(tmp_path, ["bee"], {"Annotations/bee.xml": xml, "JPEGImages/bee.jpg": "image"})
    listing = read_voc(tmp_path, OWN)
    assert images_of(listing, tmp_path)["bee"][1] == ["bee"]
    boxes = placed(listing, tmp_path)
    assert (len(boxes.images["bee"].boxes), boxes.incomplete) == (0, {"bee"})


def test_list_with_a_byte_order_mark(tmp_path: Path) -> None:
    files = {"Annotations/bee.xml": BEE, "JPEGImages/bee.jpg": "image"}
    write_voc(tmp_path, ["\ufeffbee"], files)
    assert list(images_of(read_voc(tmp_path, OWN), tmp_path)) == ["bee"]


def test_lists_have_settings_and_are_named_where_they_are_missing(tmp_path: Path) -> None:
    root = tmp_path / "garden"
    files: dict[str, str | bytes] = {"Annotations/bee.xml": BEE, "JPEGImages/bee.jpg": "image"}
    write_voc(root, [], {**files, "ImageSets/Main/train.txt": "bee"})
    (root / "ImageSets/Main/trainval.txt").unlink()
    with refused(MissingError, "trainval.txt", "train.txt", "`prepare.garden.train`"):
        read_voc(root, OWN)
    listing = read_voc(root, OWN.model_copy(update={"train": "train"}))
    assert list(images_of(listing, root)) == ["bee"]
    assert listing.split_name == "own"
    assert next(iter(listing.sources)) == "ImageSets/Main/train.txt"


@pytest.mark.parametrize("labels", ["annotations", "lists"])
def test_a_third_list_validates(tmp_path: Path, labels: Any) -> None:
    """With class lists of each split, or with annotations."""
    files: dict[str, str | bytes] = {"ImageSets/Main/dev.txt": "other"}
    for name, value in (("bee", 1), ("other", 1), ("test", -1)):
        files |= {f"Annotations/{name}.xml": BEE, f"JPEGImages/{name}.jpg": "image"}
        split = {"bee": "trainval", "other": "dev"}.get(name, name)
        files[f"ImageSets/Main/bee_{split}.txt"] = f"{name} {value}"
        files[f"ImageSets/Main/flower_{split}.txt"] = f"{name} -1"
    write_voc(tmp_path, ["bee"], files)
    listing = read_voc(tmp_path, OWN.model_copy(update={"val": "dev", "labels": labels}))
    splits = {row["image_id"]: (row["split"], row["labels"]) for row in listing.table.to_pylist()}
    assert splits["bee"] == ("train", [0])
    assert splits["other"] == ("val", [0])
    assert splits["test"][0] == "test"
    files["ImageSets/Main/dev.txt"] = "bee"
    write_voc(tmp_path, ["bee"], files)
    with refused(InputError, "dev.txt, line 1", "bee", "train"):
        read_voc(tmp_path, OWN.model_copy(update={"val": "dev"}))


def test_missing_annotation_of_own_data_says_what_to_do(tmp_path: Path) -> None:
    write_voc(tmp_path, ["BEE"], {"Annotations/bee.xml": BEE, "JPEGImages/BEE.jpg": "image"})
    with refused(MissingError, "Annotations/BEE.xml", "Annotations/bee.xml", "<object>", "list"):
        read_voc(tmp_path, OWN)


def test_annotations_in_subfolders_are_sources(tmp_path: Path) -> None:
    files = {"Annotations/sub/bee.xml": BEE, "JPEGImages/sub/bee.jpg": "image"}
    write_voc(tmp_path, ["sub/bee"], files)
    before = read_voc(tmp_path, OWN).sources
    (tmp_path / "Annotations/sub/bee.xml").write_text(voc_xml([]))
    assert hash_sources(tmp_path, before) != before


def test_boxes_between_0_and_1_are_relative(tmp_path: Path) -> None:
    relative = voc_xml([VocObject("bee", (0.1, 0.2, 0.6, 1.0))])
    files: dict[str, str | bytes] = {"Annotations/a.xml": relative, "JPEGImages/a.jpg": "image"}
    write_voc(tmp_path, ["a"], files)
    listing = read_voc(tmp_path, OWN)
    boxes = placed(listing, tmp_path)
    np.testing.assert_allclose(boxes.images["a"].boxes, [[0.1, 0.2, 0.6, 1]], rtol=1e-6)
    (note,) = listing.notes
    assert "'train'" in note


def test_deleted_objects_are_left_out(tmp_path: Path) -> None:
    deleted = VocObject("gone").xml().replace("<object>", "<object><deleted>1</deleted>")
    kept = VocObject("bee").xml().replace("<object>", "<object><deleted>0</deleted>")
    text = voc_xml([]).replace("</annotation>", f"{deleted}{kept}</annotation>")
    write_voc(tmp_path, ["a"], {"Annotations/a.xml": text, "JPEGImages/a.jpg": "image"})
    assert images_of(read_voc(tmp_path, OWN), tmp_path) == {"a": ("JPEGImages/a.jpg", ["bee"])}


def test_class_in_other_letters_is_named_beside_the_vocabulary(tmp_path: Path) -> None:
    text = voc_xml([VocObject("BEE")])
    write_voc(tmp_path, ["a"], {"Annotations/a.xml": text, "JPEGImages/a.jpg": "image"})
    with refused(InputError, "a.xml", "'BEE'", "Did you mean 'bee'?"):
        read_voc(tmp_path, OWN)


def test_document_type_is_to_be_removed(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"Annotations/a.xml": f"<!DOCTYPE annotation>{BEE}"}
    write_voc(tmp_path, ["a"], {**files, "JPEGImages/a.jpg": "image"})
    with refused(InputError, "a.xml", "<!DOCTYPE", "Remove it"):
        read_voc(tmp_path, OWN)


def test_one_list_is_split_by_a_share(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"Annotations/{number}.xml": BEE for number in range(40)}
    write_voc(tmp_path, [str(number) for number in range(40)], files)
    settings = OWN.model_copy(update={"test_share": 0.3})
    rows = read_voc(tmp_path, settings).table.to_pylist()
    assert len(rows) == 40
    tests = {row["path"] for row in rows if row["split"] == "test"}
    assert tests == {row["path"] for row in rows if hash_fraction(row["path"]) < 0.3}
    assert 0 < len(tests) < 40


@pytest.mark.parametrize(
    "line",
    [
        "bee.xml",
        "Annotations/bee.xml",
        "./JPEGImages/bee.jpg ./Annotations/bee.xml",
        "VOC/JPEGImages/bee.jpg\tVOC/Annotations/bee.xml",
    ],
)
def test_line_may_name_the_annotation(tmp_path: Path, line: str) -> None:
    write_voc(tmp_path, [line], {"Annotations/bee.xml": BEE, "JPEGImages/bee.jpg": "image"})
    images = images_of(read_voc(tmp_path, OWN), tmp_path)
    assert images == {"bee": ("JPEGImages/bee.jpg", ["bee"])}


def test_pair_of_different_names_is_refused(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"Annotations/a.xml": BEE, "JPEGImages/b.jpg": "image"}
    write_voc(tmp_path, ["./JPEGImages/b.jpg ./Annotations/a.xml"], files)
    with refused(InputError, "trainval.txt, line 1", "'./JPEGImages/b.jpg ./Annotations/a.xml'"):
        read_voc(tmp_path, OWN)


def test_layout_in_another_folder_is_named(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit/VOC2012", [], {})
    settings = OWN.model_copy(update={"folder": "VOCdevkit/VOC2007"})
    setting = f"`prepare.{tmp_path.name}.folder: VOCdevkit/VOC2012`"
    with refused(MissingError, "VOC2007/ImageSets/Main/trainval.txt", setting):
        read_voc(tmp_path, settings)
