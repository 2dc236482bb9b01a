"""YOLO's labels in Ultralytics' layout, and what its data.yaml may say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from brought import make_brought
from ruamel.yaml import YAML
from trees import draw_image, images_of, placed

from pipeline.datasets.listing import Listing, as_on_disk, is_current, make_manifest
from pipeline.datasets.manifest import read_boxes, read_manifest
from pipeline.datasets.readers.coco import read_coco
from pipeline.datasets.readers.yolo import read_yolo
from pipeline.errors import InputError, MissingError
from pipeline.files import sha256_file
from pipeline.settings import CocoSettings, YoloSettings
from stages.checkout.yaml_text import load_yaml

NAMES = {0: "bee", 1: "wasp"}
LABELS = {
    "images/train/a.jpg": "0 0.5 0.5 0.2 0.4\n1 0.25 0.25 0.5 0.5\n",
    "images/train/b.png": "",
    "images/train/c.jpg": None,
    "images/val/d.jpg": "1 0.1 0.1 0.9 0.1 0.9 0.8\n",
}
YAML_OF = {"path": "../datasets/birds", "train": "images/train", "val": "images/val"}


def write_yolo(
    root: Path,
    labels: Mapping[str, str | None] = LABELS,
    description: Mapping[str, Any] = YAML_OF,
    names: Any = NAMES,
) -> Path:
    """Draw the photographs, and write label files for all but those with None."""
    for number, (path, text) in enumerate(labels.items()):
        draw_image(root / path, number)
        if text is not None:
            file = root / path.replace("images", "labels")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".txt").write_text(text)
    with (root / "data.yaml").open("w") as stream:
        YAML().dump({**description, "names": names}, stream)
    return root


def read(root: Path, **settings: Any) -> Listing:
    chosen = YoloSettings.model_validate({"source": "yolo", "test": "val", **settings})
    return as_on_disk(root, read_yolo(root, chosen, load_yaml))


def test_boxes_outlines_and_photographs_without_labels(tmp_path: Path) -> None:
    listing = read(write_yolo(tmp_path / "birds"))
    assert listing.vocabulary == ("bee", "wasp")
    rows = listing.table.to_pylist()
    assert [(row["image_id"], row["split"], row["labels"]) for row in rows] == [
        ("images/train/a.jpg", "train", [0, 1]),
        ("images/train/b.png", "train", []),
        ("images/train/c.jpg", "train", []),
        ("images/val/d.jpg", "test", [1]),
    ]
    boxes = placed(listing, tmp_path / "birds")
    np.testing.assert_allclose(
        boxes.images["images/train/a.jpg"].boxes, [[0.4, 0.3, 0.6, 0.7], [0, 0, 0.5, 0.5]]
    )
    assert boxes.images["images/train/a.jpg"].classes.tolist() == [1, 2]
    np.testing.assert_allclose(boxes.images["images/val/d.jpg"].boxes, [[0.1, 0.1, 0.9, 0.8]])


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "without path": ("images/train", {"train": "images/train", "val": "images/val"}),
    "of another machine": (
        "images/train",
        {"path": "/home/x/birds", "train": "images/train", "val": "/home/x/birds/images/val"},
    ),
    "as Windows writes it": (
        "images/train",
        {"path": "C:\\birds", "train": "images\\train", "val": ".\\images\\val"},
    ),
    "one above": ("train/images", {"train": "../train/images", "val": "../val/images"}),
    "the folder above images": ("train/images", {"train": "train", "val": "val"}),
    "in a folder": (
        "birds/images/train",
        {"path": "birds", "train": ["images/train"], "val": ["images/val"]},
    ),
    "lists": ("images/train", {"train": "train.txt", "val": "lists/val.txt"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_paths_of_every_kind(tmp_path: Path, layout: str) -> None:
    place, description = LAYOUTS[layout]
    moved = {
        path.replace("images/train", place).replace(
            "images/val", place.replace("train", "val")
        ): text
        for path, text in LABELS.items()
    }
    root = write_yolo(tmp_path / "birds", moved, description)
    (root / "lists").mkdir()
    train, val = ([path for path in moved if part in path] for part in ("train", "val"))
    (root / "train.txt").write_text("".join(f"./{path}\r\n" for path in train))
    (root / "lists/val.txt").write_text("".join(f"/home/x/birds/{path}\n" for path in val))
    listing = read(root)
    found = {key: labels for key, (_, labels) in images_of(listing, root).items()}
    assert found == {path: ["bee", "wasp"] if path.endswith("a.jpg") else [] for path in train}
    assert listing.table.to_pylist()[-1]["labels"] == [1]


def test_what_changes_is_noticed(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "birds")
    settings = YoloSettings(source="yolo", test="val")
    manifest, _ = make_manifest(read(root), "birds", root, settings)
    assert is_current(manifest, [], root, settings)
    for change in (
        lambda: draw_image(root / "images/train/new.jpg", 9),
        lambda: (root / "labels/train/c.txt").write_text("0 0.5 0.5 0.1 0.1"),
        lambda: (root / "labels/val/d.txt").write_text("0 0.5 0.5 0.1 0.1"),
        lambda: (root / "data.yaml").write_text((root / "data.yaml").read_text() + "# other"),
    ):
        change()
        assert not is_current(manifest, [], root, settings)
        manifest, _ = make_manifest(read(root), "birds", root, settings)
        assert is_current(manifest, [], root, settings)


@pytest.mark.parametrize("entry", [".", "./"])
def test_labels_beside_photographs_are_hashed_alone(tmp_path: Path, entry: str) -> None:
    flat = {f"{n}.jpg": "0 0.5 0.5 1 1" for n in range(9)}
    root = write_yolo(tmp_path / "birds", flat, {"path": "../birds", "train": entry, "val": entry})
    settings = YoloSettings(source="yolo", test_share=0.5)
    listing = read(root, test="test", test_share=0.5)
    assert set(images_of(listing, root)) < set(flat)
    assert set(listing.table["path"].to_pylist()) == set(flat)
    manifest, _ = make_manifest(listing, "birds", root, settings)
    (root / "prepared").mkdir()
    (root / "prepared/manifest.parquet").touch()
    with mock.patch("pipeline.datasets.listing.sha256_file", wraps=sha256_file) as hashed:
        assert is_current(manifest, [], root, settings)
    names = {call.args[0].name for call in hashed.call_args_list}
    assert names == {"data.yaml", *(f"{n}.txt" for n in range(9))}
    (root / "3.txt").write_text("")
    assert not is_current(manifest, [], root, settings)


def test_key_points_after_the_box_are_not_read(tmp_path: Path) -> None:
    line = "1 0.5 0.5 0.2 0.2 0.4 0.4 2 0.6 0.6 1\n"
    pose = {**YAML_OF, "kpt_shape": [2, 3]}
    root = write_yolo(tmp_path / "birds", {**LABELS, "images/val/d.jpg": line}, pose)
    boxes = placed(read(root), root).images["images/val/d.jpg"].boxes
    np.testing.assert_allclose(boxes, [[0.4, 0.4, 0.6, 0.6]])


def test_three_splits_and_a_share_of_one(tmp_path: Path) -> None:
    photographs = {
        f"images/{part}/{n}.jpg": "0 0.5 0.5 1 1"
        for part in ("train", "val", "test")
        for n in range(9)
    }
    description = {part: f"images/{part}" for part in ("train", "val", "test")}
    root = write_yolo(tmp_path / "birds", photographs, description, ["bee"])
    rows = read(root, val="val", test="test").table.to_pylist()
    assert all(row["image_id"].startswith(f"images/{row['split']}/") for row in rows)
    assert len(rows) == 27
    rows = read(root, test="test", test_share=0.5).table.to_pylist()
    assert {row["split"] for row in rows} == {"train", "test"}
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", r"found '0 0\.5 0\.5 0\.2'.*class x y width height"),
        ("0 0.5 0.5 0.2 0.2 0.9", "outline"),
        ("bee 0.5 0.5 0.2 0.2", "bee"),
        ("2 0.5 0.5 0.2 0.2", r"class is 2.*0 to 1.*data\.yaml has 2"),
        ("0.5 0.5 0.5 0.2 0.2", r"class is 0\.5"),
        ("-1 0.5 0.5 0.2 0.2", "class is -1"),
        ("0 320 240 20 20", "320.*0 to 1.*pixels"),
        ("0 0.5 nan 0.2 0.2", "nan.*0 to 1"),
        ("0 0.5 0.5 -0.005 0.1", r"-0\.005.*0 or more"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    labels = {**LABELS, "images/train/b.png": f"0 0.5 0.5 0.1 0.1\n\n{line}\n"}
    root = write_yolo(tmp_path / "birds", labels)
    with pytest.raises(InputError, match=rf"labels/train/b\.txt, line 3: .*{message}"):
        read(root)


@pytest.mark.parametrize(
    ("description", "names", "error", "message"),
    [
        (
            {"train": "images/train"},
            NAMES,
            InputError,
            r"`val` is None.*train.*prepare\.birds\.test",
        ),
        ({**YAML_OF, "train": 3}, NAMES, InputError, "`train` is 3"),
        ({**YAML_OF, "val": "images/x"}, NAMES, MissingError, "`images/x` is no folder"),
        ({**YAML_OF, "val": "labels/train"}, NAMES, MissingError, "no photograph"),
        (YAML_OF, None, InputError, "`names` is None"),
        (YAML_OF, {1: "a", 2: "b"}, InputError, "`names` has the numbers 1, 2.*0 to 1"),
        (YAML_OF, ["a", "a"], InputError, "class 1 of `names` is 'a'"),
        (YAML_OF, {0: "a", 1: None}, InputError, "class 1 of `names` is None"),
        (YAML_OF, ["a", True], InputError, "class 1 of `names` is True"),
        (
            {"train": "images/train", "val": ["images/val", "images/train/"]},
            NAMES,
            InputError,
            "`train` and `val`.*'images/train/'.*`prepare.birds.test_share: 0.2`.*'train'",
        ),
    ],
)
def test_a_wrong_description_is_named(
    tmp_path: Path, description: Any, names: Any, error: Any, message: str
) -> None:
    root = write_yolo(tmp_path / "birds", description=description, names=names)
    with pytest.raises(error, match=rf"data\.yaml.*{message}"):
        read(root)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "birds", dict.fromkeys(LABELS))
    with pytest.raises(MissingError, match=r"'train'.*a\.jpg.*labels/train/a\.txt"):
        read(root)
    (root / "data.yaml").rename(root / "birds.yaml")
    with pytest.raises(MissingError, match=r"data\.yaml.*prepare\.birds\.file.*birds\.yaml"):
        read(root)
    (root / "birds.yaml").write_text("names: [a, b")
    with pytest.raises(InputError, match=r"birds\.yaml is not valid YAML"):
        read(root, file="birds.yaml")
    (root / "birds.yaml").write_text("- a")
    with pytest.raises(InputError, match=r"birds\.yaml is list"):
        read(root, file="birds.yaml")


def write_coco_as_yolo(sample: Path, root: Path) -> set[str]:
    """Write COCO's annotations, without crowds, as YOLO's labels beside links to the photographs.

    Returns:
        the paths of the photographs that have a crowd.
    """
    names: list[str] = []
    crowded = set()
    (root / "images").mkdir(parents=True)
    for split in ("train2014", "val2014"):
        (root / f"images/{split}").symlink_to(sample / split)
        raw = json.loads((sample / f"annotations/instances_{split}.json").read_text())
        categories = sorted(raw["categories"], key=lambda one: one["id"])
        numbers = {one["id"]: number for number, one in enumerate(categories)}
        names = [one["name"] for one in categories]
        for image in raw["images"]:
            path, lines = f"images/{split}/{image['file_name']}", []
            sides = np.array([image["width"], image["height"]] * 2)
            for one in raw["annotations"]:
                if one["image_id"] != image["id"]:
                    continue
                if one["iscrowd"]:
                    crowded.add(path)
                    continue
                x, y, width, height = one["bbox"]
                box = np.array([x + width / 2, y + height / 2, width, height]) / sides
                lines.append(" ".join(map(str, [numbers[one["category_id"]], *box])))
            file = (root / path.replace("images", "labels")).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines))
    with (root / "data.yaml").open("w") as stream:
        YAML().dump({"train": "images/train2014", "val": "images/val2014", "names": names}, stream)
    return crowded


def test_real_photographs_of_coco_have_the_labels_and_boxes_of_their_json(
    shared: Path, tmp_path: Path
) -> None:
    sample = shared / "data/coco-sample"
    flow = make_brought(tmp_path / "checkout")
    root = flow / "data/yolo"
    crowded = write_coco_as_yolo(sample, root)
    assert "Every image exists" in flow.ok("prepare", "--dataset", "yolo", "--check")
    flow.ok("prepare", "--dataset", "yolo")
    assert "unchanged" in flow.ok("prepare", "--dataset", "yolo")
    rows = read_manifest(root / "prepared/manifest.parquet").table.to_pylist()
    boxes = read_boxes(root / "prepared/boxes.parquet", [row["image_id"] for row in rows])

    official = read_coco(sample, CocoSettings(source="coco"))
    places = placed(official, sample)
    expected = {f"images/{row['path']}": row for row in official.table.to_pylist()}
    assert len(rows) == len(expected) == 32
    for row in rows:
        other = expected[row["path"]]
        for name in ("split", "width", "height"):
            assert row[name] == other[name]
        if row["path"] not in crowded:
            assert row["labels"] == other["labels"]
        ours, theirs = boxes.images[row["image_id"]], places.images[other["image_id"]]
        assert ours.classes.tolist() == theirs.classes.tolist()
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-6)
