"""MS-COCO, as its publisher lays it out.

    data/coco/                                      data/coco2017/
        annotations/instances_train2014.json            annotations/instances_train2017.json
        annotations/instances_val2014.json              annotations/instances_val2017.json
        train2014/<file_name>                           train2017/<file_name>
        val2014/<file_name>                             val2017/<file_name>

The archives annotations_trainval<year>.zip, train<year>.zip and val<year>.zip, unpacked in the data
set's folder, make this tree. The format is described at cocodataset.org/#format-data.

Both years have the same photographs, divided in another way: val2017 is 5,000 of val2014's 40,504
images, and train2017 is all others of both splits. So a detector that was trained on train2017, as
torchvision's, has seen most of val2014 and nothing of val2017.

The vocabulary is the categories in the order of their ids, which have gaps. An image is positive
for every category of which it has an annotation, including crowds. Images without an annotation are
listed without labels. Image ids are COCO's own, in decimal without leading zeros (`9` for
COCO_train2014_000000000009.jpg). They are unique over both splits, and equal in every release and
in features that others publish, while file names changed in 2017.

Boxes are in pixels: x and y of a corner, width and height. Crowds are left out of the boxes, since
one box stands for many objects. So are boxes that cover nothing of their image.

The files have hundreds of megabytes, most of them outlines that are not used here. They are read
one record at a time.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
import pyarrow as pa

from pipeline.datasets.listing import Listing, hash_sources, open_source, unit_boxes
from pipeline.datasets.manifest import COLUMNS, REQUIRED_SPLITS, BoxTable, ImageBoxes
from pipeline.errors import InputError
from pipeline.settings import CocoSettings

_CHUNK = 1 << 22  # characters that are read at once
_LONGEST = 1 << 26  # characters of the longest record

_MOST_LABELS = np.iinfo(np.int16).max + 1  # of a manifest
_ARRAYS = ("categories", "images", "annotations")
_FIX = "Fix the file, or download it again."


@dataclass
class _Instances:
    """What one file says: its images, and its annotations as columns.

    Attributes:
        categories: id -> name.
        names: of the categories.
        images: id -> file name, width, height; in the file's order.
        ids, image_ids, category_ids: of each annotation.
        boxes: x, y, width, height of each annotation, one annotation after another.
        crowds: 1 for an annotation that is a crowd.
    """

    categories: dict[int, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
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
        settings: the names of the splits that train and test.

    Raises:
        MissingError: a file does not exist.
        InputError: a file breaks the format; names the file and the record.
    """
    folders = dict(zip(REQUIRED_SPLITS, (settings.train, settings.test), strict=True))
    names = {split: f"annotations/instances_{folder}.json" for split, folder in folders.items()}
    remedy = (
        f"COCO needs annotations/, {settings.train}/ and {settings.test}/ in {root}: unpack the "
        f"publisher's annotations_*.zip, {settings.train}.zip and {settings.test}.zip there."
    )
    splits = {split: _read_instances(root / name, remedy) for split, name in names.items()}
    _check_splits(splits["train"], splits["test"], root / names["train"], root / names["test"])
    rows: list[dict[str, Any]] = []
    boxes: dict[str, ImageBoxes] = {}
    categories = splits["train"].categories
    for split, instances in splits.items():
        numbers = np.searchsorted(
            sorted(categories), np.array(instances.category_ids, dtype=np.int64)
        )
        labels = _labels(instances, numbers)
        boxes.update(_boxes(instances, numbers))
        for image_id, (file_name, width, height) in instances.images.items():
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
    vocabulary = tuple(categories[category_id] for category_id in sorted(categories))
    return Listing(
        vocabulary=vocabulary,
        split_name=f"{settings.train}/{settings.test}",
        sources=hash_sources(root, names.values()),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=BoxTable(vocabulary, boxes),
    )


def _check_splits(train: _Instances, test: _Instances, train_file: Path, test_file: Path) -> None:
    """Check that two files have the same categories and no image in common."""
    if test.categories != train.categories:
        difference = sorted(test.categories.items() ^ train.categories.items())[0]
        raise InputError(
            f"{test_file}: the categories are not those of {train_file}; they differ in "
            f"{difference}.",
            "Use two files of one release.",
        )
    common = train.images.keys() & test.images.keys()
    if common:
        raise InputError(
            f"{test_file}: the image {min(common)} is also in {train_file}.",
            "Remove it from one of the two files.",
        )


