"""Files of boxes, at which features are pooled: what they mean, and which are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import S, Scenes, draw_scenes
from PIL import ExifTags, Image
from region_files import write_box_file

from pipeline.datasets.manifest import COLUMNS
from pipeline.errors import InputError
from pipeline.regions.given_boxes import GivenBoxes, read_box_file


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


def some_rows(scenes: Scenes, **changes: Any) -> dict[str, list[Any]]:
    """Three boxes of two images; a change is a row and its value."""
    first, second = scenes.manifest.image_ids("train")[:2]
    rows: dict[str, list[Any]] = {
        "image_id": [first, second, first],
        "box": [[0.0, 0.0, 32.0, 16.0], [4.0, 8.0, 64.0, 64.0], [-0.5, 1.0, 64.9, 2.0]],
        "score": [0.5, 0.25, 0.75],
        "class": [3, 1, 0],
    }
    for name, (row, value) in changes.items():
        rows[name.rstrip("_")][row] = value
    return rows


def read(scenes: Scenes, path: Path) -> GivenBoxes:
    return read_box_file(path, scenes.manifest, scenes.root)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("known", [True, False], ids=["size-listed", "size-of-the-file"])
def test_rows_become_boxes_of_their_images(
    scenes: Scenes, tmp_path: Path, suffix: str, known: bool
) -> None:
    rows = some_rows(scenes)
    manifest = scenes.manifest
    if not known:
        blank = [{**row, "width": None, "height": None} for row in manifest.table.to_pylist()]
        manifest = replace(manifest, table=pa.Table.from_pylist(blank, schema=COLUMNS))
    path = write_box_file(tmp_path / f"boxes.{suffix}", rows)
    boxes = read_box_file(path, manifest, scenes.root)
    assert list(boxes.images) == rows["image_id"][:2]
    first, second = boxes.images.values()
    np.testing.assert_array_equal(first.boxes, [[0, 0, 0.5, 0.25], [0, 1 / 64, 1, 2 / 64]])
    np.testing.assert_array_equal(second.boxes, [[1 / 16, 1 / 8, 1, 1]])
    assert (first.scores.tolist(), second.scores.tolist()) == ([0.5, 0.75], [0.25])
    assert (first.classes.tolist(), second.classes.tolist()) == ([3, 0], [1])
    assert (first.size, second.size) == ((S, S), (S, S))
    assert boxes.classes is None
    assert len(boxes.of("other").scores) == 0


def test_boxes_are_of_the_upright_photograph(tmp_path: Path) -> None:
    """A camera stored it turned by 90 degrees, and the manifest does not know its size."""
    scenes = draw_scenes(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (96, 72)).save(tmp_path / "turned.jpg", exif=exif.tobytes())
    rows = scenes.manifest.table.to_pylist()
    rows[0] |= {"path": "turned.jpg", "width": None, "height": None}
    manifest = replace(scenes.manifest, table=pa.Table.from_pylist(rows, schema=COLUMNS))
    mine = {"image_id": [rows[0]["image_id"]], "box": [[18, 0, 72, 96]], "score": [1], "class": [1]}
    boxes = read_box_file(write_box_file(tmp_path / "boxes.npz", mine), manifest, tmp_path)
    [image] = boxes.images.values()
    assert image.size == (72, 96)
    np.testing.assert_array_equal(image.boxes, [[0.25, 0, 1, 1]])


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_names_are_numbered_as_they_appear(scenes: Scenes, tmp_path: Path, suffix: str) -> None:
    rows = {**some_rows(scenes), "class": ["zebra", "ant", "zebra"]}
    boxes = read(scenes, write_box_file(tmp_path / f"boxes.{suffix}", rows))
    first, second = boxes.images.values()
    assert boxes.classes == ("background", "zebra", "ant")
    assert (first.classes.tolist(), second.classes.tolist()) == ([1, 1], [2])
    rows["class"][0] = ""
    boxes = read(scenes, write_box_file(tmp_path / f"boxes.{suffix}", rows))
    assert boxes.classes == ("background", "ant", "zebra")
    assert next(iter(boxes.images.values())).classes.tolist() == [0, 2]


def test_both_formats_give_the_same_digest(scenes: Scenes, tmp_path: Path) -> None:
    rows = some_rows(scenes)
    digests = {
        read(scenes, write_box_file(tmp_path / f"boxes.{suffix}", rows)).sha256
        for suffix in ("npz", "parquet")
    }
    assert len(digests) == 1
    rows["score"][1] = 0.26
    assert read(scenes, write_box_file(tmp_path / "boxes.npz", rows)).sha256 not in digests


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image_id": (1, "unknown")}, r"row 1 \('unknown'\).*tiny has no such image"),
        ({"box": (1, [4.0, 8.0, np.nan, 64.0])}, "row 1.*nan.*finite"),
        ({"box": (2, [0.0, 0.0, np.inf, 64.0])}, "row 2.*inf.*finite"),
        ({"score": (0, np.inf)}, "row 0.*inf.*finite"),
        ({"score": (0, 1e39)}, "row 0.*1e[+]39.*finite"),
        ({"box": (1, [4.0, 8.0, 65.5, 64.0])}, r"row 1.*65\.5.*within the 64 x 64 pixels"),
        ({"box": (0, [-2.0, 8.0, 6.0, 64.0])}, "row 0.*within the 64 x 64 pixels"),
        ({"box": (1, [4.0, 8.0, 4.0, 64.0])}, "row 1.*x0 < x1"),
        ({"box": (1, [40.0, 8.0, 20.0, 20.0])}, "row 1.*x0 < x1"),
        ({"box": (1, [-0.5, 8.0, 0.0, 20.0])}, "row 1.*x0 < x1"),
        ({"class_": (2, -1)}, "row 2.*class is -1.*1 to 32766"),
        ({"class_": (2, 32767)}, "row 2.*class is 32767.*1 to 32766"),
    ],
)
def test_an_impossible_row_is_named(
    scenes: Scenes, tmp_path: Path, suffix: str, change: dict[str, Any], found: str
) -> None:
    path = write_box_file(tmp_path / f"boxes.{suffix}", some_rows(scenes, **change))
    with pytest.raises(InputError, match=f"{re.escape(str(path))}, {found}"):
        read(scenes, path)


def test_boxes_in_shares_are_not_taken_for_pixels(scenes: Scenes, tmp_path: Path) -> None:
    rows = {**some_rows(scenes), "box": [[0.0, 0.0, 0.5, 1.0]] * 3}
    with pytest.raises(InputError, match=r"shares of width and height.*Multiply"):
        read(scenes, write_box_file(tmp_path / "boxes.npz", rows))


def without(name: str) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    return lambda rows: {key: values for key, values in rows.items() if key != name}


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (without("score"), "lacks `score`; it has box, class, image_id"),
        (lambda rows: {**rows, "image_id": [1, 2, 3]}, "`image_id`.*int64.*text"),
        (lambda rows: {**rows, "score": ["a", "b", "c"]}, "`score`.*expected a number"),
        (lambda rows: {**rows, "class": [1.0, 2.0, 3.0]}, "`class`.*whole number"),
        (lambda rows: {**rows, "box": [[1.0, 2.0, 3.0]] * 3}, "`box`.*four numbers"),
        (lambda rows: {**rows, "box": ["a", "b", "c"]}, "`box`.*four numbers"),
        (lambda rows: {key: [] for key in rows}, "no rows|`image_id`|`class`"),
    ],
)
def test_another_kind_of_column_is_named(
    scenes: Scenes, tmp_path: Path, suffix: str, change: Any, found: str
) -> None:
    path = write_box_file(tmp_path / f"boxes.{suffix}", change(some_rows(scenes)))
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*({found})"):
        read(scenes, path)


def test_the_type_that_an_array_should_have_is_named(scenes: Scenes, tmp_path: Path) -> None:
    for name, value, cast in (
        ("image_id", np.array(some_rows(scenes)["image_id"], dtype=object), "`str`"),
        ("class", [1.0, 2.0, 3.0], "`numpy.int64` or `str`"),
        ("score", ["1", "2", "3"], "`numpy.float64`"),
    ):
        path = write_box_file(tmp_path / "boxes.npz", {**some_rows(scenes), name: value})
        with pytest.raises(InputError, match=f"`{name}`.*`astype` to {cast}"):
            read(scenes, path)


def test_a_file_without_boxes_is_not_taken_for_a_damaged_one(
    scenes: Scenes, tmp_path: Path
) -> None:
    path = tmp_path / "boxes.npz"
    empty = {"image_id": np.array([], dtype="U8"), "box": np.zeros((0, 4))}
    for classes in (np.zeros(0, int), np.array([], dtype="U8")):
        np.savez(path, **empty, score=np.zeros(0), **{"class": classes})
        with pytest.raises(InputError, match=rf"{re.escape(str(path))} has no rows"):
            read(scenes, path)


@pytest.mark.parametrize(
    ("name", "value"), [("score", [0.5, None, 0.5]), ("box", [[0.0, None, 9.0, 9.0]] * 3)]
)
def test_nulls_are_named(scenes: Scenes, tmp_path: Path, name: str, value: Any) -> None:
    path = write_box_file(tmp_path / "boxes.parquet", {**some_rows(scenes), name: value})
    with pytest.raises(InputError, match=rf"`{name}`.*null in row \d"):
        read(scenes, path)


def test_a_file_that_can_not_be_read_is_named(scenes: Scenes, tmp_path: Path) -> None:
    for name, content, found in (
        ("boxes.npz", None, "no file of boxes at .*boxes_file"),
        ("boxes.csv", b"", r"\.csv.*\.npz or \.parquet"),
        ("boxes.npz", b"PK broken", "damaged or not an npz"),
        ("boxes.parquet", b"PAR1 broken", "not a complete Parquet file"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=f"(?s){found}") as caught:
            read(scenes, path)
        assert str(path) in str(caught.value)
    cut = write_box_file(tmp_path / "cut.npz", some_rows(scenes))
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cut\.npz"):
        read(scenes, cut)
