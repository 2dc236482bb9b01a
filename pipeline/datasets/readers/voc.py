"""PASCAL VOC 2007, as its development kit lays it out.

    data/voc2007/VOCdevkit/VOC2007/
        ImageSets/Main/trainval.txt             one image id per line: the training split
        ImageSets/Main/test.txt                 the test split
        ImageSets/Main/<class>_trainval.txt     for `labels: lists`: id and 1, 0 or -1 per line
        ImageSets/Main/<class>_test.txt
        Annotations/<id>.xml                    for `labels: annotations`
        JPEGImages/<id>.jpg

The archives VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar, unpacked in data/voc2007/,
make this tree. The devkit's documentation (devkit_doc.pdf) describes the format. Lists may have
CRLF or LF line ends, blank lines, and blanks around an entry.

A class whose objects in an image are all marked `difficult` is ignored there: it is neither
positive nor negative. A 0 in the class lists means the same, so both sources give the same labels.

Other data sets in this layout name their vocabulary in the settings.

Boxes are in the XML files only. Pixels count from 1, and those at both ends belong to the box: it
covers xmin-1 to xmax of the image's width. Difficult objects are left out of the boxes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NoReturn
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from pipeline.datasets.listing import Listing, hash_sources, read_lines, read_source, unit_boxes
from pipeline.datasets.manifest import COLUMNS, REQUIRED_SPLITS, BoxTable, ImageBoxes, Split
from pipeline.errors import InputError
from pipeline.settings import VocSettings

VOCABULARY = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The devkit's classes, in its (alphabetical) order."""

_FIX_FILE = "Fix the file."

_LISTS: dict[Split, str] = {"train": "trainval", "test": "test"}


@dataclass
class _Image:
    """What the files say about one image.

    Attributes:
        positive: classes with an object that is not difficult.
        difficult: classes with a difficult object.
        width, height: in pixels, where the source gives them.
        objects: class number from 1, and box, of each object that is not difficult.
    """

    positive: set[int] = field(default_factory=set)
    difficult: set[int] = field(default_factory=set)
    width: int | None = None
    height: int | None = None
    objects: list[tuple[int, np.ndarray]] = field(default_factory=list)


def read_voc(root: Path, settings: VocSettings) -> Listing:
    """List VOC 2007, or another data set in its layout. Image ids are the devkit's (``000005``).

    Args:
        root: data/<dataset>/.
        settings: the folder of the devkit, whether labels are read from annotations or lists, and
            the vocabulary.

    Raises:
        MissingError: a file does not exist.
        InputError: a file breaks the format; names the file and the line or object.
    """
    folder = PurePosixPath(settings.folder)
    vocabulary = tuple(settings.vocabulary or VOCABULARY)
    remedy = _layout(root, folder, settings)
    numbers = {name: number for number, name in enumerate(vocabulary)}
    lists = folder / "ImageSets" / "Main"
    sources = [f"{lists}/{_LISTS[split]}.txt" for split in REQUIRED_SPLITS]
    ids: dict[str, Split] = {}
    for split, name in zip(REQUIRED_SPLITS, sources, strict=True):
        _read_ids(root / name, split, ids, remedy)
    images = {image_id: _Image() for image_id in ids}
    if settings.labels == "annotations":
        sources.append(f"{folder}/Annotations")
        for image_id, image in images.items():
            _read_annotation(root / sources[-1] / f"{image_id}.xml", image, numbers, remedy)
    else:
        for split in REQUIRED_SPLITS:
            of_split = {key: image for key, image in images.items() if ids[key] == split}
            for label, number in numbers.items():
                sources.append(f"{lists}/{label}_{_LISTS[split]}.txt")
                _read_class_list(root / sources[-1], number, of_split, remedy)
    rows = [
        {
            "image_id": image_id,
            "path": f"{folder}/JPEGImages/{image_id}.jpg",
            "split": ids[image_id],
            "labels": sorted(image.positive),
            "ignored": sorted(image.difficult - image.positive),
            "width": image.width,
            "height": image.height,
        }
        for image_id, image in images.items()
    ]
    return Listing(
        vocabulary=vocabulary,
        split_name="own" if settings.vocabulary else "official",
        sources=hash_sources(root, sources),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=_box_table(images, vocabulary) if settings.labels == "annotations" else None,
    )


def _layout(root: Path, folder: PurePosixPath, settings: VocSettings) -> str:
    """The remedy of errors about missing files: which folders must be where."""
    folders = "ImageSets/Main/, Annotations/ and JPEGImages/"
    if settings.vocabulary is None:
        return (
            f"VOC 2007 needs {folders} in {root / folder}: unpack VOCtrainval_06-Nov-2007.tar and "
            f"VOCtest_06-Nov-2007.tar in {root}."
        )
    return f"This layout needs {folders} in {root / folder}. Put the file there."


