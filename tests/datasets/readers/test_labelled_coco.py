"""What labelling tools write in COCO's JSON, and how it is read."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from refusals import refused
from trees import (
    SIZE,
    coco_file,
    coco_image,
    coco_object,
    draw_image,
    images_of,
    placed,
)

from pipeline.datasets.listing import as_on_disk, hash_fraction, make_manifest
from pipeline.datasets.readers.coco import read_coco
from pipeline.errors import InputError, MissingError
from pipeline.settings import CocoSettings

FARM = CocoSettings(source="coco", train="train", test="val")
ANIMALS = [(1, "cow"), (2, "barn")]
Change = Callable[[dict[str, Any]], object]


def write_farm(
    root: Path,
    change: Change = lambda content: None,
    *,
    test: Change = lambda content: None,
    images: tuple[str, ...] = ("train/a.jpg", "train/b.jpg", "val/c.jpg"),
    files: tuple[str, str] = ("annotations/instances_train.json", "annotations/instances_val.json"),
    start: bytes = b"",
) -> None:
    """Write two training images, a cow, and a cow in a barn; and a test image without labels."""
    contents = [
        coco_file(
            [coco_image(1, file_name="a.jpg"), coco_image(2, file_name="b.jpg")],
            [
                coco_object(1, 1, 1, bbox=[4, 2, 10, 5]),
                coco_object(2, 2, 1, bbox=[4, 2, 10, 5]),
                coco_object(3, 2, 2, bbox=[0, 0, 20, 10]),
            ],
            ANIMALS,
        ),
        coco_file([coco_image(101, file_name="c.jpg")], [], ANIMALS),
    ]
    change(contents[0])
    test(contents[1])
    for name, content in zip(files, contents, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(start + json.dumps(content).encode())
    for number, image in enumerate(images):
        draw_image(root / image, number)


EXPECTED = {"1": ("train/a.jpg", ["cow"]), "2": ("train/b.jpg", ["cow", "barn"])}


def each(section: str, **changes: Any) -> Change:
    """Set keys of every record; None removes the key, a function gets the old value."""

    def change(content: dict[str, Any]) -> None:
        for record in content[section]:
            for key, value in changes.items():
                if value is None:
                    del record[key]
                else:
                    record[key] = value(record[key]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    "change",
    [
        each("annotations", iscrowd=None),
        each("annotations", iscrowd=lambda value: str(value)),
        each("annotations", iscrowd=lambda value: False),
        each("annotations", bbox=lambda box: [str(side) for side in box]),
        lambda content: content["images"].append(dict(content["images"][0])),
        each("annotations", id=1),
        each("annotations", id=None),
        each("annotations", id="x"),
        each("annotations", image_id=str, category_id=str),
        each("annotations", image_id=float),
        each("images", id=str),
        each("categories", id=lambda value: f"0{value}"),
        each("images", width=None, height=None),
        each("images", width=-1, height=-1),
        each("images", width=0, height=0),
        each("images", width="wide", height=lambda value: str(value)),
        each("images", width=float),
        each("images", license=None),
        each("annotations", segmentation=None),
        each("categories", supercategory=None),
    ],
)
def test_records_with_other_or_fewer_keys(tmp_path: Path, change: Change) -> None:
    write_farm(tmp_path, change)
    listing = read_coco(tmp_path, FARM)
    assert listing.vocabulary == ("cow", "barn")
    assert images_of(listing, tmp_path) == EXPECTED
    boxes = placed(listing, tmp_path)
    assert not boxes.incomplete
    expected = pa.array([[0.2, 0.2, 0.7, 0.7], [0, 0, 1, 1]], pa.list_(pa.float32())).to_pylist()
    assert boxes.images["2"].boxes.tolist() == expected
    assert boxes.images["2"].classes.tolist() == [1, 2]


def test_a_third_file_validates(tmp_path: Path) -> None:
    write_farm(tmp_path)
    other = coco_file(
        [coco_image(1, file_name="d.jpg")],
        [coco_object(1, 1, 5, bbox=[4, 2, 10, 5])],
        [(5, "barn"), (6, "goat")],
    )
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid/_annotations.coco.json").write_text(json.dumps(other))
    draw_image(tmp_path / "valid/d.jpg")
    listing = read_coco(tmp_path, FARM.model_copy(update={"val": "valid"}))
    assert listing.vocabulary == ("cow", "barn", "goat")
    assert listing.split_name == "train/valid/val"
    rows = {row["image_id"]: (row["split"], row["labels"]) for row in listing.table.to_pylist()}
    assert rows == {
        "train/1": ("train", [0]),
        "train/2": ("train", [0, 1]),
        "valid/1": ("val", [1]),  # both files have an image 1
        "val/101": ("test", []),
    }
    boxes = placed(listing, tmp_path)
    assert boxes.images["valid/1"].classes.tolist() == [2]


@pytest.mark.parametrize("shift", [10_236_529_000, 2**63, 2**70])
def test_ids_of_any_size(tmp_path: Path, shift: int) -> None:
    def change(content: dict[str, Any]) -> None:
        each("images", id=lambda value: value + shift)(content)
        each("annotations", image_id=lambda value: value + shift, id=lambda n: n + shift)(content)

    write_farm(tmp_path, change)
    assert images_of(read_coco(tmp_path, FARM), tmp_path) == {
        str(int(key) + shift): value for key, value in EXPECTED.items()
    }


def test_ids_that_are_names(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        each("images", id=lambda value: f"img{value}")(content)
        each("annotations", image_id=lambda value: f"img{value}")(content)

    write_farm(tmp_path, change)
    assert list(images_of(read_coco(tmp_path, FARM), tmp_path)) == ["img1", "img2"]


def test_byte_order_mark_before_json(tmp_path: Path) -> None:
    write_farm(tmp_path, start=b"\xef\xbb\xbf")
    assert images_of(read_coco(tmp_path, FARM), tmp_path) == EXPECTED


@pytest.mark.parametrize("box", [None, [], [None] * 4, "absent"])
def test_annotation_without_a_box_is_a_label(tmp_path: Path, box: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][1]["bbox"] = box
        if box == "absent":
            del content["annotations"][1]["bbox"]

    write_farm(tmp_path, change)
    listing = read_coco(tmp_path, FARM)
    assert images_of(listing, tmp_path) == EXPECTED
    boxes = placed(listing, tmp_path)
    assert boxes.incomplete == {"2"}
    assert boxes.images["2"].classes.tolist() == [2]


def test_negative_sizes_are_of_another_corner(tmp_path: Path) -> None:
    write_farm(tmp_path, each("annotations", bbox=[14, 7, -10, -5]))
    listing = read_coco(tmp_path, FARM)
    boxes = placed(listing, tmp_path)
    expected = pa.array([[0.2, 0.2, 0.7, 0.7]], pa.list_(pa.float32())).to_pylist()
    assert boxes.images["1"].boxes.tolist() == expected
    assert "annotations[0]" in "".join(listing.notes)


@pytest.mark.parametrize(
    ("prefix", "folder", "noted"),
    [
        ("images\\", "train/images/", False),
        ("./", "train/", False),
        (".\\", "train/", False),
        ("train/", "train/", False),
        ("train\\", "train/", False),
        ("images/", "images/", False),
        ("/home/me/farm/train/", "train/", True),
        ("C:\\farm\\", "train/", True),
        ("../images/", "images/", True),
        ("data/media/upload/1/", "train/", True),
        ("farm/sub/", "train/sub/", True),
    ],
)
def test_paths_in_file_name(tmp_path: Path, prefix: str, folder: str, noted: bool) -> None:
    images = (f"{folder}a.jpg", f"{folder}b.jpg", "val/c.jpg")
    write_farm(tmp_path, each("images", file_name=lambda name: prefix + name), images=images)
    listing = read_coco(tmp_path, FARM)
    found = images_of(listing, tmp_path)
    assert [path for path, _ in found.values()] == list(images[:2])
    assert (str(images[0]) in "".join(listing.notes)) == noted


def test_path_that_does_not_exist_is_expected_in_the_folder_of_the_split(tmp_path: Path) -> None:
    names = iter(["../../etc/passwd", "/nowhere/b.jpg"])
    write_farm(tmp_path, each("images", file_name=lambda name: next(names)), images=())
    paths = read_coco(tmp_path, FARM).table.column("path").to_pylist()
    assert paths == ["train/passwd", "train/b.jpg", "val/c.jpg"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_file_that_two_images_share_is_refused(tmp_path: Path, split: str) -> None:
    """With paths of another machine, or two records of a file; also in two splits."""
    names = {1: "C:\\x\\a.jpg", 2: "C:\\y\\a.jpg", 101: "C:\\z\\a.jpg"}
    if split == "val":
        names[2] = "b.jpg"

    def change(content: dict[str, Any]) -> None:
        for record in content["images"]:
            record["file_name"] = names[record["id"]]

    images = ("a.jpg", "train/b.jpg") if split == "val" else ("train/a.jpg", "val/a.jpg")
    write_farm(tmp_path / "farm", change, test=change, images=images)
    second = "'2' (train)" if split == "train" else "'101' (test)"
    with refused(InputError, "farm: ", "'1' (train)", second, images[0]):
        as_on_disk(tmp_path / "farm", read_coco(tmp_path / "farm", FARM))
    again = {1: "a.jpg", 2: "a.jpg", 101: "c.jpg"}
    names.update(again)
    write_farm(tmp_path / "farm", change, test=change)
    with refused(InputError, "'1' (train)", "'2' (train)", "train/a.jpg"):
        as_on_disk(tmp_path / "farm", read_coco(tmp_path / "farm", FARM))


def test_name_from_the_address_of_an_image(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for record in content["images"]:
            record["coco_url"] = f"http://example.org/x/{record.pop('file_name')}"

    write_farm(tmp_path, change)
    assert images_of(read_coco(tmp_path, FARM), tmp_path) == EXPECTED


def test_file_names_and_labels_in_another_unicode_form(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "é.jpg")
    names = iter(["é.jpg", "b.jpg"])

    def change(content: dict[str, Any]) -> None:
        each("images", file_name=lambda name: next(names))(content)
        content["categories"][0]["name"] = unicodedata.normalize("NFD", "\u200bfée\u00a0")

    def test(content: dict[str, Any]) -> None:
        content["categories"][0]["name"] = "fée"

    write_farm(tmp_path, change, test=test, images=(f"train/{apart}", "train/b.jpg", "val/c.jpg"))
    listing = read_coco(tmp_path, FARM)
    assert images_of(listing, tmp_path)["1"] == (f"train/{apart}", ["fée"])
    assert listing.vocabulary == ("fée", "barn")


def test_folders_in_another_unicode_form_and_names_without_suffix(tmp_path: Path) -> None:
    """The whole path is looked for before a part of it."""
    apart = unicodedata.normalize("NFD", "é")
    names = iter(["é/a.jpg", "images/b"])
    images = (f"train/{apart}/a.jpg", "images/b.jpg", "val/c.jpg", "train/a.jpg")
    write_farm(tmp_path, each("images", file_name=lambda name: next(names)), images=images)
    listing = read_coco(tmp_path, FARM)
    assert [path for path, _ in images_of(listing, tmp_path).values()] == [*images[:2]]
    [note] = listing.notes
    assert all(part in note for part in ("1 of 2", "'images/b'", "'images/b.jpg'"))


def test_folders_are_listed_once(tmp_path: Path) -> None:
    write_farm(tmp_path)
    with mock.patch("os.scandir", wraps=os.scandir) as scandir:
        listing = as_on_disk(tmp_path, read_coco(tmp_path, FARM))
        make_manifest(listing, "farm", tmp_path, FARM)
    folders = [str(call.args[0]) for call in scandir.call_args_list]
    assert len(folders) == len(set(folders)), folders


def test_files_that_count_from_the_same_number(tmp_path: Path) -> None:
    write_farm(tmp_path, test=each("images", id=1))
    listing = read_coco(tmp_path, FARM)
    assert listing.table.column("image_id").to_pylist() == ["train/1", "train/2", "val/1"]
    assert listing.table.column("labels").to_pylist() == [[0], [0, 1], []]
    assert "val/<id>" in "".join(listing.notes)


def test_annotations_beside_the_photographs(tmp_path: Path) -> None:
    names = ("train/_annotations.coco.json", "val/_annotations.coco.json")
    write_farm(tmp_path, files=names)
    listing = read_coco(tmp_path, FARM)
    assert images_of(listing, tmp_path) == EXPECTED
    assert list(listing.sources) == list(names)


def test_missing_file_of_own_data_names_settings_and_files(tmp_path: Path) -> None:
    root = tmp_path / "farm"
    write_farm(root, files=("labels.json", "annotations/test.json"))
    with refused(
        MissingError, "annotations/instances_train.json", "`prepare.farm.train`", "labels.json"
    ):
        read_coco(root, FARM)


def test_categories_may_start_at_zero_repeat_or_be_unused(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"] = [
            {"id": 0, "name": "animals"},
            {"id": 2, "name": "barn"},
            {"id": 1, "name": "cow"},
            {"id": 5, "name": "cow"},
        ]
        content["annotations"][0]["category_id"] = 5

    write_farm(tmp_path, change, test=change_names)
    listing = read_coco(tmp_path, FARM)
    assert listing.vocabulary == ("animals", "cow", "barn", "goat")
    assert images_of(listing, tmp_path) == EXPECTED
    assert "'cow'" in "".join(listing.notes)
    assert "animals" in "".join(listing.notes)
    assert "goat" in "".join(listing.notes)


def change_names(content: dict[str, Any]) -> None:
    """Other numbers for the same names, and a name of its own."""
    names = ["barn", "cow", "goat"]
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    content["annotations"].append(coco_object(1, 101, 1))


def test_annotations_of_unknown_images(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"].insert(0, coco_object(9, 77, 2))

    write_farm(tmp_path, change)
    listing = read_coco(tmp_path, FARM)
    assert images_of(listing, tmp_path) == EXPECTED
    assert not placed(listing, tmp_path).incomplete
    assert all(part in "".join(listing.notes) for part in ("1 of 4", "annotations[0]", "77"))
    write_farm(tmp_path, each("annotations", image_id=lambda value: value + 50))
    with refused(InputError, "instances_train.json", "annotations[0]", "51", "`image_id`"):
        read_coco(tmp_path, FARM)


def test_listed_sizes_of_other_frames_reach_the_boxes(tmp_path: Path) -> None:
    """Twice the size of the photograph, with boxes in its pixels."""
    double = (2 * SIZE[0], 2 * SIZE[1])
    write_farm(tmp_path, each("images", width=double[0], height=double[1]))
    boxes = placed(read_coco(tmp_path, FARM), tmp_path).images["1"].boxes
    assert boxes.tolist() == pa.array([[0.1, 0.1, 0.35, 0.35]], pa.list_(pa.float32())).to_pylist()


# --- relative boxes and crowds -------------------------------------------------------------------


def test_boxes_between_0_and_1_are_relative(tmp_path: Path) -> None:
    write_farm(tmp_path, each("annotations", bbox=[0.1, 0.2, 0.5, 0.8]))
    listing = read_coco(tmp_path, FARM)
    boxes = placed(listing, tmp_path)
    np.testing.assert_allclose(boxes.images["1"].boxes, [[0.1, 0.2, 0.6, 1]], rtol=1e-6)
    (note,) = listing.notes
    assert "instances_train.json" in note


def test_one_split_with_relative_boxes_leaves_pixels_in_the_other(tmp_path: Path) -> None:
    box = coco_object(9, 101, 1, bbox=[0, 0, 0.5, 1])
    write_farm(tmp_path, test=lambda content: content["annotations"].append(box))
    listing = read_coco(tmp_path, FARM)
    boxes = placed(listing, tmp_path)
    np.testing.assert_allclose(boxes.images["1"].boxes, [[0.2, 0.2, 0.7, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(boxes.images["101"].boxes, [[0, 0, 0.5, 1]], rtol=1e-6)
    (note,) = listing.notes
    assert "instances_val.json" in note


def test_images_of_nothing_but_crowds_are_incomplete(tmp_path: Path) -> None:
    write_farm(tmp_path, each("annotations", iscrowd=1))
    listing = read_coco(tmp_path, FARM)
    boxes = placed(listing, tmp_path)
    assert boxes.incomplete == {"1", "2"}
    assert images_of(listing, tmp_path) == EXPECTED
    (note,) = listing.notes
    for part in ("instances_train.json", "2 of 2", "'a.jpg'", "`iscrowd: 1`", "`iscrowd` to 0"):
        assert part in note


def test_crowd_beside_another_object_of_its_class_leaves_an_image_complete(tmp_path: Path) -> None:
    crowd = coco_object(9, 1, 1, iscrowd=1)
    write_farm(tmp_path, lambda content: content["annotations"].append(crowd))
    listing = read_coco(tmp_path, FARM)
    boxes = placed(listing, tmp_path)
    assert boxes.incomplete == frozenset()
    assert len(boxes.images["1"].classes) == 1
    assert listing.notes == ()


# --- one file ------------------------------------------------------------------------------------


def test_one_file_is_split_by_a_share(tmp_path: Path) -> None:
    images = [coco_image(number, file_name=f"{number}.jpg") for number in range(1, 41)]
    content = coco_file(images, [coco_object(number, number, 1) for number in range(1, 41)])
    path = tmp_path / "annotations/instances_default.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    settings = CocoSettings(source="coco", train="default", test_share=0.3)
    listing = read_coco(tmp_path, settings)
    rows = listing.table.to_pylist()
    tests = {row["path"] for row in rows if row["split"] == "test"}
    assert tests == {row["path"] for row in rows if hash_fraction(row["path"]) < 0.3}
    assert 0 < len(tests) < 40
    assert list(listing.sources) == ["annotations/instances_default.json"]
    with refused(InputError, "instances_default.json", "`test_share: 1e-09`", "`test`"):
        read_coco(tmp_path, settings.model_copy(update={"test_share": 1e-9}))


@pytest.mark.parametrize(
    ("splits", "part"),
    [
        ({"train": "default", "test": "default"}, "test_share: 0.2"),
        ({"train": "a", "val": "a", "test": "b"}, "named twice"),
        ({"train": "a", "test": "b", "test_share": 0.2}, "remove `test`"),
    ],
)
def test_splits_that_would_share_images_are_refused(splits: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        CocoSettings(source="coco", **splits)
