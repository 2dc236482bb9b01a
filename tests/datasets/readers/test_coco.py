"""pipeline.datasets.readers.coco: labels and boxes of the files, and what breaks their format."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from trees import SIZE, coco_file, coco_files, coco_image, coco_object, make_coco, placed

from pipeline.datasets.readers.coco import read_coco
from pipeline.errors import InputError, MissingError
from pipeline.formats import json_arrays
from pipeline.settings import CocoSettings

SETTINGS = CocoSettings(source="coco")
LAYOUT = (
    *("annotations/", "train2014/", "val2014/"),
    *("annotations_*.zip", "train2014.zip", "val2014.zip"),
)
"""What the message about a missing or truncated file says of COCO's layout."""
TRAIN = "annotations/instances_train2014.json"
TEST = "annotations/instances_val2014.json"


# --- valid files ---------------------------------------------------------------------------------


def test_labels_follow_the_order_of_category_ids(tmp_path: Path) -> None:
    listing = read_coco(make_coco(tmp_path), SETTINGS)
    assert listing.vocabulary == ("person", "train", "toothbrush")
    rows = {row["image_id"]: row for row in listing.table.to_pylist()}
    assert list(rows) == ["30", "9", "400", "31", "8", "32"]
    assert {key: row["labels"] for key, row in rows.items()} == {
        "30": [0],
        "9": [0, 2],  # the person is a crowd
        "400": [1],  # its box covers nothing
        "31": [],
        "8": [1],
        "32": [],
    }
    assert [row["split"] for row in rows.values()] == ["train"] * 4 + ["test"] * 2
    assert rows["9"]["path"] == "train2014/COCO_train2014_000000000009.jpg"
    assert rows["8"]["path"] == "val2014/COCO_val2014_000000000008.jpg"
    assert {(row["width"], row["height"]) for row in rows.values()} == {SIZE}
    assert [row["ignored"] for row in rows.values()] == [[]] * 6
    assert listing.split_name == "train2014/val2014"
    assert list(listing.sources) == [TRAIN, TEST]


def test_the_split_of_2017_has_the_same_labels_in_other_folders(tmp_path: Path) -> None:
    make_coco(tmp_path / "2014")
    make_coco(tmp_path / "2017", coco_files(2017))
    before = read_coco(tmp_path / "2014", SETTINGS)
    after = read_coco(
        tmp_path / "2017", CocoSettings(source="coco", train="train2017", test="val2017")
    )
    assert after.split_name == "train2017/val2017"
    assert list(after.sources) == [TRAIN.replace("2014", "2017"), TEST.replace("2014", "2017")]
    assert after.vocabulary == before.vocabulary
    paths = after.table.column("path").to_pylist()
    assert paths[1] == "train2017/000000000009.jpg"
    assert all((tmp_path / "2017" / path).is_file() for path in paths)
    assert after.table.drop_columns("path") == before.table.drop_columns("path")


def test_boxes_are_normalized_corners(tmp_path: Path) -> None:
    boxes = placed(read_coco(make_coco(tmp_path), SETTINGS), tmp_path)
    assert boxes.classes == ("person", "train", "toothbrush")
    assert sorted(key for key, image in boxes.images.items() if len(image.classes)) == [
        *("30", "8", "9")
    ]
    # Of 20 x 10 pixels; the crowd is left out.
    assert boxes.images["9"].classes.tolist() == [3, 3]
    np.testing.assert_allclose(
        boxes.images["9"].boxes, [[0.25, 0.25, 0.75, 0.75], [0, 0, 0.05, 0.1]], rtol=1e-6
    )
    np.testing.assert_array_equal(boxes.images["8"].boxes, [[0.75, 0, 1, 0.5]])  # clipped
    np.testing.assert_array_equal(boxes.images["30"].boxes, [[0, 0, 1, 1]])
    assert boxes.images["30"].boxes.dtype == np.float32


def test_splits_of_other_years(tmp_path: Path) -> None:
    files = coco_files()
    make_coco(tmp_path, {"train2017": files["train2014"], "val2017": files["val2014"]})
    listing = read_coco(tmp_path, CocoSettings(source="coco", train="train2017", test="val2017"))
    assert listing.table.column("path")[0].as_py().startswith("train2017/")


