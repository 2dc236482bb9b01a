"""Small data sets, laid out on disk as their publishers do, and tables of users."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.datasets.check import Findings, check_files
from pipeline.datasets.disk import find_files
from pipeline.datasets.frames import place_boxes
from pipeline.datasets.listing import Listing, listed_manifest
from pipeline.datasets.manifest import COLUMNS, BoxTable, Manifest, full_counts
from pipeline.datasets.readers.nuswide import CONCEPTS
from pipeline.datasets.readers.table import read_table
from pipeline.datasets.readers.voc import VOCABULARY
from pipeline.settings import BoxFrame, TableSettings, VocSettings

SIZE = (20, 10)  # width and height of every image


def draw_image(path: Path, seed: int = 0) -> None:
    """A JPEG whose content depends on ``seed``, in a file of several hundred bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIZE)
    for x in range(SIZE[0]):
        for y in range(SIZE[1]):
            image.putpixel((x, y), ((seed * 37 + x * 11) % 256, (y * 23) % 256, seed % 256))
    image.save(path, quality=95)


def placed(listing: Listing, root: Path, frame: BoxFrame = "auto") -> BoxTable:
    """The boxes of a listing, as `prepare` writes them."""
    manifest = listed_manifest(listing, "photos", VocSettings(source="voc"))
    return place_boxes(listing, manifest, root, frame)[1]


def images_of(listing: Listing, root: Path) -> dict[str, tuple[str, list[str]]]:
    """Image id -> path and labels of each training image. Every path exists."""
    rows = [row for row in listing.table.to_pylist() if row["split"] == "train"]
    assert find_files(root, [row["path"] for row in rows]).all()
    return {
        row["image_id"]: (row["path"], [listing.vocabulary[label] for label in row["labels"]])
        for row in rows
    }


@dataclass(frozen=True)
class VocObject:
    """An object of VOC: xmin, ymin, xmax, ymax in pixels from 1, both ends included."""

    name: str
    box: tuple[float, float, float, float] = (1, 1, 20, 10)
    difficult: int = 0

    def xml(self) -> str:
        tags = ("xmin", "ymin", "xmax", "ymax")
        box = "".join(f"<{tag}>{side}</{tag}>" for tag, side in zip(tags, self.box, strict=True))
        return (
            f"<object><name>{self.name}</name><difficult>{self.difficult}</difficult>"
            f"<bndbox>{box}</bndbox></object>"
        )


Voc = dict[str, Sequence[VocObject]]

VOC_TRAIN: Voc = {
    "000001": [VocObject("dog", (1, 1, 10, 5)), VocObject("dog", (11, 6, 20, 10), difficult=1)],
    "000012": [VocObject("person", difficult=1), VocObject("aeroplane"), VocObject("cow")],
    "2008_000003": [],
}
VOC_TEST: Voc = {
    "000004": [VocObject("tvmonitor", (3, 2, 3, 2))],
    "000005": [VocObject("cat", difficult=1)],
}


def voc_xml(objects: Sequence[VocObject], size: tuple[int, int] = SIZE) -> str:
    """An annotation in the devkit's format."""
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>\n"
        f"{''.join(item.xml() for item in objects)}\n</annotation>\n"
    )


def make_voc(
    root: Path,
    train: Voc = VOC_TRAIN,
    test: Voc = VOC_TEST,
    *,
    newline: str = "\n",
    folder: str = "VOCdevkit/VOC2007",
    vocabulary: Sequence[str] = VOCABULARY,
) -> Path:
    """Write a devkit with XML files, equivalent class lists, and images; return its folder."""
    top = root / folder
    lists = top / "ImageSets/Main"
    lists.mkdir(parents=True)
    (top / "Annotations").mkdir()
    for name, split in (("trainval", train), ("test", test)):
        write_lines(lists / f"{name}.txt", list(split), newline)
        for image_id, objects in split.items():
            (top / f"Annotations/{image_id}.xml").write_text(voc_xml(objects))
            draw_image(top / f"JPEGImages/{image_id}.jpg", len(list(top.rglob("*.jpg"))))
        for label in vocabulary:
            lines = []
            for image_id, objects in split.items():
                kinds = {item.difficult for item in objects if item.name == label}
                value = 1 if 0 in kinds else 0 if kinds else -1
                lines.append(f"{image_id} {value:2d}")
            write_lines(lists / f"{label}_{name}.txt", lines, newline)
    return top


