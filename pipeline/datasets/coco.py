"""MS-COCO, as its publisher lays it out.

    data/coco/
        annotations/instances_train2014.json
        annotations/instances_val2014.json
        train2014/<file_name>
        val2014/<file_name>

The archives annotations_trainval2014.zip, train2014.zip and val2014.zip, unpacked in data/coco/,
make this tree; other years differ in the splits' names only. The format is described at
cocodataset.org/#format-data.

The vocabulary is the categories in the order of their ids, which have gaps. An image is positive
for every category of which it has an annotation, be it a crowd. Images without an annotation are
listed without labels. Image ids are COCO's own, in decimal without leading zeros (`9` for
COCO_train2014_000000000009.jpg): they are unique over both splits, and the same in every release
and in features that others publish, while file names changed in 2017.

Boxes are in pixels, x and y of a corner, width and height. Crowds are left out of the boxes, since
one box stands for many objects; so is a box that covers nothing of its image.

The files are hundreds of megabytes, most of it outlines that nobody asks for: they are read one
record at a time.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
import pyarrow as pa

from pipeline.datasets.listing import Listing, hash_sources, unit_boxes
from pipeline.datasets.manifest import COLUMNS, SPLITS, BoxTable, ImageBoxes
from pipeline.errors import GmpipeError
from pipeline.settings import CocoSettings

_CHUNK = 1 << 22  # characters read at once
_LONGEST = 1 << 26  # and those of the longest record

_ARRAYS = ("categories", "images", "annotations")


@dataclass
class _Instances:
    """What one file says: its images, and its annotations as columns.

    Attributes:
        categories: id -> name.
        images: id -> file name, width, height; in the file's order.
        ids, image_ids, category_ids: of each annotation.
        boxes: x, y, width, height of each annotation, one after the other.
        crowds: 1 for an annotation that is a crowd.
    """

    categories: dict[int, str] = field(default_factory=dict)
    images: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("q"))
    image_ids: array[int] = field(default_factory=lambda: array("q"))
    category_ids: array[int] = field(default_factory=lambda: array("q"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    crowds: array[int] = field(default_factory=lambda: array("b"))


def read_coco(root: Path, settings: CocoSettings) -> Listing:
    """List COCO.

    Args:
        root: data/<dataset>/.
        settings: which splits train and test.

    Raises:
        GmpipeError: a file is missing or breaks the format; names the file and the record.
    """
    folders = dict(zip(SPLITS, (settings.train, settings.test), strict=True))
    names = {split: f"annotations/instances_{folder}.json" for split, folder in folders.items()}
    remedy = (
        f"COCO is expected with annotations/, {settings.train}/ and {settings.test}/ in {root}: "
        f"unpack the publisher's annotations_*.zip, {settings.train}.zip and {settings.test}.zip "
        "there."
    )
    rows: list[dict[str, Any]] = []
    boxes: dict[str, ImageBoxes] = {}
    categories: dict[int, str] = {}
    listed: set[int] = set()
    for split in SPLITS:
        path = root / names[split]
        found = _read_instances(path, remedy)
        if categories and found.categories != categories:
            raise GmpipeError(
                f"{path}: its categories are not those of {root / names['train']}; they differ in "
                f"{sorted(found.categories.items() ^ categories.items())[0]}. Use two files of one "
                "release."
            )
        categories = found.categories
        twice = listed & found.images.keys()
        if twice:
            raise GmpipeError(
                f"{path}: the image {min(twice)} is in {root / names['train']} too. Take it out of "
                "one."
            )
        listed |= found.images.keys()
        vocabulary = sorted(categories)
        numbers = np.searchsorted(vocabulary, np.array(found.category_ids, dtype=np.int64))
        labels = _labels(found, numbers)
        boxes.update(_boxes(found, numbers))
        for image_id, (file_name, width, height) in found.images.items():
            rows.append(
                {
                    "image_id": str(image_id),
                    "path": f"{folders[split]}/{file_name}",
                    "split": split,
                    "labels": labels.get(image_id, []),
                    "ignored": [],
                    "width": width,
                    "height": height,
                }
            )
    ordered = tuple(categories[category_id] for category_id in sorted(categories))
    return Listing(
        vocabulary=ordered,
        split_name=f"{settings.train}/{settings.test}",
        sources=hash_sources(root, names.values()),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=BoxTable(ordered, boxes),
    )


def _labels(found: _Instances, numbers: np.ndarray) -> dict[int, list[int]]:
    """Image id -> its labels; ``numbers`` are those of each annotation's category."""
    pairs = np.unique(np.stack([np.array(found.image_ids, dtype=np.int64), numbers], 1), axis=0)
    labels: dict[int, list[int]] = {}
    for image_id, number in pairs.tolist():
        labels.setdefault(image_id, []).append(number)
    return labels


