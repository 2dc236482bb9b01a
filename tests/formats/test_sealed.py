"""Sealed files come back as they were written, and a single changed bit is noticed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DamagedError
from pipeline.formats.sealed import (
    read_sealed_json,
    read_sealed_table,
    write_sealed_json,
    write_sealed_table,
)

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("number", pa.int32()),
        pa.field("list", pa.list_(pa.int16()), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4)),
    ]
)
ABOUT = {"version": 1, "labels": ["a", "ü"]}

ROW = st.fixed_dictionaries(
    {
        "text": st.text(max_size=5),
        "number": st.none() | st.integers(-(2**31), 2**31 - 1),
        "list": st.lists(st.integers(-(2**15), 2**15 - 1), max_size=3),
        "box": st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    }
)


def make_table(rows: int = 40) -> pa.Table:
    values = {
        "text": [f"image-{row}" for row in range(rows)],
        "number": [None if row % 3 else row for row in range(rows)],
        "list": [list(range(row % 4)) for row in range(rows)],
        "box": [[0.0, row / rows, 0.5, 1.0] for row in range(rows)],
    }
    return pa.table(values, schema=SCHEMA)


@given(st.lists(ROW, max_size=6), st.integers(1, 3))
def test_a_table_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "table.parquet"
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    # However many pieces it has in memory.
    pieces = pa.Table.from_batches(table.to_batches(max_chunksize=chunk), schema=SCHEMA)
    for one in (table, pieces):
        write_sealed_table(path, one, ABOUT)
        read, about = read_sealed_table(path, SCHEMA)
        assert read.equals(table)
        assert about == ABOUT


def test_other_values_have_another_digest(tmp_path: Path) -> None:
    """Values that differ in kind, position or nesting alone."""
    schema = pa.schema([("a", pa.list_(pa.string())), ("b", pa.int32())])
    tables = [
        {"a": [["x", "y"], []], "b": [1, 2]},
        {"a": [["x"], ["y"]], "b": [1, 2]},
        {"a": [["xy"], []], "b": [1, 2]},
        {"a": [["x", "y"], None], "b": [1, 2]},
        {"a": [["x", "y"], []], "b": [2, 1]},
        {"a": [["x", "y"], []], "b": [0, 2]},
        {"a": [["x", "y"], []], "b": [None, 2]},
        {"a": [["x", None], []], "b": [1, 2]},
        {"a": [["x", ""], []], "b": [1, 2]},
    ]
    digests = set()
    for number, values in enumerate(tables):
        path = tmp_path / f"{number}.parquet"
        write_sealed_table(path, pa.table(values, schema=schema), ABOUT)
        digests.add(json.loads(pq.read_schema(path).metadata[b"gmpipe"])["sha256"])
    assert len(digests) == len(tables)


@pytest.mark.parametrize("kind", ["table", "json"])
def test_no_changed_bit_goes_unnoticed(tmp_path: Path, kind: str) -> None:
    path, flipped = tmp_path / "sound", tmp_path / "flipped"
    content = {"mAP": 62.5, "AP": {"sun": 61.0, "moon": None}, "commit": "f" * 40}
    if kind == "table":
        write_sealed_table(path, make_table(), ABOUT)
    else:
        write_sealed_json(path, content)
    stored, rng, counts = path.read_bytes(), random.Random(0), Counter[str]()
    for _ in range(300):
        changed, bit = bytearray(stored), rng.randrange(8 * len(stored))
        changed[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(changed)
        try:
            if kind == "table":
                read, about = read_sealed_table(flipped, SCHEMA)
                same = read.equals(make_table()) and about == ABOUT
            else:
                same = read_sealed_json(flipped) == content
        except DamagedError:
            counts["refused"] += 1
        else:
            counts["harmless" if same else "silent"] += 1
    assert counts["silent"] == 0
    assert counts["refused"] > 150


@pytest.mark.parametrize("stored", [b"", b"{", b"[]", b"{}", b'{"sha256": 1}', b"[" * 100_000])
def test_what_is_not_sealed_is_damaged(tmp_path: Path, stored: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(stored)
    with pytest.raises(DamagedError, match=str(path)):
        read_sealed_json(path)
    with pytest.raises(DamagedError, match=str(path)):
        read_sealed_table(path, SCHEMA)


def test_other_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_sealed_table(path, make_table().drop_columns(["number"]), ABOUT)
    with pytest.raises(DamagedError, match=r"(?s)expected the columns.*number.*found"):
        read_sealed_table(path, SCHEMA)
    pq.write_table(make_table(), path)
    with pytest.raises(DamagedError, match="sha256"):
        read_sealed_table(path, SCHEMA)


def test_what_is_missing_is_an_error_of_the_system(tmp_path: Path) -> None:
    for read in (read_sealed_json, lambda path: read_sealed_table(path, SCHEMA)):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "absent")