def test_files_without_any_annotation(tmp_path: Path) -> None:
    files = coco_files()
    for content in files.values():
        content["annotations"] = []
    listing = read_coco(make_coco(tmp_path, files), SETTINGS)
    assert listing.table.column("labels").to_pylist() == [[]] * 6
    assert not any(len(image.classes) for image in placed(listing, tmp_path).images.values())


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 3])
def test_chunks_may_end_anywhere(tmp_path: Path, chunk: int, indent: int | None) -> None:
    make_coco(tmp_path)
    expected = read_coco(tmp_path, SETTINGS).table
    for split, content in coco_files().items():
        extra = {"number": 12, "none": None, "deep": [[1, [2]], "ü]", {}, 3.5e2, True], **content}
        text = json.dumps(extra, indent=indent, ensure_ascii=False)
        (tmp_path / f"annotations/instances_{split}.json").write_text(f"\n {text}\n\n")
    with mock.patch.object(json_arrays, "_CHUNK", chunk):
        assert read_coco(tmp_path, SETTINGS).table == expected


annotation = st.tuples(st.integers(1, 6), st.sampled_from([1, 7, 90]), st.booleans())


@given(train=st.lists(annotation, max_size=20), order=st.permutations(range(6)))
@settings(max_examples=25)
def test_labels_and_boxes_follow_the_annotations(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[tuple[int, int, bool]],
    order: list[int],
) -> None:
    root = tmp_path_factory.mktemp("coco")
    records = [
        coco_object(number, image, category, iscrowd=int(crowd))
        for number, (image, category, crowd) in enumerate(train)
    ]
    files = {
        "train2014": coco_file([coco_image(number + 1) for number in order], records),
        "val2014": coco_file([coco_image(99)], []),
    }
    for split, content in files.items():
        path = root / f"annotations/instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    listing = read_coco(root, SETTINGS)
    assert listing.table.column("image_id").to_pylist()[:-1] == [str(n + 1) for n in order]
    names = {1: "person", 7: "train", 90: "toothbrush"}
    boxes = placed(listing, root)
    for row in listing.table.to_pylist():
        expected = {names[c] for image, c, _ in train if str(image) == row["image_id"]}
        assert {listing.vocabulary[label] for label in row["labels"]} == expected
        easy = [c for image, c, crowd in train if str(image) == row["image_id"] and not crowd]
        classes = [boxes.classes[n - 1] for n in boxes.images[row["image_id"]].classes]
        assert classes == [names[category] for category in easy]


def test_real_sample(shared: Path) -> None:
    root = shared / "data/coco-sample"
    listing = read_coco(root, SETTINGS)
    assert len(listing.vocabulary) == 80
    assert listing.vocabulary == tuple(np.load(shared / "data/label-vectors/coco.npz")["labels"])
    rows = {row["image_id"]: row for row in listing.table.to_pylist()}
    assert len(rows) == 32
    placed_boxes = placed(listing, root)
    seen = 0
    for name in (TRAIN, TEST):
        content = json.loads((root / name).read_text())
        category = {item["id"]: item["name"] for item in content["categories"]}
        for image in content["images"]:
            row = rows[str(image["id"])]
            objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            labels = {category[item["category_id"]] for item in objects}
            assert {listing.vocabulary[label] for label in row["labels"]} == labels
            assert (root / row["path"]).is_file()
            assert (row["width"], row["height"]) == (image["width"], image["height"])
            easy = [item for item in objects if not item["iscrowd"]]
            if easy:
                boxes = placed_boxes.images[row["image_id"]].boxes
                scale = np.array([image["width"], image["height"]] * 2)
                pixels = np.array([item["bbox"] for item in easy])
                pixels[:, 2:] += pixels[:, :2]
                np.testing.assert_allclose(boxes * scale, pixels, atol=0.02)
                seen += len(easy)
    assert seen > 200
    assert sum(not row["labels"] for row in rows.values()) == 2