def _boxes(found: _Instances, numbers: np.ndarray) -> dict[str, ImageBoxes]:
    """Image id -> the boxes of its objects, in the file's order."""
    image_ids = np.array(found.image_ids, dtype=np.int64)
    corners = np.array(found.boxes, dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    sizes = [found.images[image_id][1:] for image_id in image_ids.tolist()]
    boxes, covers = unit_boxes(corners, np.array(sizes).reshape(-1, 2))
    kept = np.flatnonzero(covers & (np.array(found.crowds) == 0))
    order = kept[np.argsort(image_ids[kept], kind="stable")]
    keys, starts = np.unique(image_ids[order], return_index=True)
    return {
        str(key): ImageBoxes(numbers[places] + 1, boxes[places])
        for key, places in zip(keys.tolist(), np.split(order, starts)[1:], strict=True)
    }


# --- one file ------------------------------------------------------------------------------------


def _read_instances(path: Path, remedy: str) -> _Instances:
    found = _Instances()
    read = {"categories": _add_category, "images": _add_image, "annotations": _add_annotation}
    seen = set()
    try:
        with path.open(encoding="utf-8") as stream:
            for name, records in _JsonReader(stream, path, remedy).arrays():
                if name in read:
                    seen.add(name)
                    for place, record in enumerate(records):
                        read[name](found, record, f"{path}: {name}[{place}]")
    except (FileNotFoundError, NotADirectoryError):
        raise GmpipeError(f"there is no {path}. {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GmpipeError(f"{path} can't be read ({error}). {remedy}") from error
    lacking = [name for name in _ARRAYS if name not in seen]
    if lacking:
        raise GmpipeError(f"{path} has no array `{lacking[0]}`. {remedy}")
    # Annotations may stand before the images and categories that they refer to.
    _check_known(found.image_ids, found.images, path, "image")
    _check_known(found.category_ids, found.categories, path, "category")
    ids, first = np.unique(np.array(found.ids, dtype=np.int64), return_index=True)
    if len(ids) < len(found.ids):
        place = int(np.setdiff1d(np.arange(len(found.ids)), first)[0])
        raise GmpipeError(
            f"{path}: annotations[{place}]: its id {found.ids[place]} stands here twice. Take one "
            "out."
        )
    return found


def _add_category(found: _Instances, record: Any, where: str) -> None:
    number, name = _values(record, ("id", "name"), where)
    _check_whole(number, "id", where)
    _check_name(name, "name", where)
    if number in found.categories or name in found.categories.values():
        raise GmpipeError(f"{where}: {number} or {name!r} stands here twice. Take one out.")
    found.categories[number] = name


def _add_image(found: _Instances, record: Any, where: str) -> None:
    number, name, width, height = _values(record, ("id", "file_name", "width", "height"), where)
    _check_whole(number, "id", where)
    _check_whole(width, "width", where, least=1)
    _check_whole(height, "height", where, least=1)
    _check_name(name, "file_name", where)
    if number in found.images:
        raise GmpipeError(f"{where}: the image {number} stands here twice. Take one out.")
    found.images[number] = (name, width, height)


def _add_annotation(found: _Instances, record: Any, where: str) -> None:
    number, image_id, category_id, box, crowd = _values(
        record, ("id", "image_id", "category_id", "bbox", "iscrowd"), where
    )
    for name, value in (("id", number), ("image_id", image_id), ("category_id", category_id)):
        _check_whole(value, name, where, most=2**63)
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise GmpipeError(f"{where}: `iscrowd` is {crowd!r}, expected 0 or 1. Mend the file.")
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(type(side) in (int, float) and abs(side) < 2**31 for side in box)
    ):
        raise GmpipeError(
            f"{where}: `bbox` is {box!r}, expected four numbers: x, y, width, height. Mend the "
            "file."
        )
    found.ids.append(number)
    found.image_ids.append(image_id)
    found.category_ids.append(category_id)
    found.boxes.extend(box)
    found.crowds.append(crowd)


def _values(record: Any, keys: tuple[str, ...], where: str) -> list[Any]:
    if not isinstance(record, dict):
        raise GmpipeError(f"{where} is {record!r}, expected an object. Mend the file.")
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise GmpipeError(f"{where} has no `{lacking[0]}`. Mend the file.")
    return [record[key] for key in keys]


def _check_name(value: Any, key: str, where: str) -> None:
    # JSON can spell half a character, which no other format holds.
    if not isinstance(value, str) or not value or value != value.encode(errors="replace").decode():
        raise GmpipeError(f"{where}: `{key}` is {value!r}, expected a name. Mend the file.")


def _check_whole(value: Any, key: str, where: str, least: int = 0, most: int = 2**31) -> None:
    if type(value) is not int or not least <= value < most:
        raise GmpipeError(
            f"{where}: `{key}` is {value!r}, expected a whole number from {least}. Mend the file."
        )


def _check_known(references: array[int], known: dict[int, Any], path: Path, kind: str) -> None:
    for place, reference in enumerate(references):
        if reference not in known:
            raise GmpipeError(
                f"{path}: annotations[{place}]: `{kind}_id` is {reference}, and the file has no "
                f"such {kind}. Mend the file."
            )


class _JsonReader:
    """Reads a JSON object of arrays, one element at a time.

    Attributes:
        text: the part of the file that is in memory; what lies before ``at`` is done with.
    """

    def __init__(self, stream: TextIO, path: Path, remedy: str) -> None:
        self._stream = stream
        self._path = path
        self._remedy = remedy
        self._decoder = json.JSONDecoder()
        self._blank = re.compile(r"[ \t\n\r]*")
        self.text = ""
        self.at = 0
        self._before = 0  # characters of the file before `text`

    def arrays(self) -> Iterator[tuple[str, Iterator[Any]]]:
        """The names of the object's arrays, each with its elements; other values are skipped."""
        for _ in self._members("{", "}"):
            name = self._value()
            if not isinstance(name, str):
                self._fail(f"found {name!r}, expected a name")
            self._take(":")
            if self._peek() == "[":
                elements = (self._value() for _ in self._members("[", "]"))
                yield name, elements
                for _ in elements:  # of an array that the caller did not want
                    pass
            else:
                self._value()
        if self._peek():
            self._fail("expected the end of the file")

    def _members(self, opening: str, closing: str) -> Iterator[None]:
        """Stop before each member of an object or array."""
        self._take(opening)
        if self._peek() == closing:
            self._take(closing)
            return
        while True:
            yield
            if self._take("," + closing) == closing:
                return

    def _peek(self) -> str:
        """The next character that is not blank; none at the end of the file."""
        while True:
            found = self._blank.match(self.text, self.at)
            assert found  # the empty string matches
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def _take(self, expected: str) -> str:
        found = self._peek()
        if not found or found not in expected:
            self._fail(f"found {found!r}, expected {' or '.join(map(repr, expected))}")
        self.at += 1
        return found

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
                after = self.text[end : end + 1]
                if after and after in ",:]} \t\n\r":
                    self.at = end
                    return value
                # Perhaps the rest of a number is still in the file.
                problem = f"found {after!r} after a value"
            except json.JSONDecodeError as error:
                problem, end = error.msg, error.pos
            except (ValueError, RecursionError) as error:
                problem, end = str(error), self.at
            place = self._before + end
            if len(self.text) - self.at > _LONGEST or not self._read_on():
                self._fail(problem, place)

    def _read_on(self) -> bool:
        """Read more, at least as much as there is, so that a long value is not tried too often."""
        chunk = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self._before += self.at
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return bool(chunk)

    def _fail(self, problem: str, place: int | None = None) -> NoReturn:
        if place is None:
            place = self._before + self.at
        raise GmpipeError(
            f"{self._path}, after character {place}: {problem}. It is cut off or no JSON. "
            f"{self._remedy}"
        )
