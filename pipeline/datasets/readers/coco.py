"""MS-COCO, as its publisher lays it out, and other data sets in its JSON.

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
one box stands for many objects. In own data, where some tools mark every object as a crowd, a crowd
that is the only object of its class in an image counts as an object without a box.

The files have hundreds of megabytes, most of them outlines that are not used here. They are read
one record at a time.

Labelling tools write variations of this, which are read where their meaning is plain:

- The file of a split may also be <split>/_annotations.coco.json. It may begin with a byte order
  mark.
- Ids may be numbers of any size, or texts; `"12"` is 12. Ids of annotations are not read, since
  nothing refers to them. If both files count their images from the same number, image ids are
  `<split>/<id>`.
- `iscrowd` may be absent. An annotation without `bbox` counts as a label. Width and height of a box
  may be negative: then x and y are of another corner.
- `width` and `height` of an image may be absent or wrong: `pipeline.datasets.frames` compares them
  with the photograph.
- `file_name` may have backslashes, and lead through folders of another machine: the longest end of
  it that is a file below the split's folder, or the data set's, is the photograph.
- If no coordinate of a file's boxes is greater than 1, they are shares of width and height.
- Categories of the same name are one label. Annotations of images that are not listed are left out.

Except for a mark at the beginning, ids and `iscrowd`, each of these is noted. Two files of COCO
itself must have the same categories, and no image in common.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.datasets.disk import Disk
from pipeline.datasets.listing import (
    ListedBoxes,
    Listing,
    are_relative,
    hash_sources,
    note_relative,
    open_source,
    split_by_share,
)
from pipeline.datasets.manifest import COLUMNS, Split
from pipeline.datasets.readers.found import find_photographs
from pipeline.datasets.readers.records import FIX, box_of, key_of, name_of, side_of, values_of
from pipeline.errors import InputError
from pipeline.formats.encodings import plain_text
from pipeline.formats.json_arrays import JsonArrays
from pipeline.settings import CocoSettings

_MOST_LABELS = np.iinfo(np.int16).max + 1  # of a manifest
_ARRAYS = ("categories", "images", "annotations")
_PUBLISHED = r"(train|val|test)20\d\d"  # names of COCO's own splits
_SHOWN = 5  # files that an error names


@dataclass(frozen=True)
class _Picture:
    """A record of `images`. Width and height are None where they are not those of a picture."""

    name: str
    width: int | None
    height: int | None


@dataclass
class _Instances:
    """What one file says: its images, and its annotations as columns.

    Attributes:
        path: of the file.
        folder: of its images, relative to the data set's root: the name of the split.
        categories: id -> name.
        images: id -> file name and size, in the file's order.
        image_numbers, category_numbers: id -> its number in the columns, for all ids that occur.
        image_column, category_column: of each annotation.
        corners: x0, y0, x1, y1 of each annotation, one after another; nan without a box.
        crowds: 1 for an annotation that is a crowd.
        exchanged: index of the first annotation with a negative size.
        notes: sentences on what was read in a way that could be wrong.
    """

    path: Path
    folder: str
    categories: dict[str, str] = field(default_factory=dict)
    images: dict[str, _Picture] = field(default_factory=dict)
    image_numbers: dict[str, int] = field(default_factory=dict)
    category_numbers: dict[str, int] = field(default_factory=dict)
    image_column: array[int] = field(default_factory=lambda: array("q"))
    category_column: array[int] = field(default_factory=lambda: array("q"))
    corners: array[float] = field(default_factory=lambda: array("d"))
    crowds: array[int] = field(default_factory=lambda: array("b"))
    exchanged: int | None = None
    notes: list[str] = field(default_factory=list)


def read_coco(root: Path, settings: CocoSettings) -> Listing:
    """List COCO, or another data set in its JSON.

    Args:
        root: data/<dataset>/.
        settings: the names of the splits that train and test.

    Raises:
        MissingError: a file does not exist.
        InputError: a file breaks the format; names the file and the record.
    """
    published = is_published(settings)
    names = [annotations_of(root, folder) for folder in settings.splits.values()]
    missing, broken = _remedies(root, settings, published)
    files = [
        _read_instances(root / name, folder, missing, broken)
        for name, folder in zip(names, settings.splits.values(), strict=True)
    ]
    if published:
        for first, second in combinations(files, 2):
            _check_published(first, second)
    vocabulary, notes = _vocabulary(files)
    prefixed = _share_ids(files)
    if prefixed:
        notes.append(prefixed)
    rows: list[dict[str, Any]] = []
    parts, disk = [], Disk(root)
    for split, instances in zip(settings.splits, files, strict=True):
        labels, objects = _objects(instances, vocabulary, len(rows), published)
        parts.append(objects)
        names_of = {image_id: picture.name for image_id, picture in instances.images.items()}
        paths, found = find_photographs(disk, instances.folder, names_of, instances.path)
        notes += [*instances.notes, *found]
        splits: list[Split] = [split] * len(paths)
        if settings.test_share is not None:
            otherwise = "set `test` to the name of another split."
            splits = split_by_share(paths, settings.test_share, instances.path, otherwise)
        prefix = f"{instances.folder}/" if prefixed else ""
        rows += _rows(instances, prefix, paths, splits, labels)
    return Listing(
        vocabulary=tuple(vocabulary),
        split_name="/".join(settings.splits.values()),
        sources=hash_sources(root, names),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=ListedBoxes(
            rows=np.concatenate([part.rows for part in parts]),
            classes=np.concatenate([part.classes for part in parts]),
            pixels=np.concatenate([part.pixels for part in parts]),
            relative=np.concatenate([part.relative for part in parts if part.relative is not None]),
        ),
        notes=tuple(notes),
        disk=disk,
    )


def _rows(
    instances: _Instances,
    prefix: str,
    paths: Sequence[str],
    splits: Sequence[Split],
    labels: Mapping[int, list[int]],
) -> list[dict[str, Any]]:
    """The rows of a file's images.

    Args:
        prefix: of the image ids.
        paths, splits: of each image.
        labels: of images that have any, by their index.
    """
    return [
        {
            "image_id": f"{prefix}{image_id}",
            "path": path,
            "split": split,
            "labels": labels.get(number, []),
            "ignored": [],
            "width": picture.width,
            "height": picture.height,
        }
        for number, ((image_id, picture), path, split) in enumerate(
            zip(instances.images.items(), paths, splits, strict=True)
        )
    ]


def is_published(settings: CocoSettings) -> bool:
    """Whether the splits are COCO's own, by their names."""
    return all(re.fullmatch(_PUBLISHED, name) for name in settings.splits.values())