def _labels(instances: _Instances, numbers: np.ndarray) -> dict[int, list[int]]:
    """Image id -> its labels; ``numbers`` has the label of each annotation's category."""
    pairs = np.unique(np.stack([np.array(instances.image_ids, dtype=np.int64), numbers], 1), axis=0)
    labels: dict[int, list[int]] = {}
    for image_id, number in pairs.tolist():
        labels.setdefault(image_id, []).append(number)
    return labels


def _boxes(instances: _Instances, numbers: np.ndarray) -> dict[str, ImageBoxes]:
    """Image id -> the boxes of its objects, in the file's order; ``numbers`` as for `_labels`."""
    image_ids = np.array(instances.image_ids, dtype=np.int64)
    corners = np.array(instances.boxes, dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    sizes = [instances.images[image_id][1:] for image_id in image_ids.tolist()]
    boxes, covers = unit_boxes(corners, np.array(sizes).reshape(-1, 2))
    kept = np.flatnonzero(covers & (np.array(instances.crowds) == 0))
    order = kept[np.argsort(image_ids[kept], kind="stable")]
    keys, starts = np.unique(image_ids[order], return_index=True)
    return {
        str(key): ImageBoxes(numbers[rows] + 1, boxes[rows])
        for key, rows in zip(keys.tolist(), np.split(order, starts)[1:], strict=True)
    }


# --- one file ------------------------------------------------------------------------------------


def _read_instances(path: Path, remedy: str) -> _Instances:
    instances = _Instances()
    add = {"categories": _add_category, "images": _add_image, "annotations": _add_annotation}
    seen = set()
    try:
        with (
            open_source(path, remedy) as stored,
            TextIOWrapper(stored, encoding="utf-8") as stream,
        ):
            for name, records in _JsonReader(stream, path, remedy).arrays():
                if name in add:
                    seen.add(name)
                    for index, record in enumerate(records):
                        add[name](instances, record, f"{path}: {name}[{index}]")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read ({error}).", remedy) from error
    if len(instances.categories) > _MOST_LABELS:
        raise InputError(
            f"{path} has {len(instances.categories)} categories, expected at most {_MOST_LABELS}.",
            _FIX,
        )
    lacking = [name for name in _ARRAYS if name not in seen]
    if lacking:
        raise InputError(f"{path} has no array `{lacking[0]}`.", remedy)
    # Annotations may come before the images and categories that they refer to.
    _check_references(instances.image_ids, instances.images, path, "image")
    _check_references(instances.category_ids, instances.categories, path, "category")
    ids, first = np.unique(np.array(instances.ids, dtype=np.int64), return_index=True)
    if len(ids) < len(instances.ids):
        index = int(np.setdiff1d(np.arange(len(instances.ids)), first)[0])
        raise InputError(
            f"{path}: annotations[{index}]: another annotation has the same id "
            f"{instances.ids[index]}.",
            "Remove one of them.",
        )
    return instances


def _add_category(instances: _Instances, record: Any, where: str) -> None:
    number, name = _values(record, ("id", "name"), where)
    _check_integer(number, "id", where)
    _check_name(name, "name", where)
    if number in instances.categories or name in instances.names:
        raise InputError(
            f"{where}: another category has the same id {number} or the same name {name!r}.",
            "Remove one of them.",
        )
    instances.categories[number] = name
    instances.names.add(name)


def _add_image(instances: _Instances, record: Any, where: str) -> None:
    number, name, width, height = _values(record, ("id", "file_name", "width", "height"), where)
    _check_integer(number, "id", where)
    _check_integer(width, "width", where, least=1)
    _check_integer(height, "height", where, least=1)
    _check_name(name, "file_name", where)
    if number in instances.images:
        raise InputError(
            f"{where}: the image {number} appears twice in this file.", "Remove one of the two."
        )
    instances.images[number] = (name, width, height)


def _add_annotation(instances: _Instances, record: Any, where: str) -> None:
    number, image_id, category_id, box, crowd = _values(
        record, ("id", "image_id", "category_id", "bbox", "iscrowd"), where
    )
    for name, value in (("id", number), ("image_id", image_id), ("category_id", category_id)):
        _check_integer(value, name, where, most=2**63)
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise InputError(f"{where}: `iscrowd` is {crowd!r}, expected 0 or 1.", _FIX)
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(type(side) in (int, float) and abs(side) < 2**31 for side in box)
    ):
        raise InputError(
            f"{where}: `bbox` is {box!r}, expected four numbers: x, y, width, height.", _FIX
        )
    instances.ids.append(number)
    instances.image_ids.append(image_id)
    instances.category_ids.append(category_id)
    instances.boxes.extend(box)
    instances.crowds.append(crowd)


