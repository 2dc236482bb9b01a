"""pipeline.datasets.manifest: round trips, and what breaks the contract of a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from pipeline.datasets.manifest import (
    COLUMNS,
    COUNTS,
    MANIFEST_VERSION,
    Manifest,
    full_counts,
    read_manifest,
    write_manifest,
)
from pipeline.errors import DamagedError, GmpipeError, InputError, MissingError
from pipeline.formats.sealed import write_sealed_table

Row = dict[str, Any]
VOCABULARY = ("cat", "dog", "öre")


def make_row(image_id: str, split: str, **changes: object) -> Row:
    row: Row = {"image_id": image_id, "path": f"images/{image_id}.jpg", "split": split}
    return {**row, "labels": [], "ignored": [], "width": None, "height": None, **changes}


def make_table() -> list[Row]:
    """Four valid rows: two of train, then two of test."""
    return [
        make_row("a", "train", labels=[0, 2], width=640, height=480),
        make_row("b", "train", labels=[1], ignored=[2, 0]),
        make_row("c", "test"),
        make_row("d", "test", labels=[2], ignored=[1], height=7),
    ]


def make_manifest(
    rows: list[Row] | None = None,
    *,
    vocabulary: tuple[str, ...] = VOCABULARY,
    counts: dict[str, dict[str, int]] | None = None,
    table: pa.Table | None = None,
) -> Manifest:
    valid = pa.Table.from_pylist(make_table() if rows is None else rows, schema=COLUMNS)
    if table is None:
        table = valid
    if counts is None:
        counts = full_counts(valid)
    return Manifest("pets", "official", vocabulary, {"list.txt": "ab12"}, counts, table)


# --- a valid manifest ----------------------------------------------------------------------------


def test_manifest_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "prepared" / "manifest.parquet"
    written = make_manifest()
    write_manifest(path, written)
    read = read_manifest(path)
    assert read == written
    assert (read.dataset, read.split_name) == ("pets", "official")
    assert read.vocabulary == VOCABULARY
    assert read.sources == {"list.txt": "ab12"}
    assert read.counts == {
        "train": {"listed": 2, "missing": 0, "unlabelled": 0, "images": 2},
        "test": {"listed": 2, "missing": 0, "unlabelled": 1, "images": 2},
    }
    assert read.table.to_pylist() == make_table()
    assert [file.name for file in path.parent.iterdir()] == ["manifest.parquet"]


def test_folder_of_manifests_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "folder" / "manifest.parquet", make_manifest())
    with refused(InputError, "folder"):
        read_manifest(tmp_path / "folder")


def test_splits_keep_the_order_of_rows() -> None:
    rows = make_table()
    mixed = make_manifest([rows[3], rows[1], rows[2], rows[0]])
    assert len(mixed) == 4
    assert mixed.image_ids("train") == ["b", "a"]
    assert mixed.image_ids("test") == ["d", "c"]
    assert mixed.rows("test").to_pylist() == [rows[3], rows[2]]


def test_truth_marks_positive_negative_and_ignored_labels() -> None:
    manifest = make_manifest()
    train, test = manifest.truth("train"), manifest.truth("test")
    assert train.tolist() == [[1, 0, 1], [-1, 1, -1]]
    assert test.tolist() == [[0, 0, 0], [0, -1, 1]]
    assert train.dtype == test.dtype == np.int8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifest")


label_kinds = st.lists(st.sampled_from([1, 0, -1]), min_size=3, max_size=3)


@given(truths=st.lists(label_kinds, min_size=2, max_size=6), name=st.text("a /ö漢", min_size=1))
@settings(max_examples=30)
def test_truth_round_trip(folder: Path, truths: list[list[int]], name: str) -> None:
    path = folder / "manifest.parquet"
    rows = [
        make_row(
            f"{name}-{number}",
            "test" if number == 0 else "train",
            path=f"images/{number}.jpg",
            labels=[label for label, kind in enumerate(truth) if kind == 1],
            ignored=[label for label, kind in enumerate(truth) if kind == -1],
        )
        for number, truth in enumerate(truths)
    ]
    write_manifest(path, make_manifest(rows))
    read = read_manifest(path)
    assert read.truth("test").tolist() == truths[:1]
    assert read.truth("train").tolist() == truths[1:]
    assert read.image_ids("train") == [row["image_id"] for row in rows[1:]]


def test_images_to_validate_on_are_a_split_of_their_own(tmp_path: Path) -> None:
    rows = make_table()
    without = make_manifest(rows)
    assert without.splits == ("train", "test")
    rows.append(make_row("e", "val", labels=[1], ignored=[0]))
    manifest = make_manifest(rows)
    assert manifest.splits == ("train", "val", "test")
    assert manifest.counts["val"] == {"listed": 1, "missing": 0, "unlabelled": 0, "images": 1}
    assert manifest.truth("val").tolist() == [[-1, 1, 0]]
    write_manifest(tmp_path / "manifest.parquet", manifest)
    assert read_manifest(tmp_path / "manifest.parquet") == manifest
    with pytest.raises(InputError, match=r"\['test', 'train'\].*\['test', 'train', 'val'\]"):
        make_manifest(rows, counts=without.counts)


def test_the_hash_of_a_training_covers_what_validates_it() -> None:
    rows = [*make_table(), make_row("e", "val", labels=[1])]
    hashes = set()
    for change in ({}, {"labels": [0]}, {"split": "train"}, {"image_id": "f"}):
        changed = make_manifest([*rows[:-1], {**rows[-1], **change}])
        hashes.add(changed.train_sha256)
        assert changed.test_sha256 == make_manifest(rows).test_sha256
    moved = make_manifest([*rows[:-1], {**rows[-1], "split": "test"}])
    assert moved.train_sha256 not in hashes
    assert moved.test_sha256 != make_manifest(rows).test_sha256
    assert len(hashes) == 4


@pytest.mark.parametrize("path", ["a.jpg", "deep/er/a.jpg", "./a.jpg", "a..b/c...jpg", "a b/ü.jpg"])
def test_paths_below_the_root_are_valid(path: str) -> None:
    rows = make_table()
    rows[1]["path"] = path
    assert make_manifest(rows).table.column("path")[1].as_py() == path


# --- what breaks the contract --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"image_id": ""}, ["row 1 ('')", "image id"]),
        ({"image_id": "a"}, ["row 1 ('a')", "row 0"]),
        ({"path": "/etc/passwd"}, ["row 1 ('b')", "'/etc/passwd'"]),
        ({"path": "../x.jpg"}, ["row 1 ('b')", "'../x.jpg'"]),
        ({"path": "a/../../x.jpg"}, ["'a/../../x.jpg'"]),
        ({"path": "a/.."}, ["'a/..'"]),
        ({"path": "a\\x.jpg"}, ["'a\\\\x.jpg'"]),
        ({"path": "..\\x.jpg"}, ["'..\\\\x.jpg'"]),
        ({"path": ""}, ["row 1 ('b')", "path ''"]),
        ({"split": "dev"}, ["row 1 ('b')", "'dev'", "('train', 'val', 'test')"]),
        ({"split": ""}, ["split is ''", "('train', 'val', 'test')"]),
        ({"labels": [3]}, ["row 1 ('b')", "label 3", "0 to 2"]),
        ({"labels": [-1]}, ["row 1 ('b')", "label -1", "0 to 2"]),
        ({"labels": [], "ignored": [0, 9]}, ["label 9", "0 to 2"]),
        ({"labels": [None]}, ["label None", "0 to 2"]),
        ({"labels": [2, 1], "ignored": [2, 1]}, ["row 1 ('b')", "'dog'", "ignored"]),
        ({"labels": None}, ["row 1 ('b')", "labels", "null"]),
        ({"ignored": None}, ["row 1 ('b')", "ignored", "null"]),
        ({"path": None}, ["row 1 ('b')", "path None"]),
        ({"image_id": None}, ["row 1 (None)", "image id"]),
    ],
)
def test_invalid_row_is_named(changes: Row, parts: list[str]) -> None:
    rows = make_table()
    rows[1].update(changes)
    with refused(InputError, "pets, row 1 (", *parts):
        make_manifest(rows)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_split_is_refused(split: str) -> None:
    other = [row for row in make_table() if row["split"] != split]
    with refused(InputError, "pets", f"'{split}'"):
        make_manifest(other)


def test_manifest_without_rows_is_refused() -> None:
    with refused(InputError, "'train'"):
        make_manifest([])


@pytest.mark.parametrize(
    ("vocabulary", "shown"), [(("cat", "dog", "cat"), "['cat', 'dog', 'cat']"), ((), "[]")]
)
def test_vocabulary_needs_distinct_labels(vocabulary: tuple[str, ...], shown: str) -> None:
    with refused(InputError, "pets", "vocabulary", shown):
        make_manifest(vocabulary=vocabulary)


def changed_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    column = table.column_names.index(name)
    return table.set_column(column, pa.field(name, kind), table.column(name).cast(kind))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["ignored"]),
        lambda table: table.append_column("extra", pa.array([1, 2, 3, 4])),
        lambda table: table.rename_columns(["id", *COLUMNS.names[1:]]),
        lambda table: table.select([*COLUMNS.names[1:], "image_id"]),
        lambda table: changed_type(table, "labels", pa.list_(pa.int32())),
        lambda table: changed_type(table, "width", pa.int64()),
        lambda table: changed_type(table, "image_id", pa.large_string()),
    ],
)
def test_wrong_columns_are_refused(change: Callable[[pa.Table], pa.Table]) -> None:
    table = change(make_manifest().table)
    with refused(InputError, "pets", str(COLUMNS), str(table.schema)):
        make_manifest(table=table)


def train_counts(**changes: object) -> Any:
    """Counts of a valid manifest with changes in train; None removes a count."""
    counts: dict[str, dict[str, Any]] = full_counts(make_manifest().table)  # type: ignore[assignment]
    counts["train"].update(changes)
    return {split: {k: n for k, n in of.items() if n is not None} for split, of in counts.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"listed": 9, "missing": 7},
        {"listed": 9, "missing": 3, "unlabelled": 4},
        {"unlabelled": 1},  # counted, not left out
    ],
)
def test_counts_may_include_images_left_out(changes: Row) -> None:
    counts = train_counts(**changes)
    assert make_manifest(counts=counts).counts == counts


@pytest.mark.parametrize(
    "changes",
    [
        {"images": 3},
        {"images": 1, "listed": 1},
        {"listed": 3},
        {"missing": 1},
        {"listed": 9, "missing": 3, "unlabelled": 3},
        {"listed": 1, "missing": -1},
        {"listed": 2.0},
        {"missing": False},
        {"unlabelled": None},
        {"more": 1},
    ],
)
def test_counts_that_contradict_the_rows_are_refused(changes: Row) -> None:
    counts = train_counts(**changes)
    with refused(InputError, "pets", "train", str(counts["train"]), *COUNTS, "2 images"):
        make_manifest(counts=counts)


def test_counts_need_both_splits() -> None:
    counts = full_counts(make_manifest().table)
    del counts["test"]
    with refused(InputError, "pets", "['train']", "['test', 'train']"):
        make_manifest(counts=counts)


# --- damaged files -------------------------------------------------------------------------------


def change_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with pq.ParquetFile(path) as file:
        table = file.read()
    metadata = json.loads(table.schema.metadata[b"gmpipe"])
    change(metadata)
    del metadata["sha256"]
    write_sealed_table(path, table, metadata)


def set_metadata(path: Path, metadata: dict[str, str] | None) -> None:
    pq.write_table(make_manifest().table.replace_schema_metadata(metadata), path)


def flip_a_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for byte in range(4, 40):
        content[byte] ^= 0xFF
    path.write_bytes(content)


NEWER = MANIFEST_VERSION + 1


@pytest.mark.parametrize(
    ("damage", "kind", "parts"),
    [
        (lambda path: path.unlink(), MissingError, []),
        (lambda path: path.write_text("image_id,path\n"), DamagedError, ["Parquet"]),
        (lambda path: path.write_bytes(b""), DamagedError, ["Parquet"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), DamagedError, ["Parquet"]),
        (flip_a_page, DamagedError, ["Parquet"]),
        (lambda path: set_metadata(path, None), DamagedError, ["metadata"]),
        (lambda path: set_metadata(path, {"other": "{}"}), DamagedError, ["metadata"]),
        (lambda path: set_metadata(path, {"gmpipe": "{"}), DamagedError, ["JSON"]),
        (lambda path: set_metadata(path, {"gmpipe": "[]"}), DamagedError, []),
        (
            lambda path: change_metadata(path, lambda metadata: metadata.pop("vocabulary")),
            DamagedError,
            ["KeyError('vocabulary')"],
        ),
        (
            lambda path: change_metadata(path, lambda metadata: metadata.pop("counts")),
            DamagedError,
            ["KeyError('counts')"],
        ),
        (
            lambda path: change_metadata(
                path, lambda metadata: metadata.update(counts={"train": 3, "test": list(COUNTS)})
            ),
            DamagedError,
            ["metadata is damaged"],
        ),
        (
            lambda path: change_metadata(path, lambda metadata: metadata.update(version=NEWER)),
            DamagedError,
            [f"version {NEWER}", str(MANIFEST_VERSION)],
        ),
        (
            lambda path: change_metadata(path, lambda metadata: metadata.update(version=0)),
            DamagedError,
            ["version 0", str(MANIFEST_VERSION)],
        ),
    ],
)
def test_damaged_file_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], kind: type[GmpipeError], parts: list[str]
) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, make_manifest())
    damage(path)
    with refused(kind, str(path), *parts):
        read_manifest(path)


def test_contract_is_checked_when_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, make_manifest())
    change_metadata(path, lambda metadata: metadata.update(vocabulary=["cat", "dog"]))
    with refused(DamagedError, "row 0 ('a')", "label 2", "0 to 1"):
        read_manifest(path)