def test_outlines_are_not_kept_in_memory(tmp_path: Path) -> None:
    """A file with 50 long outlines takes the memory of a few."""
    files = coco_files()
    outline = [[float(n) + 0.25 for n in range(2000)]] * 2
    for record in files["train2014"]["annotations"]:
        record["segmentation"] = outline
    path = make_coco(tmp_path, files) / TRAIN
    content = path.read_text()
    start, end = content.index('{"id": 4, "image_id": 9'), content.index('{"id": 5,')
    copies = (content[start:end].replace('"id": 4,', f'"id": {n},') for n in range(10, 60))
    path.write_text(content[:end] + "".join(copies) + content[end:])
    tracemalloc.start()
    json.loads(path.read_text())
    _, whole = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    with mock.patch.object(json_arrays, "_CHUNK", 1 << 14):
        assert len(read_coco(tmp_path, SETTINGS).table) == 6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < whole / 8


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_missing_or_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    path = make_coco(tmp_path) / name
    path.unlink()
    with refused(MissingError, str(path), *LAYOUT):
        read_coco(tmp_path, SETTINGS)
    path.mkdir()
    with refused(InputError, str(path), "folder", *LAYOUT):
        read_coco(tmp_path, SETTINGS)


def test_empty_root(tmp_path: Path) -> None:
    with refused(MissingError, "instances_train2014.json", *LAYOUT):
        read_coco(tmp_path / "coco", SETTINGS)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["character 0: ", "''", "'{'"]),
        (b"[]", ["character 0: ", "'['", "'{'"]),
        (b"{}", ["`categories`"]),
        (b'{"images": {}, "annotations": [], "categories": []}', ["`images`"]),
        (b"{images: 3}", ["character 1: "]),
        (b"{3: 3}", ["character 2: ", "3, expected"]),
        (b'{"info" 3}', ["character 8: ", "'3'", "':'"]),
        (b'{"info": 3', ["character 10: ", "''"]),
        (b'{"info": {"a": 1}', ["character 17: ", "''"]),
        (b'{"info": [{"id": 1}, {"id"', ["character 26: Expecting ':' delimiter"]),
        (b'{"info": 3x}', ["character 10: ", "'x'"]),
        (b'{"info": [1 2]}', ["character 12: ", "'2'", "',' or ']'"]),
        (b'{"info": [1,, 2]}', ["character 12: Expecting value"]),
        (b'{"info": 3} 4', ["character 12: ", "end of the file"]),
        (b'{"info": ' + b"[" * 99_999, ["character "]),
        (b'{"info": {"a": ' + b"[" * 99_999, ["character 9: maximum recursion depth"]),
        (b'{"info": "\xff"}', ["utf-8"]),
        ('{"info": 3}'.encode("utf-16"), ["utf-8"]),
    ],
)
def test_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = make_coco(tmp_path) / TRAIN
    path.write_bytes(content)
    with refused(InputError, str(path), *parts, *LAYOUT):
        read_coco(tmp_path, SETTINGS)


def test_truncated_download_is_refused(tmp_path: Path) -> None:
    path = make_coco(tmp_path) / TRAIN
    content = path.read_text()
    for chunk in (3, 1 << 22):
        with mock.patch.object(json_arrays, "_CHUNK", chunk):
            for end in range(1, len(content) - 1, 41):
                path.write_text(content[:end])
                with refused(InputError, "2014.json", "character ", *LAYOUT):
                    read_coco(tmp_path, SETTINGS)


def test_reading_stops_at_a_record_without_end(tmp_path: Path) -> None:
    path = make_coco(tmp_path) / TRAIN
    path.write_text('{"images": ["' + "x" * 10_000 + '"]}')
    with (
        mock.patch.multiple(json_arrays, _CHUNK=100, _LONGEST=1000),
        refused(InputError, "character 12: Unterminated string"),
    ):
        read_coco(tmp_path, SETTINGS)


Files = dict[str, Any]


def changed(section: str, index: int, **changes: Any) -> Callable[[Files], None]:
    """Set keys of a record of the training file; None removes a key."""

    def change(files: Files) -> None:
        record = files["train2014"][section][index]
        for key, value in changes.items():
            if value is None:
                del record[key]
            else:
                record[key] = value

    return change


