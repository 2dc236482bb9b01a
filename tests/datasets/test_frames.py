"""pipeline.datasets.frames: boxes drawn on another picture than the upright one.

The oracle is a picture with a white rectangle, turned by the code that decodes photographs.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image

from pipeline.datasets.frames import place_boxes, same_headers, turn_boxes
from pipeline.datasets.listing import ListedBoxes, Listing, listed_manifest
from pipeline.datasets.manifest import COLUMNS, BoxTable, Manifest, read_boxes, write_boxes
from pipeline.regions.transforms import load_image
from pipeline.settings import BoxFrame, VocSettings

SIZE = (40, 24)  # of the stored picture
BOX = (4, 3, 16, 9)  # of the rectangle in it: x0, y0, x1, y1 in pixels
KEY = "`prepare.garden.box_frame`"


def draw(path: Path, orientation: int = 1, size: tuple[int, int] = SIZE) -> None:
    """A black picture with a white rectangle at `BOX`, and an EXIF orientation."""
    image = Image.new("RGB", size)
    image.paste("white", BOX)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, **({} if orientation == 1 else {"exif": exif.tobytes()}))


def white(path: Path) -> list[float]:
    """Where the rectangle is in the decoded picture, xyxy in [0,1]."""
    picture = np.asarray(load_image(path).convert("L")) > 127
    rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
    height, width = picture.shape
    return [
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + 1) / width,
        (rows[-1] + 1) / height,
    ]


Shown = tuple[str, tuple[int, int] | None, Any]
"""An image as its data set lists it: file name, size, and box in pixels."""


def place(
    root: Path, images: list[Shown], frame: BoxFrame = "auto"
) -> tuple[dict[str, tuple[int | None, int | None]], BoxTable, str]:
    """Image id -> size in the manifest; the boxes; and the notes, one a line."""
    table = pa.Table.from_pylist(
        [
            {
                "image_id": name,
                "path": name,
                "split": "train",
                "labels": [0],
                "ignored": [],
                "width": size[0] if size else None,
                "height": size[1] if size else None,
            }
            for name, size, _ in [*images, ("test.png", SIZE, BOX)]
        ],
        schema=COLUMNS,
    )
    splits = pa.array(["train"] * len(images) + ["test"])
    table = table.set_column(2, COLUMNS.field("split"), splits)
    pixels = np.array([box for *_, box in images], dtype=np.float64).reshape(-1, 4)
    boxes = ListedBoxes(np.arange(len(images)), np.ones(len(images), dtype=np.int64), pixels)
    draw(root / "test.png")
    listing = Listing(("bee",), "own", {}, table, boxes)
    manifest: Manifest = listed_manifest(listing, "garden", VocSettings(source="voc"))
    manifest, boxes_table = place_boxes(listing, manifest, root, frame)
    rows = manifest.table.to_pylist()
    sizes = {row["image_id"]: (row["width"], row["height"]) for row in rows}
    return sizes, boxes_table, "\n".join(manifest.notes)


def box_of(table: BoxTable, name: str) -> list[list[float]]:
    boxes: list[list[float]] = table.images[name].boxes.tolist()
    return boxes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_boxes_is_what_turning_the_picture_does(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.png"
    draw(path, orientation)
    unit = np.array([BOX]) / np.tile(SIZE, 2)
    np.testing.assert_allclose(turn_boxes(unit, np.array([orientation])), [white(path)], atol=1e-9)


def test_each_box_is_turned_by_its_own_orientation() -> None:
    unit = np.tile([[0.1, 0.2, 0.3, 0.5]], (8, 1))
    together = turn_boxes(unit, np.arange(1, 9))
    for orientation, box in enumerate(together, start=1):
        assert turn_boxes(unit[:1], np.array([orientation]))[0].tolist() == box.tolist()
    np.testing.assert_allclose(turn_boxes(together, np.array([1, 2, 3, 4, 5, 8, 7, 6])), unit)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_manifest_has_the_size_of_the_decoded_picture(
    tmp_path: Path, name: str, orientation: int
) -> None:
    draw(tmp_path / name, orientation)
    sizes, table, _ = place(tmp_path, [(name, SIZE, BOX)], "stored")
    assert sizes[name] == load_image(tmp_path / name).size
    np.testing.assert_allclose(box_of(table, name), [white(tmp_path / name)], atol=0.06)


def test_orientation_after_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    draw(path)
    content = path.read_bytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    end = content.index(b"IEND") - 4
    path.write_bytes(content[:end] + chunk + content[end:])
    sizes, table, _ = place(tmp_path, [("a.png", SIZE, BOX)])
    assert sizes["a.png"] == SIZE[::-1] == load_image(path).size
    np.testing.assert_allclose(box_of(table, "a.png"), [white(path)], atol=1e-6)


def turned(box: Any) -> list[float]:
    """A box of the stored picture, as it is in the one turned by orientation 6."""
    x0, y0, x1, y1 = box
    return [SIZE[1] - y1, x0, SIZE[1] - y0, x1]


@pytest.mark.parametrize("scale", [1, 0.5, 3])
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_listed_size_tells_the_frame(tmp_path: Path, frame: str, scale: float) -> None:
    draw(tmp_path / "a.png", 6)
    size, box = (SIZE, BOX) if frame == "stored" else (SIZE[::-1], turned(BOX))
    listed = (round(size[0] * scale), round(size[1] * scale))
    sizes, table, notes = place(tmp_path, [("a.png", listed, [side * scale for side in box])])
    np.testing.assert_allclose(box_of(table, "a.png"), [white(tmp_path / "a.png")], atol=1e-6)
    assert sizes["a.png"] == SIZE[::-1]
    assert not table.incomplete
    if frame == "stored":
        assert all(part in notes for part in ("a.png", KEY, "`upright`"))
    else:
        assert ("a.png" in notes) == (scale != 1)  # resized pictures are noted


def test_upright_pictures_are_not_noted(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    _, table, notes = place(tmp_path, [("a.png", SIZE, BOX)])
    np.testing.assert_allclose(box_of(table, "a.png"), [white(tmp_path / "a.png")], atol=1e-6)
    assert not notes


@pytest.mark.parametrize("orientation", [1, 6])
def test_size_that_is_not_listed_is_the_files(tmp_path: Path, orientation: int) -> None:
    draw(tmp_path / "a.png", orientation)
    sizes, table, _ = place(tmp_path, [("a.png", None, BOX)], "stored")
    np.testing.assert_allclose(box_of(table, "a.png"), [white(tmp_path / "a.png")], atol=1e-6)
    assert sizes["a.png"] == load_image(tmp_path / "a.png").size


UNDECIDED = [
    ("half.png", 3, SIZE, SIZE),
    ("mirrored.png", 2, SIZE, SIZE),
    ("square.png", 6, (24, 24), (24, 24)),
    ("unlisted.png", 8, SIZE, None),
]


@pytest.mark.parametrize(("name", "orientation", "size", "listed"), UNDECIDED)
def test_boxes_whose_frame_nothing_tells_are_left_out(
    tmp_path: Path,
    name: str,
    orientation: int,
    size: tuple[int, int],
    listed: tuple[int, int] | None,
) -> None:
    draw(tmp_path / name, orientation, size)
    sizes, table, notes = place(tmp_path, [(name, listed, BOX)])
    assert box_of(table, name) == []
    assert table.incomplete == {name}
    assert sizes[name] == load_image(tmp_path / name).size
    assert all(part in notes for part in (name, KEY, "`upright`", "`stored`"))
    for frame in ("stored", "upright"):
        _, table, notes = place(tmp_path, [(name, listed, BOX)], frame)
        assert not table.incomplete
        expected = white(tmp_path / name)
        if frame == "upright":
            width, height = load_image(tmp_path / name).size
            expected = [BOX[0] / width, BOX[1] / height, BOX[2] / width, BOX[3] / height]
        np.testing.assert_allclose(box_of(table, name), [expected], atol=1e-6)
    assert not notes


@pytest.mark.parametrize(("name", "orientation", "size", "listed"), UNDECIDED)
def test_other_turned_pictures_tell_the_frame(
    tmp_path: Path,
    name: str,
    orientation: int,
    size: tuple[int, int],
    listed: tuple[int, int] | None,
) -> None:
    draw(tmp_path / name, orientation, size)
    draw(tmp_path / "telling.png", 6)
    images: list[Shown] = [(name, listed, BOX), ("telling.png", SIZE, BOX)]
    _, table, notes = place(tmp_path, images)
    for image in (name, "telling.png"):
        np.testing.assert_allclose(box_of(table, image), [white(tmp_path / image)], atol=1e-6)
    assert all(part in notes for part in (name, KEY, "`stored`"))
    # Two that contradict each other tell nothing.
    draw(tmp_path / "other.png", 6)
    _, table, notes = place(tmp_path, [*images, ("other.png", SIZE[::-1], turned(BOX))])
    assert table.incomplete == {name}
    np.testing.assert_allclose(box_of(table, "other.png"), [white(tmp_path / "other.png")])


def test_setting_overrides_sizes_of_the_other_picture(tmp_path: Path) -> None:
    """A tool that draws on the upright picture, but lists the size of the stored one."""
    draw(tmp_path / "a.png", 6)
    _, table, _ = place(tmp_path, [("a.png", SIZE, turned(BOX))], "upright")
    np.testing.assert_allclose(box_of(table, "a.png"), [white(tmp_path / "a.png")], atol=1e-6)
    draw(tmp_path / "b.png")  # width and height exchanged in the list
    _, table, _ = place(tmp_path, [("b.png", SIZE[::-1], BOX)], "upright")
    np.testing.assert_allclose(box_of(table, "b.png"), [white(tmp_path / "b.png")], atol=1e-6)


@pytest.mark.parametrize("frame", ["auto", "upright", "stored"])
def test_file_that_was_not_annotated_has_no_boxes(tmp_path: Path, frame: BoxFrame) -> None:
    for number in range(5):
        draw(tmp_path / f"{number}.png")
    images: list[Shown] = [(f"{number}.png", (40, 40), BOX) for number in range(5)]
    sizes, table, notes = place(tmp_path, images, frame)
    assert table.incomplete == {f"{number}.png" for number in range(5)}
    assert sizes["0.png"] == SIZE
    parts = ("5 photographs", "0.png", "2.png and 2 more", "40 x 40", "40 x 24")
    assert all(part in notes for part in parts)


def test_a_pixel_of_rounding_is_the_same_shape(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", size=(41, 25))
    _, table, _ = place(tmp_path, [("a.png", (20, 12), [2, 1.5, 8, 4.5])])
    np.testing.assert_allclose(box_of(table, "a.png"), [[0.1, 0.125, 0.4, 0.375]])
    assert not table.incomplete


@pytest.mark.parametrize("content", [None, b"", b"\xff\xd8\xff\xe0broken"])
def test_file_that_cant_be_read_keeps_its_listed_size(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    sizes, table, notes = place(tmp_path, [("a.jpg", SIZE, BOX)])
    assert sizes["a.jpg"] == SIZE
    assert not table.incomplete
    assert not notes
    sizes, table, notes = place(tmp_path, [("a.jpg", None, BOX)])
    assert sizes["a.jpg"] == (None, None)
    assert table.incomplete == {"a.jpg"}
    assert "a.jpg" in notes


def test_odd_boxes_are_noted(tmp_path: Path) -> None:
    nan = float("nan")
    boxes = {
        "none.png": [nan] * 4,
        "empty.png": [5, 5, 5, 9],
        "outside.png": [50, 5, 60, 9],
        "beyond.png": [30, 5, 48, 9],
        "edge.png": [-1, -0.5, 41, 25],
    }
    for name in boxes:
        draw(tmp_path / name)
    _, table, notes = place(tmp_path, [(name, SIZE, box) for name, box in boxes.items()])
    assert table.incomplete == {"none.png", "empty.png", "outside.png"}
    assert box_of(table, "edge.png") == [[0, 0, 1, 1]]
    assert box_of(table, "beyond.png")[0][2] == 1
    lines = notes.splitlines()
    assert len(lines) == 3
    assert ["none.png" in note for note in lines].count(True) == 1
    assert any("empty.png, outside.png" in note for note in lines)
    assert any("beyond.png" in note and "edge.png" not in note for note in lines)


def test_incomplete_images_are_kept_in_the_file(tmp_path: Path) -> None:
    draw(tmp_path / "half.png", 3)
    draw(tmp_path / "none.png")
    nan = float("nan")
    (tmp_path / "broken.png").write_text("not a picture")
    images: list[Shown] = [("half.png", SIZE, BOX), ("none.png", SIZE, [nan] * 4)]
    _, table, _ = place(tmp_path, [*images, ("broken.png", None, BOX)])
    write_boxes(tmp_path / "boxes.parquet", table)
    read = read_boxes(tmp_path / "boxes.parquet", ["half.png"])
    assert read.incomplete == {"half.png", "none.png", "broken.png"}
    assert read.left_out == {"half.png": (*SIZE, 3), "broken.png": None}
    assert same_headers(tmp_path, read.left_out)
    draw(tmp_path / "broken.png")
    assert not same_headers(tmp_path, read.left_out)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_that_fit_only_the_other_picture_are_of_it(tmp_path: Path, orientation: int) -> None:
    draw(tmp_path / "a.png", orientation)
    width, height = SIZE[::-1]  # upright; the stored size is listed
    upright = [
        round(s * n) for s, n in zip(white(tmp_path / "a.png"), (width, height) * 2, strict=True)
    ]
    upright[3] = height
    shown: list[Shown] = [("a.png", SIZE, upright), ("b.png", SIZE, (4, 3, 16, 9))]
    draw(tmp_path / "b.png", orientation)
    _, table, notes = place(tmp_path, shown)
    expected = np.array(upright) / [width, height, width, height]
    np.testing.assert_allclose(box_of(table, "a.png"), [expected], rtol=1e-6)
    (note,) = (line for line in notes.splitlines() if "exchanged" in line)
    assert "a.png" in note
    assert "b.png" not in note
    assert "cut off" not in notes


def test_photographs_that_decide_for_others_are_counted_among_those_with_boxes(
    tmp_path: Path,
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / name, 6)
    draw(tmp_path / "d.png", 3)
    nothing = (float("nan"),) * 4
    shown: list[Shown] = [
        ("a.png", SIZE, BOX),
        ("b.png", SIZE, nothing),
        ("c.png", SIZE, nothing),
        ("d.png", SIZE, BOX),
    ]
    _, _, notes = place(tmp_path, shown)
    assert "1 photograph (a.png)" in notes
    assert "1 photograph (d.png) are read as `stored`, like those of 1 other photograph:" in notes
