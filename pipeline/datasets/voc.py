"""PASCAL VOC 2007, as its development kit lays it out.

    data/voc2007/VOCdevkit/VOC2007/
        ImageSets/Main/trainval.txt             an image id a line: the training split
        ImageSets/Main/test.txt                 the test split
        ImageSets/Main/<class>_trainval.txt     for `labels: lists`: an id and 1, 0 or -1 a line
        ImageSets/Main/<class>_test.txt
        Annotations/<id>.xml                    for `labels: annotations`
        JPEGImages/<id>.jpg

The archives VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar, unpacked in data/voc2007/,
make this tree. The format is the devkit's documentation (devkit_doc.pdf). Lists may have CRLF or
LF line ends, blank lines and stray blanks.

A class whose objects in an image are all marked `difficult` is ignored there: neither positive
nor negative. That is what 0 says in the class lists, so both sources give the same labels.

Photographs of one's own in this layout have a vocabulary of their own, in the settings.

Boxes are in the XML only, in pixels that count from 1 and belong to the box on both sides: a box
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
from pipeline.datasets.manifest import COLUMNS, SPLITS, BoxTable, ImageBoxes, Split
from pipeline.errors import GmpipeError
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

_LISTS: dict[Split, str] = {"train": "trainval", "test": "test"}


@dataclass
class _Image:
    """What the files say about one image.

    Attributes:
        positive: classes with an object that is not difficult.
        difficult: classes with a difficult object.
        width, height: in pixels, where the source says.
        objects: class number from 1 and box of each object that is not difficult.
    """

    positive: set[int] = field(default_factory=set)
    difficult: set[int] = field(default_factory=set)
    width: int | None = None
    height: int | None = None
    objects: list[tuple[int, np.ndarray]] = field(default_factory=list)


def read_voc(root: Path, settings: VocSettings) -> Listing:
    """List VOC 2007, or what is laid out like it; the ids are the devkit's (``000005``).

    Args:
        root: data/<dataset>/.
        settings: where the devkit lies, whether labels are read from annotations or lists, and
            which classes there are.

    Raises:
        GmpipeError: a file is missing, or breaks the format; names the file and the line or object.
    """
    place = PurePosixPath(settings.folder)
    vocabulary = tuple(settings.vocabulary or VOCABULARY)
    split_name = "own" if settings.vocabulary else "official"
    if settings.vocabulary is None:
        remedy = (
            f"VOC 2007 is expected with ImageSets/Main/, Annotations/ and JPEGImages/ in "
            f"{root / place}: unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar in "
            f"{root}."
        )
    else:
        remedy = (
            f"ImageSets/Main/, Annotations/ and JPEGImages/ are expected in {root / place}. Put "
            "the file there."
        )
    numbers = {name: number for number, name in enumerate(vocabulary)}
    top = root / place
    lists = place / "ImageSets" / "Main"
    names = [f"{lists}/{_LISTS[split]}.txt" for split in SPLITS]
    ids: dict[str, Split] = {}
    for split, name in zip(SPLITS, names, strict=True):
        _read_ids(root / name, split, ids, remedy)
    images = {image_id: _Image() for image_id in ids}
    if settings.labels == "annotations":
        names.append(f"{place}/Annotations")
        for image_id, image in images.items():
            _read_annotation(top / "Annotations" / f"{image_id}.xml", image, numbers, remedy)
    else:
        for split in SPLITS:
            of_split = {key: image for key, image in images.items() if ids[key] == split}
            for label, number in numbers.items():
                names.append(f"{lists}/{label}_{_LISTS[split]}.txt")
                _read_class_list(root / names[-1], number, of_split, remedy)
    rows = [
        {
            "image_id": image_id,
            "path": f"{place}/JPEGImages/{image_id}.jpg",
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
        split_name=split_name,
        sources=hash_sources(root, names),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=_box_table(images, vocabulary) if settings.labels == "annotations" else None,
    )


def _box_table(images: dict[str, _Image], vocabulary: tuple[str, ...]) -> BoxTable:
    found = {}
    for image_id, image in images.items():
        boxes = np.array([box for _, box in image.objects], dtype=np.float32).reshape(-1, 4)
        classes = np.array([number for number, _ in image.objects], dtype=np.int64)
        found[image_id] = ImageBoxes(classes, boxes)
    return BoxTable(vocabulary, found)


# --- lists ---------------------------------------------------------------------------------------


def _read_ids(path: Path, split: Split, ids: dict[str, Split], remedy: str) -> None:
    """Add a split's image ids to ``ids``."""
    for number, line in read_lines(path, remedy):
        if not re.fullmatch(r"[\w-]+", line):
            raise GmpipeError(
                f"{path}, line {number}: found {line!r}, expected an image id such as 000005. "
                "Mend the line."
            )
        if line in ids:
            raise GmpipeError(
                f"{path}, line {number}: the image {line} stands in the list of {ids[line]} "
                "already. Take it out of one."
            )
        ids[line] = split


