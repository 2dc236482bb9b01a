"""pipeline.datasets.manifest: the annotated boxes beside a manifest, in boxes.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from pipeline.datasets.manifest import BoxTable, ImageBoxes, read_boxes, write_boxes
from pipeline.errors import DamagedError, MissingError
from pipeline.formats.sealed import write_sealed_table


def make_boxes() -> BoxTable:
    def objects(classes: list[int], boxes: list[list[float]]) -> ImageBoxes:
        return ImageBoxes(np.array(classes), np.array(boxes, dtype=np.float32).reshape(-1, 4))

    return BoxTable(
        ("cat", "dog"),
        {
            "a": objects([2, 1], [[0, 0, 1, 1], [0.1, 0.25, 0.3, 0.5]]),
            "none": objects([], []),
            "b": objects([1], [[0.5, 0.5, 0.75, 1]]),
        },
    )


def assert_same_boxes(actual: ImageBoxes, expected: ImageBoxes) -> None:
    assert actual.classes.dtype == np.int64
    assert actual.boxes.dtype == np.float32
    assert actual.boxes.shape == (len(actual.classes), 4)
    np.testing.assert_array_equal(actual.classes, expected.classes)
    np.testing.assert_array_equal(actual.boxes, expected.boxes)


def test_boxes_round_trip(tmp_path: Path) -> None:
    path, written = tmp_path / "boxes.parquet", make_boxes()
    write_boxes(path, written)
    read = read_boxes(path, ["b", "none", "a"])
    assert read.classes == ("cat", "dog")
    assert list(read.images) == ["b", "none", "a"]
    for image_id, image in read.images.items():
        assert_same_boxes(image, written.images[image_id])


def test_data_set_without_any_object(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"
    write_boxes(path, BoxTable(("cat", "dog"), {}))
    read = read_boxes(path, ["a"])
    assert read.classes == ("cat", "dog")
    assert_same_boxes(read.images["a"], make_boxes().images["none"])


def test_only_requested_images_are_read(tmp_path: Path) -> None:
    path, written = tmp_path / "boxes.parquet", make_boxes()
    write_boxes(path, written)
    read = read_boxes(path, ["b", "unheard-of"])
    assert list(read.images) == ["b", "unheard-of"]
    assert_same_boxes(read.images["b"], written.images["b"])
    assert_same_boxes(read.images["unheard-of"], written.images["none"])


@pytest.mark.parametrize(
    ("number", "box"),
    [
        (0, [0, 0, 1, 1]),
        (3, [0, 0, 1, 1]),
        (-1, [0, 0, 1, 1]),
        (1, [0.5, 0, 0.5, 1]),
        (1, [0, 0.5, 1, 0.5]),
        (1, [0.6, 0, 0.5, 1]),
        (1, [0, 0.6, 1, 0.5]),
        (1, [-0.5, 0, 1, 1]),
        (1, [0, 0, 1, 1.5]),
        (1, [0, 0, float("nan"), 1]),
    ],
)
def test_invalid_box_is_named(tmp_path: Path, number: int, box: list[float]) -> None:
    path, table = tmp_path / "boxes.parquet", make_boxes()
    table.images["b"].classes[0] = number
    table.images["b"].boxes[0] = box
    write_boxes(path, table)
    shown = str(np.array(box, dtype=np.float32).tolist())
    # The row is found although its image was not requested.
    with refused(DamagedError, "boxes.parquet, row 2", f"class {number}", shown, "1..2"):
        read_boxes(path, ["a"])


@pytest.mark.parametrize("about", [{}, {"classes": None}, {"classes": "cat"}, {"classes": [1]}])
def test_boxes_without_names_of_classes_are_refused(tmp_path: Path, about: dict[str, Any]) -> None:
    path = tmp_path / "boxes.parquet"
    write_boxes(path, make_boxes())
    columns = pq.read_table(path).replace_schema_metadata(None)
    write_sealed_table(path, columns, about)
    with refused(DamagedError, "boxes.parquet", "classes"):
        read_boxes(path, ["a"])


@pytest.mark.parametrize(
    "columns",
    [
        {"image_id": pa.array(["a"]), "class": pa.array([1], pa.int16())},
        {
            "image_id": pa.array(["a"]),
            "class": pa.array([1], pa.int16()),
            "box": pa.array([[0.0, 0.0, 1.0, 1.0]], pa.list_(pa.float32())),
        },
        {
            "image_id": pa.array(["a"]),
            "class": pa.array([None], pa.int16()),
            "box": pa.array([[0.0, 0.0, 1.0, 1.0]], pa.list_(pa.float32(), 4)),
        },
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = tmp_path / "boxes.parquet"
    write_sealed_table(path, pa.table(columns), {"classes": ["cat"]})
    with refused(DamagedError, "boxes.parquet", "expected", "columns"):
        read_boxes(path, ["a"])


def test_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with refused(DamagedError, "boxes.parquet", "Parquet"):
        read_boxes(path, ["a"])


def test_missing_boxes_name_the_setting_to_change(tmp_path: Path) -> None:
    keys = ["`detector.<dataset>.source`", "`torchvision`", "`file`"]
    with refused(MissingError, "boxes.parquet", *keys):
        read_boxes(tmp_path / "boxes.parquet", ["a"])