def write_lines(path: Path, lines: Sequence[str], newline: str) -> None:
    path.write_bytes("".join(line + newline for line in lines).encode())


CATEGORIES = [(7, "train"), (1, "person"), (90, "toothbrush")]  # not sorted, with gaps


def coco_image(image_id: int, split: str = "train2014", **changes: Any) -> dict[str, Any]:
    """A record of `images`; files are named without their split since 2017."""
    prefix = "" if split.endswith("2017") else f"COCO_{split}_"
    name = f"{prefix}{image_id:012d}.jpg"
    record = {"id": image_id, "file_name": name, "width": SIZE[0], "height": SIZE[1], "license": 1}
    return {**record, **changes}


def coco_object(number: int, image_id: int, category_id: int, **changes: Any) -> dict[str, Any]:
    """A record of `annotations`: a box of the whole image that is not a crowd."""
    record = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    return {**record, "bbox": [0, 0, *SIZE], "segmentation": [[1.5, 2, 3e1]], **changes}


def coco_file(
    images: Sequence[Any], annotations: Sequence[Any], categories: Sequence[Any] = CATEGORIES
) -> dict[str, Any]:
    """The content of instances_<split>.json, in the order of the 2014 files."""
    named = [{"supercategory": "x", "id": number, "name": name} for number, name in categories]
    return {
        "info": {"year": 2014},
        "images": list(images),
        "licenses": [{"id": 1}],
        "annotations": list(annotations),
        "categories": named,
    }


def coco_files(year: int = 2014) -> dict[str, dict[str, Any]]:
    """Two valid files: four training images and two test images."""
    train = coco_file(
        [coco_image(number, f"train{year}") for number in (30, 9, 400, 31)],
        [
            coco_object(1, 9, 90, bbox=[5, 2.5, 10, 5]),
            coco_object(2, 30, 1),
            coco_object(3, 9, 1, iscrowd=1),
            coco_object(4, 9, 90, bbox=[0, 0, 1, 1]),
            coco_object(5, 400, 7, bbox=[3, 4, 0, 5]),
        ],
    )
    test = coco_file(
        [coco_image(8, f"val{year}"), coco_image(32, f"val{year}")],
        [coco_object(1, 8, 7, bbox=[15, -5, 10, 10])],
    )
    return {f"train{year}": train, f"val{year}": test}


def make_coco(root: Path, files: dict[str, Any] | None = None) -> Path:
    """Write COCO's tree with images below ``root``, and return ``root``."""
    for split, content in (coco_files() if files is None else files).items():
        path = root / f"annotations/instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        for image in content["images"]:
            draw_image(root / split / image["file_name"], image["id"])
    return root


PETS = "image,labels,split\na.jpg,cat;dog,train\ndeep/b.jpg,,train\nc.jpg,dog,test\n"
"""A table of three images, as labels.csv of a data set."""


def read_pets(root: Path, file: str = "labels.csv", **settings: object) -> Listing:
    """The listing of a table below ``root``."""
    return read_table(
        root, TableSettings.model_validate({"source": "table", "file": file} | settings)
    )


def read_pets_text(root: Path, text: str, **settings: object) -> Listing:
    """The listing of a CSV file with this text."""
    (root / "labels.csv").write_text(text, newline="")
    return read_pets(root, **settings)