def _read_class_list(path: Path, number: int, images: dict[str, _Image], remedy: str) -> None:
    """Note what the list of class ``number`` says of each of ``images``, a split's."""
    seen = set()
    for line_number, line in read_lines(path, remedy):
        where = f"{path}, line {line_number}"
        parts = line.split()
        if len(parts) != 2 or parts[1] not in ("1", "0", "-1"):
            raise GmpipeError(
                f"{where}: found {line!r}, expected an image id and 1, 0 (difficult) or -1. Mend "
                "the line."
            )
        image_id, value = parts
        if image_id in seen or image_id not in images:
            problem = "stands here twice" if image_id in seen else "is not in the split's list"
            raise GmpipeError(f"{where}: the image {image_id} {problem}. Take the line out.")
        seen.add(image_id)
        if value == "1":
            images[image_id].positive.add(number)
        elif value == "0":
            images[image_id].difficult.add(number)
    lacking = [image_id for image_id in images if image_id not in seen]
    if lacking:
        raise GmpipeError(
            f"{path}: {len(lacking)} of the split's {len(images)} images have no line; the first "
            f"is {lacking[0]}. {remedy}"
        )


# --- annotations ---------------------------------------------------------------------------------


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity that could be expanded."""

    def doctype(self, *_: object) -> NoReturn:
        raise ValueError("it has a document type (<!DOCTYPE>), and no annotation needs one")


def _read_annotation(path: Path, image: _Image, numbers: dict[str, int], remedy: str) -> None:
    """Fill in ``image`` from its XML file; ``numbers`` has each class's number."""
    content = read_source(path, remedy)
    parser = ElementTree.XMLParser(target=_TreeBuilder())
    try:
        tree = ElementTree.fromstring(content, parser)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise GmpipeError(f"{path} is no VOC annotation: {error}. {remedy}") from None
    size = tree.find("size")
    image.width = _whole(size, "width", f"{path}: <size>")
    image.height = _whole(size, "height", f"{path}: <size>")
    for place, item in enumerate(tree.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        where = f"{path}: object {place} ({name!r})"
        if name not in numbers:
            raise GmpipeError(
                f"{where}: unknown class, expected one of {', '.join(numbers)}. Mend the file, or "
                "name the classes of your own photographs in `prepare.<dataset>.vocabulary` of "
                "params.yaml."
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
        boxes, sound = unit_boxes(pixels, np.array([[image.width, image.height]]))
        if not sound[0]:
            raise GmpipeError(
                f"{where}: the box {[x0, y0, x1, y1]} covers nothing of the {image.width}x"
                f"{image.height} pixels. Mend the file."
            )
        image.objects.append((number + 1, boxes[0]))


def _whole(element: ElementTree.Element | None, tag: str, where: str) -> int:
    def is_size(value: float) -> bool:
        return value.is_integer() and 0 < value < 2**31

    return int(_number(element, tag, where, is_size, "a whole number of pixels"))


def _number(
    element: ElementTree.Element | None,
    tag: str,
    where: str,
    sound: Callable[[float], bool],
    expected: str,
) -> float:
    """The number in a child of an element."""
    text = None if element is None else element.findtext(tag)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not sound(value):
        raise GmpipeError(f"{where}: <{tag}> is {text!r}, expected {expected}. Mend the file.")
    return value