def annotations_of(root: Path, folder: str) -> str:
    """The file with a split's annotations, relative to the root; the usual one if there is none."""
    name, beside = f"annotations/instances_{folder}.json", f"{folder}/_annotations.coco.json"
    return beside if not (root / name).exists() and (root / beside).is_file() else name


def _remedies(root: Path, settings: CocoSettings, published: bool) -> tuple[str, str]:
    """The remedies of errors about a file that is missing, and about one that is broken."""
    if published:
        folders, archives = (
            " and ".join(f"{name}{end}" for name in settings.splits.values())
            for end in ("/", ".zip")
        )
        remedy = (
            f"COCO needs annotations/, {folders} in {root}: unpack the publisher's "
            f"annotations_*.zip, {archives} there."
        )
        return remedy, remedy
    files: list[Path] = []
    if not all((root / annotations_of(root, name)).exists() for name in settings.splits.values()):
        files = sorted([*root.glob("*.json"), *root.glob("*/*.json")])
    found = ", ".join(str(path.relative_to(root)) for path in files[:_SHOWN])
    return (
        f"Put the file there, or set `prepare.{root.name}.train` and `prepare.{root.name}.test` in "
        "params.yaml to the names of your splits: SPLIT has its labels in "
        f"{root}/annotations/instances_SPLIT.json and its photographs in {root}/SPLIT/."
        f"{f' There are {found}.' if found else ''}",
        "Export the file again in the format COCO, as UTF-8.",
    )


def _check_published(first: _Instances, second: _Instances) -> None:
    """Check that two files of COCO have the same categories and no image in common."""
    if second.categories != first.categories:
        key, name = min(second.categories.items() ^ first.categories.items())
        raise InputError(
            f"{second.path}: the categories are not those of {first.path}; they differ in "
            f"{key} ({name!r}).",
            "Use two files of one release.",
        )
    common = first.images.keys() & second.images.keys()
    if common:
        raise InputError(
            f"{second.path}: the image {min(common, key=_id_order)} is also in {first.path}.",
            "Remove it from one of the two files.",
        )