def added(section: str, record: Any, split: str = "train2014") -> Callable[[Files], None]:
    return lambda files: files[split][section].append(record)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (changed("images", 1, id=30), ["images[1]", "image 30"]),
        *(
            (changed("images", 1, **{key: None}), ["images[1]", f"`{key}`"])
            for key in ("id", "file_name")
        ),
        (changed("images", 1, id="30"), ["images[1]", "image 30"]),
        (changed("images", 1, id=1.5), ["images[1]: `id` is 1.5"]),
        (changed("images", 1, id=" "), ["images[1]: `id` is ' '"]),
        (changed("images", 1, id=True), ["images[1]: `id` is True"]),
        (changed("images", 1, file_name=""), ["`file_name` is ''"]),
        (changed("images", 1, file_name=7), ["`file_name` is 7"]),
        (changed("images", 1, file_name="\ud800"), ["`file_name` is '\\ud800'"]),
        (added("images", [1]), ["images[4]", "[1]"]),
        (changed("annotations", 2, category_id=2), ["`category_id` is 2", "1, 7, 90"]),
        (changed("annotations", 2, category_id=[1]), ["`category_id` is [1]"]),
        *(
            (changed("annotations", 2, **{key: None}), ["annotations[2]", f"`{key}`"])
            for key in ("image_id", "category_id")
        ),
        (changed("annotations", 2, iscrowd=2), ["`iscrowd` is 2", "0 or 1"]),
        (changed("annotations", 2, bbox=[1, 2, 3]), ["`bbox` is [1, 2, 3]"]),
        (changed("annotations", 2, bbox="1234"), ["`bbox` is '1234'"]),
        (changed("annotations", 2, bbox=[1, 2, 3, "x"]), ["`bbox` is [1, 2, 3, 'x']"]),
        (changed("annotations", 2, bbox=[1, 2, None, 4]), ["`bbox` is [1, 2, None, 4]"]),
        (changed("annotations", 2, bbox=[1, 2, True, 4]), ["`bbox` is [1, 2, True, 4]"]),
        (changed("annotations", 2, bbox={"x": 1}), ["`bbox` is {'x': 1}"]),
        (changed("annotations", 2, bbox=[1, 2, 3, float("nan")]), ["`bbox` is [1, 2, 3, nan]"]),
        (changed("annotations", 2, bbox=[1, 2, 3, float("inf")]), ["`bbox` is [1, 2, 3, inf]"]),
        (changed("annotations", 2, bbox=[1, 2, 3, 10**400]), ["`bbox` is [1, 2, 3, 10000"]),
        (changed("categories", 1, id=7), ["categories[1]", "7", "'person'"]),
        (changed("categories", 1, name=None), ["categories[1]", "`name`"]),
        (changed("categories", 1, name=3.5), ["categories[1]: `name` is 3.5"]),
        (lambda files: files["train2014"].pop("annotations"), ["`annotations`", *LAYOUT]),
        (lambda files: files["train2014"].pop("categories"), ["`categories`", *LAYOUT]),
    ],
)
def test_invalid_record_is_named(
    tmp_path: Path, change: Callable[[Files], object], parts: list[str]
) -> None:
    path = make_coco(tmp_path) / TRAIN
    files = coco_files()
    change(files)
    path.write_text(json.dumps(files["train2014"]))
    with refused(InputError, str(path), *parts):
        read_coco(tmp_path, SETTINGS)


def test_image_in_both_splits_is_refused(tmp_path: Path) -> None:
    files = coco_files()
    added("images", coco_image(400, "val2014"), "val2014")(files)
    with refused(InputError, "val2014.json", "image 400", "train2014.json"):
        read_coco(make_coco(tmp_path, files), SETTINGS)


@pytest.mark.parametrize(
    ("record", "shown"),
    [({"id": 8, "name": "new"}, "8 ('new')"), ({"id": 1, "name": "folk"}, "1 ('folk')")],
)
def test_files_with_different_categories_are_refused(
    tmp_path: Path, record: Any, shown: str
) -> None:
    files = coco_files()
    categories = files["val2014"]["categories"]
    categories[:] = [item for item in categories if item["id"] != record["id"]] + [record]
    with refused(InputError, "val2014.json", "train2014.json", shown):
        read_coco(make_coco(tmp_path, files), SETTINGS)
