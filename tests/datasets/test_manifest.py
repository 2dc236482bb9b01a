"""pipeline.datasets.manifest: round trips, and every breach of the contract by its message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.manifest import (
    COLUMNS,
    COUNTS,
    MANIFEST_VERSION,
    BoxTable,
    ImageBoxes,
    Manifest,
    full_counts,
    read_boxes,
    read_manifest,
    write_boxes,
    write_manifest,
)
from pipeline.errors import GmpipeError

Row = dict[str, Any]
VOCABULARY = ("cat", "dog", "öre")


def make_row(image_id: str, split: str, **changes: object) -> Row:
    row: Row = {"image_id": image_id, "path": f"images/{image_id}.jpg", "split": split}
    return {**row, "labels": [], "ignored": [], "width": None, "height": None, **changes}


def make_table() -> list[Row]:
    """Four sound rows: two of train, then two of test."""
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
    sound = pa.Table.from_pylist(make_table() if rows is None else rows, schema=COLUMNS)
    if table is None:
        table = sound
    if counts is None:
        counts = full_counts(sound)
    return Manifest("pets", "official", vocabulary, {"list.txt": "ab12"}, counts, table)


# --- a sound manifest ----------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
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


def test_a_folder_of_manifests_is_no_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path / "folder" / "manifest.parquet", make_manifest())
    with pytest.raises(GmpipeError, match=r"folder is not a whole Parquet file .* is a directory"):
        read_manifest(tmp_path / "folder")


def test_splits_keep_the_order_of_rows() -> None:
    rows = make_table()
    mixed = make_manifest([rows[3], rows[1], rows[2], rows[0]])
    assert len(mixed) == 4
    assert mixed.image_ids("train") == ["b", "a"]
    assert mixed.image_ids("test") == ["d", "c"]
    assert mixed.rows("test").to_pylist() == [rows[3], rows[2]]


def test_truth_tells_positive_negative_and_ignored() -> None:
    manifest = make_manifest()
    train, test = manifest.truth("train"), manifest.truth("test")
    assert train.tolist() == [[1, 0, 1], [-1, 1, -1]]
    assert test.tolist() == [[0, 0, 0], [0, -1, 1]]
    assert train.dtype == test.dtype == np.int8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifest")


kinds = st.lists(st.sampled_from([1, 0, -1]), min_size=3, max_size=3)


@given(truths=st.lists(kinds, min_size=2, max_size=6), name=st.text("a /ö漢", min_size=1))
@settings(max_examples=30, deadline=None)
def test_truth_survives_the_disk(folder: Path, truths: list[list[int]], name: str) -> None:
    path = folder / "manifest.parquet"
    rows = [
        make_row(
            f"{name}-{number}",
            "test" if number == 0 else "train",
            path=f"images/{number}.jpg",
            labels=[place for place, kind in enumerate(truth) if kind == 1],
            ignored=[place for place, kind in enumerate(truth) if kind == -1],
        )
        for number, truth in enumerate(truths)
    ]
    write_manifest(path, make_manifest(rows))
    read = read_manifest(path)
    assert read.truth("test").tolist() == truths[:1]
    assert read.truth("train").tolist() == truths[1:]
    assert read.image_ids("train") == [row["image_id"] for row in rows[1:]]


@pytest.mark.parametrize("path", ["a.jpg", "deep/er/a.jpg", "./a.jpg", "a..b/c...jpg", "a b/ü.jpg"])
def test_paths_below_the_root_are_fine(path: str) -> None:
    rows = make_table()
    rows[1]["path"] = path
    assert make_manifest(rows).table.column("path")[1].as_py() == path


# --- breaches of the contract --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": ""}, r"row 1 \(''\): the image id is empty"),
        ({"image_id": "a"}, r"row 1 \('a'\): the image id stands in row 0 already"),
        ({"path": "/etc/passwd"}, r"row 1 \('b'\): the path '/etc/passwd' leaves the data set's"),
        ({"path": "../x.jpg"}, r"row 1 \('b'\): the path '\.\./x\.jpg' leaves"),
        ({"path": "a/../../x.jpg"}, r"the path 'a/\.\./\.\./x\.jpg' leaves"),
        ({"path": "a/.."}, r"the path 'a/\.\.' leaves"),
        (
            {"path": "a\\x.jpg"},
            r"the path 'a\\\\x\.jpg' leaves the data set's root; expected a rel",
        ),
        ({"path": "..\\x.jpg"}, r"the path '\.\.\\\\x\.jpg' leaves"),
        ({"path": ""}, r"row 1 \('b'\): the path '' leaves"),
        ({"split": "val"}, r"row 1 \('b'\): the split is 'val', expected one of \('train', 'test'"),
        ({"split": ""}, r"the split is '', expected one of"),
        ({"labels": [3]}, r"row 1 \('b'\): unknown label 3, expected numbers 0 to 2"),
        ({"labels": [-1]}, r"row 1 \('b'\): unknown label -1, expected numbers 0 to 2"),
        ({"labels": [], "ignored": [0, 9]}, "unknown label 9, expected numbers 0 to 2"),
        ({"labels": [None]}, "unknown label None, expected numbers 0 to 2"),
        (
            {"labels": [2, 1], "ignored": [2, 1]},
            r"row 1 \('b'\): the label 'dog' is both positive and ignored",
        ),
        ({"labels": None}, r"row 1 \('b'\): labels or ignored is null, expected a list"),
        ({"ignored": None}, r"row 1 \('b'\): labels or ignored is null, expected a list"),
        ({"path": None}, r"row 1 \('b'\): the path None leaves"),
        ({"image_id": None}, r"row 1 \(None\): the image id is empty"),
    ],
)
def test_a_breach_names_its_row(changes: Row, message: str) -> None:
    rows = make_table()
    rows[1].update(changes)
    with pytest.raises(GmpipeError, match=message) as caught:
        make_manifest(rows)
    assert str(caught.value).startswith("manifest of pets, row 1 (")
    assert str(caught.value).endswith("Mend the source and run `gmpipe prepare --dataset pets`.")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_an_error(split: str) -> None:
    other = [row for row in make_table() if row["split"] != split]
    with pytest.raises(GmpipeError, match=f"of pets: the split '{split}' has no image. Mend"):
        make_manifest(other)


def test_a_manifest_of_no_rows_is_an_error() -> None:
    with pytest.raises(GmpipeError, match="the split 'train' has no image"):
        make_manifest([])


@pytest.mark.parametrize(
    ("vocabulary", "found"), [(("cat", "dog", "cat"), "['cat', 'dog', 'cat']"), ((), "[]")]
)
def test_a_vocabulary_holds_each_label_once(vocabulary: tuple[str, ...], found: str) -> None:
    message = f"at least one label and none twice, found {re.escape(found)}. Mend the source"
    with pytest.raises(GmpipeError, match=message):
        make_manifest(vocabulary=vocabulary)


def changed_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, pa.field(name, kind), table.column(name).cast(kind))


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
def test_other_columns_are_an_error(change: Callable[[pa.Table], pa.Table]) -> None:
    table = change(make_manifest().table)
    message = r"(?s)manifest of pets: expected the columns.*image_id: string.*found.*\nMend the sou"
    with pytest.raises(GmpipeError, match=message):
        make_manifest(table=table)


def counts_of_train(**changes: object) -> Any:
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
def test_counts_may_tell_of_images_that_were_left_out(changes: Row) -> None:
    counts = counts_of_train(**changes)
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
def test_counts_that_the_rows_belie_are_an_error(changes: Row) -> None:
    message = (
        r"manifest of pets: the counts of train are \{.*\}, expected listed, missing, unlabelled, "
        "images with 2 images, which .* Mend the source and run"
    )
    with pytest.raises(GmpipeError, match=message):
        make_manifest(counts=counts_of_train(**changes))


def test_counts_of_other_splits_are_an_error() -> None:
    counts = full_counts(make_manifest().table)
    del counts["test"]
    message = r"its counts are of the splits \['train'\], expected \['test', 'train'\]\. Mend"
    with pytest.raises(GmpipeError, match=message):
        make_manifest(counts=counts)


# --- breaches on disk ----------------------------------------------------------------------------


def change_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with pq.ParquetFile(path) as file:
        table = file.read()
    described = json.loads(table.schema.metadata[b"gmpipe"])
    change(described)
    pq.write_table(table.replace_schema_metadata({"gmpipe": json.dumps(described)}), path)


def set_metadata(path: Path, metadata: dict[str, str] | None) -> None:
    pq.write_table(make_manifest().table.replace_schema_metadata(metadata), path)


def flip_a_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(4, 40):
        content[place] ^= 0xFF
    path.write_bytes(content)


NEWER = MANIFEST_VERSION + 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "there is no manifest at "),
        (lambda path: path.write_text("image_id,path\n"), "is not a whole Parquet file"),
        (lambda path: path.write_bytes(b""), "is not a whole Parquet file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is not a whole Parquet file"),
        (flip_a_page, "is not a whole Parquet file"),
        (lambda path: set_metadata(path, None), "lacks gmpipe's metadata: it is no manifest"),
        (lambda path: set_metadata(path, {"other": "{}"}), "lacks gmpipe's metadata"),
        (lambda path: set_metadata(path, {"gmpipe": "{"}), "its metadata are damaged"),
        (lambda path: set_metadata(path, {"gmpipe": "[]"}), "its metadata are damaged"),
        (
            lambda path: change_metadata(path, lambda found: found.pop("vocabulary")),
            r"its metadata are damaged \(KeyError\('vocabulary'\)\)",
        ),
        (
            lambda path: change_metadata(path, lambda found: found.pop("counts")),
            r"its metadata are damaged \(KeyError\('counts'\)\)",
        ),
        (
            lambda path: change_metadata(
                path, lambda found: found.update(counts={"train": 3, "test": list(COUNTS)})
            ),
            "its metadata are damaged",
        ),
        (
            lambda path: change_metadata(path, lambda found: found.update(version=NEWER)),
            f"has version {NEWER}, this gmpipe reads {MANIFEST_VERSION}",
        ),
        (
            lambda path: change_metadata(path, lambda found: found.update(version=0)),
            f"has version 0, this gmpipe reads {MANIFEST_VERSION}",
        ),
    ],
)
def test_what_is_no_manifest_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, make_manifest())
    spoil(path)
    with pytest.raises(GmpipeError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("Run `gmpipe prepare` to write it anew.")


def test_the_contract_holds_on_disk_too(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, make_manifest())
    change_metadata(path, lambda found: found.update(vocabulary=["cat", "dog"]))
    with pytest.raises(GmpipeError, match=r"row 0 \('a'\): unknown label 2, expected .* 0 to 1"):
        read_manifest(path)


# --- boxes ---------------------------------------------------------------------------------------


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


def test_a_data_set_may_have_no_object_at_all(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"
    write_boxes(path, BoxTable(("cat", "dog"), {}))
    read = read_boxes(path, ["a"])
    assert read.classes == ("cat", "dog")
    assert_same_boxes(read.images["a"], make_boxes().images["none"])


def assert_same_boxes(found: ImageBoxes, expected: ImageBoxes) -> None:
    assert found.classes.dtype == np.int64
    assert found.boxes.dtype == np.float32
    assert found.boxes.shape == (len(found.classes), 4)
    np.testing.assert_array_equal(found.classes, expected.classes)
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_boxes_come_back_as_they_were(tmp_path: Path) -> None:
    path, written = tmp_path / "boxes.parquet", make_boxes()
    write_boxes(path, written)
    read = read_boxes(path, ["b", "none", "a"])
    assert read.classes == ("cat", "dog")
    assert list(read.images) == ["b", "none", "a"]
    for image_id, image in read.images.items():
        assert_same_boxes(image, written.images[image_id])


def test_only_the_boxes_that_are_asked_for_are_read(tmp_path: Path) -> None:
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
def test_an_unsound_box_is_named(tmp_path: Path, number: int, box: list[float]) -> None:
    path, table = tmp_path / "boxes.parquet", make_boxes()
    table.images["b"].classes[0] = number
    table.images["b"].boxes[0] = box
    write_boxes(path, table)
    shown = re.escape(str(np.array(box, dtype=np.float32).tolist()))
    message = rf"boxes\.parquet, row 2: class {number} with box {shown}; expected a class in 1\.\.2"
    # The row is found though its image was not asked for.
    with pytest.raises(GmpipeError, match=message):
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
def test_other_columns_are_no_boxes(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = tmp_path / "boxes.parquet"
    pq.write_table(pa.table(columns).replace_schema_metadata({"classes": '["cat"]'}), path)
    with pytest.raises(GmpipeError, match=r"(?s)boxes\.parquet: expected the columns.*without nul"):
        read_boxes(path, ["a"])


def test_a_file_that_is_no_parquet_holds_no_boxes(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(GmpipeError, match=r"boxes\.parquet is not a whole Parquet file .*prepare`"):
        read_boxes(path, ["a"])


def test_a_data_set_without_boxes_names_the_way_out(tmp_path: Path) -> None:
    message = (
        r"there are no boxes at .*boxes\.parquet, and a detector can only be fitted on boxes\. Set "
        r"`detector\.<dataset>\.source` to `torchvision` or `file`"
    )
    with pytest.raises(GmpipeError, match=message):
        read_boxes(tmp_path / "boxes.parquet", ["a"])