def _share_ids(files: Sequence[_Instances]) -> str:
    """A note if images of two files have the same id, else an empty text."""
    for first, second in combinations(files, 2):
        if first.images.keys() & second.images.keys():
            ids = " and ".join(f"{instances.folder}/<id>" for instances in files)
            return (
                f"{first.path} and {second.path} have images of the same id. The image ids are "
                f"therefore {ids}."
            )
    return ""


def _vocabulary(files: Sequence[_Instances]) -> tuple[dict[str, int], list[str]]:
    """The number of each category's name: in the order of the ids, those of training first.

    Returns:
        name -> number; and notes.
    """
    names: dict[str, int] = {}
    notes = []
    for instances in files:
        ordered = sorted(instances.categories.items(), key=lambda item: _id_order(item[0]))
        own = [name for _, name in ordered]
        if len(set(own)) < len(own):
            twice = next(name for name, times in Counter(own).items() if times > 1)
            notes.append(
                f"{instances.path} has categories of the same name, the first is {twice!r}. They "
                "are one label."
            )
        for name in own:
            names.setdefault(name, len(names))
    first, *others = files
    for other in others:
        if different := set(first.categories.values()) ^ set(other.categories.values()):
            shown = ", ".join(sorted(different)[:_SHOWN])
            notes.append(
                f"{first.path} and {other.path} have different categories: only one of them has "
                f"{shown}."
            )
    if not 1 <= len(names) <= _MOST_LABELS:
        raise InputError(
            f"{first.path} has {len(names)} categories, expected 1 to {_MOST_LABELS}.", FIX
        )
    return names, notes


def _id_order(key: str) -> tuple[bool, int, str]:
    """Sort ids by their number; texts come last."""
    number = re.fullmatch(r"-?[0-9]+", key)
    return (True, 0, key) if number is None else (False, int(key), "")


def _objects(
    instances: _Instances, vocabulary: dict[str, int], start: int, published: bool
) -> tuple[dict[int, list[int]], ListedBoxes]:
    """The labels of each image of a file by its index there, and its objects.

    Args:
        vocabulary: name -> label.
        start: the row of the file's first image.
        published: whether the file is COCO's own.
    """
    row_of = np.full(len(instances.image_numbers), -1, dtype=np.int64)
    for row, image_id in enumerate(instances.images):
        row_of[instances.image_numbers[image_id]] = row
    label_of = np.full(len(instances.category_numbers), -1, dtype=np.int64)
    for category_id, name in instances.categories.items():
        label_of[instances.category_numbers[category_id]] = vocabulary[name]
    rows = row_of[np.array(instances.image_column, dtype=np.int64)]
    numbers = label_of[np.array(instances.category_column, dtype=np.int64)]
    _check_references(instances, rows, numbers)
    listed = rows >= 0
    pairs = np.unique(np.stack([rows, numbers], 1)[listed], axis=0)
    labels: dict[int, list[int]] = {}
    for row, number in pairs.tolist():
        labels.setdefault(row, []).append(number)
    crowds = np.array(instances.crowds, dtype=np.int64) == 1
    corners = np.array(instances.corners, dtype=np.float64).reshape(-1, 4)
    kept = listed & ~crowds
    if not published:
        # Without any other object of its class, a crowd would leave its image without that class.
        keys = rows * len(vocabulary) + numbers
        alone = listed & crowds & ~np.isin(keys, keys[kept])
        corners[alone] = math.nan
        kept |= alone
        _note_crowds(instances, rows[alone])
    relative = are_relative(corners[kept])
    if relative:
        instances.notes.append(note_relative(instances.path))
    return labels, ListedBoxes(
        rows[kept] + start, numbers[kept] + 1, corners[kept], np.full(int(kept.sum()), relative)
    )


def _note_crowds(instances: _Instances, rows: np.ndarray) -> None:
    """Note images in which all objects of a class are crowds; ``rows`` may name one repeatedly."""
    images = np.unique(rows)
    if not len(images):
        return
    first = list(instances.images.values())[images[0]].name
    instances.notes.append(
        f"{instances.path}: in {len(images)} of {len(instances.images)} images, the first is "
        f"{first!r}, every object of a class is marked as a crowd (`iscrowd: 1`), whose box stands "
        "for many objects. These objects count as labels without boxes, and the images are left "
        "out when a detector is fitted. If each is one object, set its `iscrowd` to 0."
    )