def _box_table(images: dict[str, _Image], vocabulary: tuple[str, ...]) -> BoxTable:
    tables = {}
    for image_id, image in images.items():
        boxes = np.array([box for _, box in image.objects], dtype=np.float32).reshape(-1, 4)
        classes = np.array([number for number, _ in image.objects], dtype=np.int64)
        tables[image_id] = ImageBoxes(classes, boxes)
    return BoxTable(vocabulary, tables)


# --- lists ---------------------------------------------------------------------------------------


def _read_ids(path: Path, split: Split, ids: dict[str, Split], remedy: str) -> None:
    """Add the image ids of a split to ``ids``."""
    for number, line in read_lines(path, remedy):
        if not re.fullmatch(r"[\w-]+", line):
            raise InputError(
                f"{path}, line {number}: found {line!r}, expected an image id such as 000005.",
                "Fix the line.",
            )
        if line in ids:
            raise InputError(
                f"{path}, line {number}: the image {line} is already in the list of {ids[line]}.",
                "Remove it from one of the lists.",
            )
        ids[line] = split


def _read_class_list(path: Path, number: int, images: dict[str, _Image], remedy: str) -> None:
    """Add what the list of the class ``number`` says of each image of a split to ``images``."""
    seen = set()
    for line_number, line in read_lines(path, remedy):
        where = f"{path}, line {line_number}"
        parts = line.split()
        if len(parts) != 2 or parts[1] not in ("1", "0", "-1"):
            raise InputError(
                f"{where}: found {line!r}, expected an image id and 1, 0 (difficult) or -1.",
                "Fix the line.",
            )
        image_id, value = parts
        if image_id in seen or image_id not in images:
            problem = "appears a second time" if image_id in seen else "is not in the split's list"
            raise InputError(f"{where}: the image {image_id} {problem}.", "Remove the line.")
        seen.add(image_id)
        if value == "1":
            images[image_id].positive.add(number)
        elif value == "0":
            images[image_id].difficult.add(number)
    lacking = [image_id for image_id in images if image_id not in seen]
    if lacking:
        raise InputError(
            f"{path}: {len(lacking)} of the split's {len(images)} images have no line. The first "
            f"is {lacking[0]}.",
            remedy,
        )


# --- annotations ---------------------------------------------------------------------------------


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuse a document type, and with it every entity that could be expanded."""

    def doctype(self, *_: object) -> NoReturn:
        raise ValueError("it has a document type (<!DOCTYPE>), which no annotation needs")


def _read_annotation(path: Path, image: _Image, numbers: dict[str, int], remedy: str) -> None:
    """Fill in ``image`` from its XML file; ``numbers`` maps class names to their numbers."""
    content = read_source(path, remedy)
    parser = ElementTree.XMLParser(target=_TreeBuilder())
    try:
        tree = ElementTree.fromstring(content, parser)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path} is not a VOC annotation: {error}.", remedy) from None
    size = tree.find("size")
    image.width = _size(size, "width", f"{path}: <size>")
    image.height = _size(size, "height", f"{path}: <size>")
    for index, item in enumerate(tree.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        where = f"{path}: object {index} ({name!r})"
        if name not in numbers:
            raise InputError(
                f"{where}: unknown class, expected one of {', '.join(numbers)}.",
                "Fix the file, or list the classes of your own photographs in "
                "`prepare.<dataset>.vocabulary` of params.yaml.",
            )
        number = numbers[name]
        if _number(item, "difficult", where, lambda value: value in (0, 1), "0 or 1"):
            image.difficult.add(number)
            continue
        image.positive.add(number)
        corners = item.find("bndbox")
        x0, y0, x1, y1 = (
            _number(corners, tag, f"{where}, <bndbox>", math.isfinite, "a number of pixels")
            for tag in ("xmin", "ymin", "xmax", "ymax")
        )
        pixels = np.array([[x0 - 1, y0 - 1, x1, y1]])
        boxes, covers = unit_boxes(pixels, np.array([[image.width, image.height]]))
        if not covers[0]:
            raise InputError(
                f"{where}: the box {[x0, y0, x1, y1]} covers nothing of the {image.width}x"
                f"{image.height} pixels.",
                _FIX_FILE,
            )
        image.objects.append((number + 1, boxes[0]))


def _size(element: ElementTree.Element | None, tag: str, where: str) -> int:
    """The width or height in a child of the element <size>."""

    def is_size(value: float) -> bool:
        return value.is_integer() and 0 < value < 2**31

    return int(_number(element, tag, where, is_size, "a positive integer"))


def _number(
    element: ElementTree.Element | None,
    tag: str,
    where: str,
    is_valid: Callable[[float], bool],
    expected: str,
) -> float:
    """The number in a child of an element; ``expected`` describes valid ones in the error."""
    text = None if element is None else element.findtext(tag)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not is_valid(value):
        raise InputError(f"{where}: <{tag}> is {text!r}, expected {expected}.", _FIX_FILE)
    return value
