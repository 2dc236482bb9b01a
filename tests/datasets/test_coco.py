"""pipeline.datasets.coco: what the files say, and every breach of their format by its message."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import SIZE, coco_file, coco_files, coco_image, coco_object, make_coco

from pipeline.datasets import coco
from pipeline.datasets.coco import read_coco
from pipeline.errors import GmpipeError
from pipeline.settings import CocoSettings

SETTINGS = CocoSettings(source="coco")
REMEDY = (
    r"COCO is expected with annotations/, train2014/ and val2014/ in .*: unpack the publisher's "
    r"annotations_\*\.zip, train2014\.zip and val2014\.zip there\.$"
)
TRAIN = "annotations/instances_train2014.json"
TEST = "annotations/instances_val2014.json"


# --- sound files ---------------------------------------------------------------------------------


def test_labels_are_places_in_the_order_of_category_ids(tmp_path: Path) -> None:
    found = read_coco(make_coco(tmp_path), SETTINGS)
    assert found.vocabulary == ("person", "train", "toothbrush")
    rows = {row["image_id"]: row for row in found.table.to_pylist()}
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
    assert found.split_name == "train2014/val2014"
    assert list(found.sources) == [TRAIN, TEST]


def test_boxes_are_corners_in_the_unit_square(tmp_path: Path) -> None:
    boxes = read_coco(make_coco(tmp_path), SETTINGS).boxes
    assert boxes is not None
    assert boxes.classes == ("person", "train", "toothbrush")
    assert sorted(boxes.images) == ["30", "8", "9"]
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
    found = read_coco(tmp_path, CocoSettings(source="coco", train="train2017", test="val2017"))
    assert found.table.column("path")[0].as_py().startswith("train2017/")


def test_files_without_any_annotation(tmp_path: Path) -> None:
    files = coco_files()
    for content in files.values():
        content["annotations"] = []
    found = read_coco(make_coco(tmp_path, files), SETTINGS)
    assert found.table.column("labels").to_pylist() == [[]] * 6
    assert found.boxes is not None
    assert found.boxes.images == {}


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 3])
def test_a_file_may_be_cut_anywhere(tmp_path: Path, chunk: int, indent: int | None) -> None:
    make_coco(tmp_path)
    expected = read_coco(tmp_path, SETTINGS).table
    for split, content in coco_files().items():
        extra = {"number": 12, "none": None, "deep": [[1, [2]], "ü]", {}, 3.5e2, True], **content}
        text = json.dumps(extra, indent=indent, ensure_ascii=False)
        (tmp_path / f"annotations/instances_{split}.json").write_text(f"\n {text}\n\n")
    with mock.patch.object(coco, "_CHUNK", chunk):
        assert read_coco(tmp_path, SETTINGS).table == expected


annotation = st.tuples(st.integers(1, 6), st.sampled_from([1, 7, 90]), st.booleans())


@given(train=st.lists(annotation, max_size=20), order=st.permutations(range(6)))
@settings(max_examples=25, deadline=None)
def test_labels_are_what_is_annotated(
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
        "train2014": coco_file([coco_image(place + 1) for place in order], records),
        "val2014": coco_file([coco_image(99)], []),
    }
    for split, content in files.items():
        path = root / f"annotations/instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    found = read_coco(root, SETTINGS)
    assert found.table.column("image_id").to_pylist()[:-1] == [str(n + 1) for n in order]
    names = {1: "person", 7: "train", 90: "toothbrush"}
    for row in found.table.to_pylist():
        expected = {names[c] for image, c, _ in train if str(image) == row["image_id"]}
        assert {found.vocabulary[number] for number in row["labels"]} == expected
        easy = [c for image, c, crowd in train if str(image) == row["image_id"] and not crowd]
        assert found.boxes is not None
        image = found.boxes.images.get(row["image_id"])
        classes = [] if image is None else [found.boxes.classes[n - 1] for n in image.classes]
        assert classes == [names[category] for category in easy]


def test_the_real_sample(shared: Path) -> None:
    root = shared / "data/coco-sample"
    found = read_coco(root, SETTINGS)
    assert len(found.vocabulary) == 80
    assert found.vocabulary == tuple(np.load(shared / "data/label-vectors/coco.npz")["labels"])
    rows = {row["image_id"]: row for row in found.table.to_pylist()}
    assert len(rows) == 32
    seen = 0
    for name in (TRAIN, TEST):
        content = json.loads((root / name).read_text())
        category = {item["id"]: item["name"] for item in content["categories"]}
        for image in content["images"]:
            row = rows[str(image["id"])]
            objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            labels = {category[item["category_id"]] for item in objects}
            assert {found.vocabulary[number] for number in row["labels"]} == labels
            assert (root / row["path"]).is_file()
            assert (row["width"], row["height"]) == (image["width"], image["height"])
            easy = [item for item in objects if not item["iscrowd"]]
            assert found.boxes is not None
            if easy:
                boxes = found.boxes.images[row["image_id"]].boxes
                scale = np.array([image["width"], image["height"]] * 2)
                pixels = np.array([item["bbox"] for item in easy])
                pixels[:, 2:] += pixels[:, :2]
                np.testing.assert_allclose(boxes * scale, pixels, atol=0.02)
                seen += len(easy)
    assert seen > 200
    assert sum(not row["labels"] for row in rows.values()) == 2


def test_outlines_are_not_kept(tmp_path: Path) -> None:
    """A file of 50 long outlines takes the memory of a few."""
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
    with mock.patch.object(coco, "_CHUNK", 1 << 14):
        assert len(read_coco(tmp_path, SETTINGS).table) == 6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < whole / 8


# --- breaches ------------------------------------------------------------------------------------


def refused(root: Path, pattern: str) -> None:
    with pytest.raises(GmpipeError, match=pattern):
        read_coco(root, SETTINGS)


@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_a_missing_file_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    path = make_coco(tmp_path) / name
    path.unlink()
    refused(tmp_path, rf"^there is no {re.escape(str(path))}\. {REMEDY}")
    path.mkdir()
    refused(tmp_path, rf"^{re.escape(str(path))} can't be read \(.*Is a directory.*\)\. {REMEDY}")


def test_nothing_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "coco", rf"there is no .*instances_train2014\.json\. {REMEDY}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"after character 0: found '', expected '\{'"),
        (b"[]", r"after character 0: found '\[', expected '\{'"),
        (b"{}", "has no array `categories`"),
        (b'{"images": {}, "annotations": [], "categories": []}', "has no array `images`"),
        (b"{images: 3}", "after character 1: .*property name|after character 1: Expecting value"),
        (b"{3: 3}", "after character 2: found 3, expected a name"),
        (b'{"info" 3}', "after character 8: found '3', expected ':'"),
        (b'{"info": 3', "after character 10: found '' after a value"),
        (b'{"info": {"a": 1}', "after character 17: found '' after a value"),
        (b'{"info": [{"id": 1}, {"id"', "after character 26: Expecting ':' delimiter"),
        (b'{"info": 3x}', "after character 10: found 'x' after a value"),
        (b'{"info": [1 2]}', "after character 12: found '2', expected ',' or ']'"),
        (b'{"info": [1,, 2]}', "after character 12: Expecting value"),
        (b'{"info": 3} 4', "after character 12: expected the end of the file"),
        (b'{"info": ' + b"[" * 99_999, "Traceback|after character|recursion"),
        (b'{"info": {"a": ' + b"[" * 99_999, "after character 9: maximum recursion depth"),
        (b"\xef\xbb\xbf{}", r"after character 0: found '\\ufeff', expected '\{'"),
        (b'{"info": "\xff"}', "can't be read .*utf-8"),
        ('{"info": 3}'.encode("utf-16"), "can't be read .*utf-8"),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = make_coco(tmp_path) / TRAIN
    path.write_bytes(content)
    refused(tmp_path, rf"^{re.escape(str(path))}.*({message}).*{REMEDY}")


def test_a_download_that_was_cut_off(tmp_path: Path) -> None:
    path = make_coco(tmp_path) / TRAIN
    content = path.read_text()
    for chunk in (3, 1 << 22):
        with mock.patch.object(coco, "_CHUNK", chunk):
            for end in range(1, len(content) - 1, 41):
                path.write_text(content[:end])
                refused(
                    tmp_path, r"2014\.json, after character \d+: .*is cut off or no JSON\. COCO"
                )


def test_a_record_without_end_is_given_up(tmp_path: Path) -> None:
    path = make_coco(tmp_path) / TRAIN
    path.write_text('{"images": ["' + "x" * 10_000 + '"]}')
    with mock.patch.multiple(coco, _CHUNK=100, _LONGEST=1000):
        refused(tmp_path, "after character 12: Unterminated string")


Files = dict[str, Any]


def changed(section: str, place: int, **changes: Any) -> Callable[[Files], None]:
    """Set keys of a record of the training file; None takes one out."""

    def change(files: Files) -> None:
        record = files["train2014"][section][place]
        for key, value in changes.items():
            if value is None:
                del record[key]
            else:
                record[key] = value

    return change


def added(section: str, record: Any, split: str = "train2014") -> Callable[[Files], None]:
    return lambda files: files[split][section].append(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("images", 1, id=30),
            r"images\[1\]: the image 30 stands here twice\. Take one out",
        ),
        (changed("images", 1, id=None), r"images\[1\] has no `id`\. Mend the file"),
        (changed("images", 1, file_name=None), r"images\[1\] has no `file_name`"),
        (changed("images", 1, width=None), r"images\[1\] has no `width`"),
        (changed("images", 1, height=None), r"images\[1\] has no `height`"),
        (changed("images", 1, id="9"), r"images\[1\]: `id` is '9', expected a whole number from 0"),
        (changed("images", 1, id=True), r"images\[1\]: `id` is True, expected a whole number"),
        (changed("images", 1, id=-9), r"images\[1\]: `id` is -9, expected a whole number from 0"),
        (changed("images", 1, id=2**40), rf"images\[1\]: `id` is {2**40}, expected"),
        (changed("images", 1, width=0), r"`width` is 0, expected a whole number from 1"),
        (changed("images", 1, height=1.5), r"`height` is 1\.5, expected a whole number from 1"),
        (changed("images", 1, file_name=""), r"`file_name` is '', expected a name"),
        (changed("images", 1, file_name=7), r"`file_name` is 7, expected a name"),
        (changed("images", 1, file_name="\ud800"), r"`file_name` is '\\ud800', expected a name"),
        (added("images", [1]), r"images\[4\] is \[1\], expected an object\. Mend the file"),
        (
            changed("annotations", 2, image_id=77),
            r"annotations\[2\]: `image_id` is 77, .*such image",
        ),
        (changed("annotations", 2, image_id=8), r"annotations\[2\]: `image_id` is 8, and the file"),
        (
            changed("annotations", 2, category_id=2),
            r"`category_id` is 2, .*no such category\. Mend",
        ),
        (changed("annotations", 2, category_id="1"), r"`category_id` is '1', expected a whole"),
        (changed("annotations", 2, id=2), r"annotations\[2\]: its id 2 stands here twice"),
        (
            changed("annotations", 2, id=2**70),
            r"annotations\[2\]: `id` is 1180.*, expected a whole",
        ),
        (changed("annotations", 2, id=None), r"annotations\[2\] has no `id`"),
        (changed("annotations", 2, image_id=None), r"annotations\[2\] has no `image_id`"),
        (changed("annotations", 2, category_id=None), r"annotations\[2\] has no `category_id`"),
        (changed("annotations", 2, bbox=None), r"annotations\[2\] has no `bbox`"),
        (changed("annotations", 2, iscrowd=None), r"annotations\[2\] has no `iscrowd`"),
        (changed("annotations", 2, iscrowd=2), r"`iscrowd` is 2, expected 0 or 1"),
        (changed("annotations", 2, iscrowd=1.0), r"`iscrowd` is 1\.0, expected 0 or 1"),
        (
            changed("annotations", 2, bbox=[1, 2, 3]),
            r"`bbox` is \[1, 2, 3\], expected four numbers",
        ),
        (changed("annotations", 2, bbox="1234"), r"`bbox` is '1234', expected four numbers"),
        (changed("annotations", 2, bbox=[1, 2, 3, "4"]), r"`bbox` is \[1, 2, 3, '4'\], expected"),
        (changed("annotations", 2, bbox=[1, 2, 3, float("nan")]), r"`bbox` is .*nan\], expected"),
        (changed("annotations", 2, bbox=[1, 2, 3, float("inf")]), r"`bbox` is .*inf\], expected"),
        (
            changed("annotations", 2, bbox=[1, 2, 3, 10**400]),
            r"`bbox` is .*, expected four numbers",
        ),
        (changed("categories", 1, id=7), r"categories\[1\]: 7 or 'person' stands here twice"),
        (
            changed("categories", 1, name="train"),
            r"categories\[1\]: 1 or 'train' stands here twice",
        ),
        (changed("categories", 1, name=None), r"categories\[1\] has no `name`"),
        (changed("categories", 1, name=3), r"categories\[1\]: `name` is 3, expected a name"),
        (
            lambda files: files["train2014"].pop("annotations"),
            "has no array `annotations`. COCO is",
        ),
        (lambda files: files["train2014"].pop("categories"), "has no array `categories`. COCO is"),
    ],
)
def test_a_breach_names_its_record(
    tmp_path: Path, change: Callable[[Files], object], message: str
) -> None:
    path = make_coco(tmp_path) / TRAIN
    files = coco_files()
    change(files)
    path.write_text(json.dumps(files["train2014"]))
    refused(tmp_path, rf"^{re.escape(str(path))}.*{message}")


def test_an_image_of_both_splits(tmp_path: Path) -> None:
    files = coco_files()
    added("images", coco_image(400, "val2014"), "val2014")(files)
    refused(
        make_coco(tmp_path, files),
        r"val2014\.json: the image 400 is in .*train2014\.json too\. Take it out of one",
    )


@pytest.mark.parametrize(
    ("record", "shown"),
    [({"id": 8, "name": "new"}, r"\(8, 'new'\)"), ({"id": 1, "name": "folk"}, r"\(1, 'folk'\)")],
)
def test_files_of_two_vocabularies(tmp_path: Path, record: Any, shown: str) -> None:
    files = coco_files()
    categories = files["val2014"]["categories"]
    categories[:] = [item for item in categories if item["id"] != record["id"]] + [record]
    refused(
        make_coco(tmp_path, files),
        rf"val2014\.json: its categories are not those of .*train2014\.json; .* differ in {shown}",
    )