def _check_references(instances: _Instances, rows: np.ndarray, numbers: np.ndarray) -> None:
    """Refuse annotations of unknown categories, and note those of unknown images."""
    path = instances.path
    if (numbers < 0).any():
        index = int((numbers < 0).argmax())
        ids = list(instances.category_numbers)
        known = sorted(instances.categories, key=_id_order)
        shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
        raise InputError(
            f"{path}: annotations[{index}]: `category_id` is "
            f"{ids[instances.category_column[index]]}, but the file has no category with that id, "
            f"only {shown}.",
            "Correct the id, or add the category to `categories`.",
        )
    unknown = np.flatnonzero(rows < 0)
    if not len(unknown):
        return
    ids = list(instances.image_numbers)
    first = f"annotations[{unknown[0]}], of the image {ids[instances.image_column[unknown[0]]]}"
    if len(unknown) == len(rows):
        raise InputError(
            f"{path}: no annotation is of an image that `images` lists. The first is {first}.",
            "Correct `image_id` of the annotations, or `id` of the images.",
        )
    instances.notes.append(
        f"{path}: {len(unknown)} of {len(rows)} annotations are of images that it does not list, "
        f"and are left out. The first is {first}."
    )


# --- one file ------------------------------------------------------------------------------------


def _read_instances(path: Path, folder: str, missing: str, broken: str) -> _Instances:
    instances = _Instances(path, folder)
    add = {"categories": _add_category, "images": _add_image, "annotations": _add_annotation}
    seen = set()
    try:
        with (
            open_source(path, missing) as stored,
            TextIOWrapper(stored, encoding="utf-8-sig") as stream,
        ):
            for name, records in JsonArrays(stream, path, broken).arrays():
                if name in add:
                    seen.add(name)
                    for index, record in enumerate(records):
                        add[name](instances, record, f"{path}: {name}[{index}]")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read as UTF-8 ({error}).", broken) from error
    lacking = [name for name in _ARRAYS if name not in seen]
    if lacking:
        raise InputError(f"{path} has no array `{lacking[0]}`.", broken)
    if instances.exchanged is not None:
        instances.notes.append(
            f"{path} has boxes of negative width or height, the first at "
            f"annotations[{instances.exchanged}]. Their x and y are read as another corner."
        )
    return instances


def _add_category(instances: _Instances, record: Any, where: str) -> None:
    number, name = values_of(record, ("id", "name"), where)
    key = key_of(number, "id", where)
    name = name_of(plain_text(str(name)) if type(name) in (int, str) else name, "name", where)
    if instances.categories.setdefault(key, name) != name:
        raise InputError(
            f"{where}: another category has the same id {key}: {name!r} and "
            f"{instances.categories[key]!r}.",
            "Give one of them, and its annotations, another id.",
        )
    instances.category_numbers.setdefault(key, len(instances.category_numbers))


def _add_image(instances: _Instances, record: Any, where: str) -> None:
    (number,) = values_of(record, ("id",), where)
    key = key_of(number, "id", where)
    if record.get("file_name") is None and isinstance(record.get("coco_url"), str):
        name = record["coco_url"].rpartition("/")[2]
    else:
        name = values_of(record, ("file_name",), where)[0]
    sides = (side_of(record.get(side)) for side in ("width", "height"))
    picture = _Picture(name_of(name, "file_name", where), *sides)
    if instances.images.setdefault(key, picture) != picture:
        raise InputError(
            f"{where}: the image {key} appears twice in this file.",
            "Remove one of the two, or give it and its annotations another id.",
        )
    instances.image_numbers.setdefault(key, len(instances.image_numbers))


def _add_annotation(instances: _Instances, record: Any, where: str) -> None:
    image_id, category_id = values_of(record, ("image_id", "category_id"), where)
    image = key_of(image_id, "image_id", where)
    category = key_of(category_id, "category_id", where)
    crowd = record.get("iscrowd")
    if crowd not in (None, 0, 1, "0", "1"):
        raise InputError(f"{where}: `iscrowd` is {crowd!r}, expected 0 or 1.", FIX)
    x, y, width, height = box = box_of(record.get("bbox"), where)
    if (width < 0 or height < 0) and instances.exchanged is None:
        instances.exchanged = len(instances.crowds)
    if width < 0 or height < 0:
        box = (min(x, x + width), min(y, y + height), abs(width), abs(height))
    numbers = instances.image_numbers
    instances.image_column.append(numbers.setdefault(image, len(numbers)))
    numbers = instances.category_numbers
    instances.category_column.append(numbers.setdefault(category, len(numbers)))
    instances.corners.extend((box[0], box[1], box[0] + box[2], box[1] + box[3]))
    instances.crowds.append(int(crowd or 0))
