"""Small caches of made-up regions, for tests of the shards and of what stands beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from builders import make_rows

from pipeline.files import sha256_json
from pipeline.shards.index import write_index
from pipeline.shards.schema import Recipe, RegionRows
from pipeline.shards.shard import map_shard, read_header, shard_name, whole_shards, write_shard

DATASET = "tiny"
RECIPE: Recipe = {
    "images": "all of them",
    "m": 3,
    "nms_threshold": 0.5,
    "flip": True,
    "weights": None,
    "dtype": "float16",
}
RECIPE_OF_WHOLE: Recipe = {**RECIPE, "whole": True}
"""Of rows that have the field `whole`."""


def write_cache(folder: Path, *parts: RegionRows) -> RegionRows:
    """Write each of ``parts`` as a shard of ``folder``, then the index; return all rows."""
    paths = [folder / shard_name(number) for number in range(len(parts))]
    recipe = RECIPE if parts[0].whole is None else RECIPE_OF_WHOLE
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, part, dataset=DATASET, recipe={**recipe, "images": path.name})
    write_index(folder, DATASET, recipe, paths)
    return RegionRows.concatenate(parts)


def assert_same_rows(found: RegionRows, expected: RegionRows) -> None:
    assert found.fields == expected.fields
    for field in expected.fields:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), field)
        if field != "image_id":
            assert getattr(found, field).dtype == getattr(expected, field).dtype


def changed_rows(field: str, index: Any, value: Any) -> RegionRows:
    """Sound rows but for one value; `image-1` (row 1) has two real regions of three."""
    rows = make_rows(whole=field == "whole")
    array = getattr(rows, field).copy()
    array[index] = value
    return replace(rows, **{field: array})


def flip_bit(path: Path, field: str, row: int) -> None:
    """Flip a bit of one row's field, in a file that may be a hard link."""
    header = read_header(path)
    content = bytearray(path.read_bytes())
    content[header.offsets[field] + row * _row_bytes(path, field)] ^= 4
    path.unlink()
    path.write_bytes(content)


def _row_bytes(path: Path, field: str) -> int:
    import h5py

    with h5py.File(path, "r") as file:
        return int(file[field].nbytes // len(file[field]))


def cut(path: Path, size: int) -> None:
    """Leave only the first ``size`` bytes of a file."""
    with path.open("r+b") as stream:
        stream.truncate(size)


def with_metadata(table: pa.Table, about: dict[str, Any]) -> pa.Table:
    """An index's table with metadata that have their digest."""
    about = {name: value for name, value in about.items() if name != "sha256"}
    sealed = {**about, "sha256": sha256_json(about)}
    return table.replace_schema_metadata({"gmpipe": json.dumps(sealed)})


def rows_of(folder: Path) -> dict[tuple[str, int], bytes]:
    """Every row of the shards, all its fields as bytes, by image and view; none may come twice."""
    content: dict[tuple[str, int], bytes] = {}
    for path in whole_shards(folder):
        _, rows, _ = map_shard(path)
        for row in range(len(rows)):
            key = rows.image_id[row].decode(), int(rows.view[row])
            assert key not in content
            arrays = (rows.features, rows.boxes, rows.scores, rows.classes, rows.count, rows.whole)
            content[key] = b"".join(array[row].tobytes() for array in arrays if array is not None)
    return content
