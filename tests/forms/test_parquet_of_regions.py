"""Regions in Parquet, written by pandas and others: other types of lists, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from region_files import make_arrays

from pipeline.errors import InputError
from pipeline.shards.imports import ParquetFiles


def make_columns() -> dict[str, list[Any]]:
    """The columns of a sound file, as Python's lists."""
    arrays = make_arrays()
    counts = arrays["count"].tolist()
    columns: dict[str, list[Any]] = {
        name: [arrays[name][row, :n].tolist() for row, n in enumerate(counts)]
        for name in ("features", "boxes", "scores", "classes")
    }
    columns |= {
        name: arrays["size_wh"][:, side].tolist() for side, name in ((0, "width"), (1, "height"))
    }
    return {"image_id": arrays["image_id"].tolist(), **columns}


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def test_lists_of_any_width_are_read(tmp_path: Path) -> None:
    columns = make_columns()
    path = write(tmp_path / "a.parquet", {**columns, "remark": list(range(9))})
    source = ParquetFiles.open([path])
    assert (source.counts.tolist(), source.feature_size) == ([1, 2, 3, 4, 1, 2, 3, 4, 1], 6)
    assert source.whole_sha256 is None
    assert [line.file_id for line in source.lines] == columns["image_id"]
    for wanted in (range(9), [0, 5], [8], []):
        images = list(source.read(np.array(wanted, dtype=np.int64)))
        for row, image in zip(wanted, images, strict=True):
            assert image.features.tolist() == columns["features"][row]
            assert image.boxes.tolist() == columns["boxes"][row]
            assert image.scores.tolist() == columns["scores"][row]
            assert image.classes.tolist() == columns["classes"][row]


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    columns = make_columns()
    parts = [
        {name: each[part] for name, each in columns.items()} for part in (slice(4), slice(4, 9))
    ]
    paths = [write(tmp_path / f"{n}.parquet", part) for n, part in enumerate(parts)]
    source = ParquetFiles.open(paths)
    images = list(source.read(np.array([1, 3, 4, 8])))
    assert [one.features.tolist() for one in images] == [
        columns["features"][n] for n in (1, 3, 4, 8)
    ]
    with pytest.raises(InputError, match=r"0\.parquet.*'000100'.*once"):
        ParquetFiles.open([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_id", "", r"row 4 \(''\).*image_id"),
        ("image_id", None, r"row 4 \(None\).*image_id"),
        ("width", 0, r"row 4 \('000104'\): width is 0"),
        ("height", None, r"row 4 \('000104'\): height is None"),
        ("scores", None, r"row 4 \('000104'\): scores"),
        ("scores", [0.5, 0.5], r"row 4 \('000104'\).*`features`.* 1; expected 2"),
        ("boxes", [[0.0, 0.0, 1.0]], r"row 4 \('000104'\).*`boxes`.* 3.*4"),
        ("boxes", None, r"row 4 \('000104'\).*`boxes`.*null"),
        ("features", None, r"row 4 \('000104'\).*`features`.*null"),
        ("features", [[1.0] * 5], r"row 4 \('000104'\).*`features`.* 5.*6"),
        ("features", [None], r"row 4 \('000104'\).*`features`.*null.*6"),
        ("features", [[1.0] * 5 + [None]], r"`features`.*null"),
        ("classes", [None], r"`classes`.*null"),
    ],
)
def test_a_row_that_can_not_be_is_named(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    columns = make_columns()
    columns[name][4] = value
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=rf"a\.parquet, {message}|a\.parquet.*{message}"):
        list(ParquetFiles.open([path]).read(np.arange(9)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": None}, "`boxes`.*missing.*image_id, width"),
        ({"image_id": list(range(9))}, "`image_id`.*int64.*text"),
        ({"features": [[1.0]] * 9}, "`features`.*lists of n lists of d floats"),
        ({"classes": [[0.5]] * 9}, "`classes`.*integers"),
    ],
)
def test_other_columns_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    columns = {name: each for name, each in (make_columns() | changes).items() if each is not None}
    with pytest.raises(InputError, match=message):
        ParquetFiles.open([write(tmp_path / "a.parquet", columns)])


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_columns())
    whole = path.read_bytes()
    for stored in (whole[:-40], b"", whole[:200] + bytes(400) + whole[600:]):
        path.write_bytes(stored)
        with pytest.raises(InputError, match=r"a\.parquet"):
            list(ParquetFiles.open([path]).read(np.arange(9)))