def _values(record: Any, keys: tuple[str, ...], where: str) -> list[Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where} is {record!r}, expected an object.", _FIX)
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise InputError(f"{where} has no `{lacking[0]}`.", _FIX)
    return [record[key] for key in keys]


def _check_name(value: Any, key: str, where: str) -> None:
    # JSON can spell half a character, which no other format can hold.
    if not isinstance(value, str) or not value or value != value.encode(errors="replace").decode():
        raise InputError(f"{where}: `{key}` is {value!r}, expected a name.", _FIX)


def _check_integer(value: Any, key: str, where: str, least: int = 0, most: int = 2**31) -> None:
    if type(value) is not int or not least <= value < most:
        raise InputError(
            f"{where}: `{key}` is {value!r}, expected an integer of at least {least}.", _FIX
        )


def _check_references(references: array[int], known: dict[int, Any], path: Path, kind: str) -> None:
    for index, reference in enumerate(references):
        if reference not in known:
            raise InputError(
                f"{path}: annotations[{index}]: `{kind}_id` is {reference}, but the file has no "
                f"{kind} with that id.",
                _FIX,
            )


class _JsonReader:
    """Reads a JSON object of arrays, one element at a time.

    Attributes:
        text: the part of the file that is in memory.
        at: position in ``text`` of the next character to parse.
    """

    def __init__(self, stream: TextIO, path: Path, remedy: str) -> None:
        self._stream = stream
        self._path = path
        self._remedy = remedy
        self._decoder = json.JSONDecoder()
        self._blank = re.compile(r"[ \t\n\r]*")
        self.text = ""
        self.at = 0
        self._before = 0  # number of characters of the file before `text`

    def arrays(self) -> Iterator[tuple[str, Iterator[Any]]]:
        """Yield the name and the elements of each array in the object, and skip other values."""
        for _ in self._members("{", "}"):
            name = self._value()
            if not isinstance(name, str):
                self._fail(f"found {name!r}, expected a key")
            self._take(":")
            if self._peek() == "[":
                elements = (self._value() for _ in self._members("[", "]"))
                yield name, elements
                for _ in elements:  # that the caller has not consumed
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
        """The next character that is not blank; empty at the end of the file."""
        while True:
            blanks = self._blank.match(self.text, self.at)
            assert blanks  # the empty string matches
            self.at = blanks.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def _take(self, expected: str) -> str:
        """Skip the next character, which must be one of ``expected``, and return it."""
        character = self._peek()
        if not character or character not in expected:
            self._fail(f"found {character!r}, expected {' or '.join(map(repr, expected))}")
        self.at += 1
        return character

    def _value(self) -> Any:
        """Parse the next value."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
                after = self.text[end : end + 1]
                if after and after in ",:]} \t\n\r":
                    self.at = end
                    return value
                # The value may be a number whose last digits are not read yet.
                problem = f"found {after!r} after a value"
            except json.JSONDecodeError as error:
                problem, end = error.msg, error.pos
            except (ValueError, RecursionError) as error:
                problem, end = str(error), self.at
            position = self._before + end
            if len(self.text) - self.at > _LONGEST or not self._read_on():
                self._fail(problem, position)

    def _read_on(self) -> bool:
        """Read more text, and report whether there was any.

        At least as much is read as is in memory, so that a long value is parsed few times.
        """
        chunk = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self._before += self.at
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return bool(chunk)

    def _fail(self, problem: str, position: int | None = None) -> NoReturn:
        """Raise the error that ``problem`` is found at a position in the file, by default here."""
        if position is None:
            position = self._before + self.at
        raise InputError(
            f"{self._path} is truncated or not valid JSON, after character {position}: {problem}.",
            self._remedy,
        )
