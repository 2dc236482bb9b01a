"""Lines of a foreign file find their images in a manifest, or are named with those they fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from refusals import refused

from pipeline.errors import InputError
from pipeline.shards.imports import KnownImage, match_lines


@dataclass(frozen=True)
class Row:
    file_id: str
    width: int = 200
    height: int = 100

    @property
    def where(self) -> str:
        return f"line {self.file_id!r}"


def matched(file_ids: list[str], images: list[str] | list[KnownImage]) -> list[int]:
    """The image of each line. An image given as a text has it as its id and as its path."""
    known = [
        image if isinstance(image, KnownImage) else KnownImage(image, image) for image in images
    ]
    return match_lines([Row(file_id) for file_id in file_ids], known).tolist()


COCO = "COCO_val2014_000000000042"


@pytest.mark.parametrize(
    "file_id",
    [
        COCO,
        f"{COCO}.jpg",
        f"{COCO}.png",
        f"{COCO}.npy",
        f"val2014/{COCO}",
        f"val2014/{COCO}.jpg",
        f"val2014\\{COCO}.jpg",
        f"/data/coco/val2014/{COCO}.jpg",
        "42",
        "42.0",
        "42.jpg",
        "000000000042",
        "000000000042.jpg",
        "val2014/000000000042.jpg",
    ],
)
@pytest.mark.parametrize(
    "image",
    [
        KnownImage("42", f"val2014/{COCO}.jpg"),
        KnownImage(COCO, f"images/val2014/{COCO}.jpg"),
        KnownImage(f"val2014/{COCO}.jpg", f"val2014/{COCO}.jpg"),
    ],
)
def test_cocos_ids_are_matched_in_every_common_form(file_id: str, image: KnownImage) -> None:
    other = KnownImage("COCO_val2014_000000000142", "val2014/COCO_val2014_000000000142.png")
    assert matched([file_id], [other, image]) == [1]


@pytest.mark.parametrize(
    ("file_ids", "images", "expected"),
    [
        # the same id goes first, also where it is another image's file name
        (["cat"], [KnownImage("dog", "cat"), KnownImage("cat", "dog")], [1]),
        (["a/cat", "b/cat"], ["b/cat.jpg", "a/cat.jpg"], [1, 0]),
        (["cat.png"], ["cat.jpg", "cat.png.jpg", "x/cat.png"], [2]),
        (["dr.who"], ["dr.no.jpg", "dr.who.jpg"], [1]),
        (["IMG_1_jpg.rf.a1b2"], ["IMG_1_jpg.rf.c3.jpg", "IMG_1_jpg.rf.a1b2.jpg"], [1]),
        (["x/a/cat"], ["cat.jpg", "a/cat.jpg"], [1]),
        (["cafe\u0301.jpg"], ["x/caf\u00e9.png"], [0]),
        (["00042", "0", "7a"], ["x042", "x000", "x7"], [0, 1, -1]),
        # other folders never match
        (["test/cat", "test/7"], ["train/cat.jpg", "train/7.jpg"], [-1, -1]),
        (["1002", "cat", ""], ["2100", "scat.jpg", "x"], [-1, -1, -1]),
        # a number alone is weak: it is used if nothing else fits, and only for one image
        (["x100"], ["a100", "100"], [1]),
        (["x100"], ["a100", "b100"], [-1]),
        (["a100", "x100"], ["a100"], [0, -1]),
        # a suffix may have digits, which are no number of an image
        (["IMG_0000.h5"], ["IMG_0005.jpg", "IMG_0000.jpg"], [1]),
        (["IMG_0000.h5"], ["IMG_0005.jpg", "5.jpg"], [-1]),
        (["IMG_7.npy.gz", "8.jpg.npy.gz"], ["8.jpg", "IMG_7.jpg"], [1, 0]),
        (["IMG_7.hdf5", "IMG_8.pt2"], ["IMG_8.jpg", "IMG_7.jpg"], [1, 0]),
        # nor have views and crops
        (["IMG_0042_1"], ["IMG_0001.jpg", "1.jpg"], [-1]),
        (["IMG_0042.jpg_1"], ["IMG_0001.jpg", "IMG_0042.jpg"], [-1]),
        (["IMG_0042.jpg_features2"], ["IMG_0002.jpg", "2.jpg"], [-1]),
        (["7"], ["IMG_0042_7.jpg"], [-1]),
    ],
)
def test_lines_are_matched_by_the_first_rule_that_fits(
    file_ids: list[str], images: list[str] | list[KnownImage], expected: list[int]
) -> None:
    assert matched(file_ids, images) == expected


@pytest.mark.parametrize("form", ["clip{:02d}/7.jpg", "clip{:02d}/images/frame7.jpg"])
def test_the_number_of_a_frame_is_looked_for_in_its_own_folder(form: str) -> None:
    images = [form.format(clip) for clip in range(15)]
    file_ids = [form.format(clip).replace("7.jpg", "0007") for clip in (3, 12)]
    assert matched(file_ids, images) == [3, 12]


@pytest.mark.parametrize(
    ("file_id", "images"),
    [
        ("cat", ["a/cat.jpg", "b/cat.jpg"]),
        ("cat", ["cat.jpg", "cat.png"]),
        ("cat.npy", ["cat.jpg", "cat.png"]),
        ("42", ["a42", "b42"]),
        ("a0042", ["a/42", "b/042"]),
    ],
)
def test_a_line_that_fits_two_images_is_named_with_both(file_id: str, images: list[str]) -> None:
    with refused(InputError, f"line {file_id!r}", *map(repr, images)):
        matched([file_id], ["dog", *images])


def test_two_lines_of_one_image_are_named() -> None:
    for first, second in (("x100", "000100"), ("100", "100.jpg"), ("a/100.png", "100.jpg")):
        with refused(InputError, "'100'", f"line {first!r}", f"line {second!r}"):
            matched([first, second], [KnownImage("100", "a/100.jpg")])


def test_a_number_of_an_image_of_another_size_is_named() -> None:
    for size in ((200, 100), (None, None), (None, 7)):
        assert match_lines([Row("COCO_101")], [KnownImage("101", "x", *size)]).tolist() == [0]
    with refused(InputError, "line 'COCO_101'", "'101'", "200 x 100", "100 x 150"):
        match_lines([Row("COCO_101")], [KnownImage("101", "x", 100, 150)])


@pytest.mark.parametrize("file_id", ["101", "x/101.jpg", "101.npy", "00101"])
@pytest.mark.parametrize("size", [(40, 30), (100, 150), (1, 300), (203, 100), (180, 180)])
def test_a_line_of_another_shape_is_named_however_it_was_matched(
    file_id: str, size: tuple[int, int]
) -> None:
    image = KnownImage("101", "x/101.jpg", *size)
    numbers = "[{0} / 200, {1} / 100, {0} / 200, {1} / 100]".format(*size)
    with refused(
        InputError, f"line {file_id!r}", "'101'", "200 x 100", f"{size[0]} x {size[1]}", numbers
    ):
        match_lines([Row(file_id)], [image])


@pytest.mark.parametrize("size", [(400, 200), (333, 167), (334, 166), (67, 33), (201, 100)])
def test_a_line_of_a_resized_picture_needs_no_note(
    size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    assert match_lines([Row("101")], [KnownImage("101", "x", *size)]).tolist() == [0]
    assert match_lines([Row("101", *size)], [KnownImage("101", "x", 200, 100)]).tolist() == [0]
    assert not caplog.records


def test_lines_of_pictures_resized_to_a_square_are_read_with_one_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = [KnownImage("1", "1.jpg", 200, 100), KnownImage("2", "2.jpg", 100, 130)]
    # 1 x 1 stands for an unknown size, with boxes in [0, 1].
    assert match_lines([Row(name, 1, 1) for name in ("1", "2")], images).tolist() == [0, 1]
    assert not caplog.records
    assert match_lines([Row(name, 448, 448) for name in ("1", "2")], images).tolist() == [0, 1]
    (note,) = [record.getMessage() for record in caplog.records]
    for part in ("2 of 2", "line '1'", "448 x 448", "200 x 100", "square"):
        assert part in note


def test_lines_of_turned_photographs_are_read_with_one_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the number, the id and the file name; the last line is not turned."""
    images = [
        KnownImage("COCO_42", "x/COCO_42.jpg", 480, 640),
        KnownImage("COCO_43", "x/COCO_43.jpg", 480, 640),
        KnownImage("COCO_44", "x/COCO_44.jpg", 480, 640),
        KnownImage("COCO_45", "x/COCO_45.jpg", 640, 480),
        KnownImage("COCO_46", "x/COCO_46.jpg", 960, 1280),
    ]
    lines = [Row(name, 640, 480) for name in ("42", "COCO_43", "COCO_44.jpg", "45", "46")]
    assert match_lines(lines, images).tolist() == [0, 1, 2, 3, 4]
    (note,) = [record.getMessage() for record in caplog.records]
    for part in ("4 of 5 images", "line '42'", "'COCO_42'", "640 x 480", "480 x 640"):
        assert part in note
    assert match_lines([Row("42", 480, 480)], [KnownImage("42", "42.jpg", 480, 480)]) == [0]
    assert len(caplog.records) == 1


def test_a_match_by_the_number_alone_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    assert matched(["COCO_42", "42.jpg"], ["42", "7/COCO_42.png"]) == [1, 0]
    assert not caplog.records
    assert matched(["x7", "x8"], ["photo8.jpg", "photo7.jpg"]) == [1, 0]
    (note,) = [record.getMessage() for record in caplog.records]
    for part in ("'x7'", "'photo7.jpg'", "1 more"):
        assert part in note