def read_cells(root: Path, *cells: str, **settings: object) -> Listing:
    """Read a table with these cells of labels, from line 2 on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "labels", "split"])
    writer.writerows([f"{row}.jpg", cell, "train"] for row, cell in enumerate(cells))
    return read_pets_text(root, text.getvalue(), **settings)


def labels_of(listing: Listing) -> list[list[str]]:
    """The names of the labels of each image."""
    names = listing.vocabulary
    return [[names[number] for number in row] for row in listing.table["labels"].to_pylist()]


def write_pets_parquet(root: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), root / "labels.parquet")


NUSWIDE_NAMES = [f"concept{number}" for number in range(80, -1, -1)]
"""81 concepts, not in alphabetical order."""

NUSWIDE_TRAIN = ["actor/0001_11.jpg", "actor/0002_12.jpg", "zoos/0003_13.jpg"]
NUSWIDE_TEST = ["actor/0004_14.jpg", "zoos/0005_15.jpg"]
NUSWIDE_LABELS = [[0, 80], [], [3], [1, 2], [80]]
"""The label numbers of the three training images, then of the two test images."""


def write_official(
    root: Path,
    lists: dict[str, list[str]],
    labels: Sequence[Sequence[int]],
    *,
    names: Sequence[str] = NUSWIDE_NAMES,
    end: str = "\n",
) -> None:
    """Write the publisher's tree; ``labels`` has the label numbers, training images first."""
    (root / "ImageList").mkdir()
    (root / "Groundtruth" / "TrainTestLabels").mkdir(parents=True)
    (root / "Concepts81.txt").write_text(end.join([*names, ""]), newline="")
    for split, first in (("Train", 0), ("Test", len(lists["Train"]))):
        images = [image.replace("/", "\\") for image in lists[split]]
        (root / f"ImageList/{split}Imagelist.txt").write_text(end.join([*images, ""]), newline="")
        lines = np.empty((len(names), len(images), 1 + len(end)), dtype=np.uint8)
        lines[:] = list(f"0{end}".encode())
        for row, numbers in enumerate(labels[first : first + len(images)]):
            lines[list(numbers), row, 0] = ord("1")
        for name, column in zip(names, lines, strict=True):
            file = root / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{split}.txt"
            file.write_bytes(column.tobytes())


def multi_hot_line(image: str, labels: Sequence[int]) -> str:
    """A line of a multi-hot list."""
    return " ".join([image, *(str(int(number in labels)) for number in range(CONCEPTS))])


def csv_text(rows: Sequence[tuple[str, str, str]]) -> str:
    """The text of nus_wid_data.csv."""
    lines = [f'{image},"{labels}",{split}\n' for image, labels, split in rows]
    return "filepath,label,split_name\n" + "".join(lines)


def csv_rows() -> list[tuple[str, str, str]]:
    """Path, label list and split of every image, for `csv_text`."""
    return [
        (
            image,
            str([NUSWIDE_NAMES[number] for number in labels]),
            "train" if image in NUSWIDE_TRAIN else "val",
        )
        for image, labels in zip([*NUSWIDE_TRAIN, *NUSWIDE_TEST], NUSWIDE_LABELS, strict=True)
    ]


def make_nuswide(root: Path) -> None:
    """Write all three forms into one folder, with images."""
    root.mkdir(parents=True)
    images = [*NUSWIDE_TRAIN, *NUSWIDE_TEST]
    write_official(root, {"Train": NUSWIDE_TRAIN, "Test": NUSWIDE_TEST}, NUSWIDE_LABELS)
    (root / "nus_wid_data.csv").write_text(csv_text(csv_rows()))
    lines = [
        multi_hot_line(image.rpartition("/")[2], labels)
        for image, labels in zip(images, NUSWIDE_LABELS, strict=True)
    ]
    (root / "database.txt").write_text("\n".join(lines[: len(NUSWIDE_TRAIN)]))
    (root / "test.txt").write_text("\n".join(lines[len(NUSWIDE_TRAIN) :]))
    for number, image in enumerate(images):
        draw_image(root / "Flickr" / image, number)
        draw_image(root / "Flickr" / image.rpartition("/")[2], number)


def check_contents(root: Path, contents: dict[str, bytes]) -> Findings:
    """Check files with these contents; the last is in test, all others in train."""
    rows = [
        {
            "image_id": name,
            "path": f"i/{name}",
            "split": "train" if number < len(contents) - 1 else "test",
            "labels": [0],
            "ignored": [],
        }
        for number, name in enumerate(contents)
    ]
    (root / "i").mkdir(parents=True)
    for name, content in contents.items():
        (root / "i" / name).write_bytes(content)
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("pets", "own", ("cat",), {}, full_counts(table), table)
    seen: list[int] = []
    findings = check_files(manifest, root, seen.append)
    assert sum(seen) == findings.images == len(contents)
    return findings


def make_listing(rows: Sequence[dict[str, Any]]) -> Listing:
    """A listing of these images, by turns in train and test, each with the label `cat`."""
    filled = [
        {"split": ("train", "test")[number % 2], "labels": [0], "ignored": [], **row}
        for number, row in enumerate(rows)
    ]
    return Listing(("cat",), "own", {}, pa.Table.from_pylist(filled, schema=COLUMNS))
