"""Photographs with YOLO's labels and a data.yaml, as Ultralytics lays them out.

    data/birds/                             or, as exported by some tools:
        data.yaml                               data.yaml
        images/train/nest.jpg                   train/images/nest.jpg
        labels/train/nest.txt                   train/labels/nest.txt

The description is at docs.ultralytics.com/datasets/detect. `names` in data.yaml has the classes, as
a list or by number, and each split is a folder, a .txt file with the path of a photograph on each
line, or a list of these. In the path of a photograph, the last folder `images` becomes `labels`,
and the suffix .txt, to give that of its label file. Without such a folder, it lies beside it. A
photograph without a label file has no label.

A line of a label file is `class x y width height`: the number of the class from 0, then centre and
size of the box in shares of the picture's width and height. A line with more numbers is an
outline, `class x1 y1 x2 y2 x3 y3 ...`, whose extent is the box; but if data.yaml has `kpt_shape`,
the numbers after the first five are key points, which are not read.

Paths in data.yaml and in lists often lead through folders of another machine, or start at a folder
of Ultralytics' settings. As in COCO's JSON, the longest end of a path that exists below the data
set's folder is meant. Image ids are paths relative to that folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.datasets.disk import Disk, without_suffix
from pipeline.datasets.listing import (
    ListedBoxes,
    Listing,
    hash_sources,
    read_lines,
    read_source,
    split_by_share,
)
from pipeline.datasets.manifest import COLUMNS, Split
from pipeline.datasets.readers.found import find_photographs
from pipeline.errors import InputError, MissingError
from pipeline.formats.encodings import plain_text
from pipeline.images import files_below
from pipeline.settings import YoloSettings

_MOST_LABELS = np.iinfo(np.int16).max + 1  # of a manifest
_ROUNDING = 0.01  # share of the picture by which a coordinate may leave it
_FIX = "Correct the line, or export the labels again."

LoadYaml = Callable[[str, str, str], Any]
"""Reads a text as YAML; the other arguments are the file's name and a remedy, for messages."""


@dataclass(frozen=True)
class _Description:
    """What data.yaml says.

    Attributes:
        path: of the file.
        names: of the C classes.
        splits: each one that the settings name -> its entries: folders or lists.
        base: the folder that these are relative to; empty if it says none.
        has_key_points: whether the labels have key points.
    """

    path: Path
    names: tuple[str, ...]
    splits: dict[Split, list[str]]
    base: str
    has_key_points: bool


def read_yolo(root: Path, settings: YoloSettings, load_yaml: LoadYaml) -> Listing:
    """List photographs with YOLO's labels.

    Args:
        root: data/<dataset>/.
        settings: the name of data.yaml, and its splits that train and test.
        load_yaml: reads YAML.

    Raises:
        MissingError: data.yaml, a folder or a list does not exist, or no photograph of a split has
            a label file.
        InputError: a file breaks the format; names the file and the line.
    """
    description = _describe(root, settings, load_yaml)
    disk = Disk(root)
    sources, notes = {settings.file}, []
    rows: list[dict[str, Any]] = []
    objects: list[tuple[int, int, tuple[float, ...]]] = []
    for split, entries in description.splits.items():
        paths, files, of_split = _files(description, split, entries, disk, sources)
        notes += of_split
        splits: list[Split] = [split] * len(paths)
        if settings.test_share is not None:
            otherwise = "set `test` to the name of another split."
            splits = split_by_share(paths, settings.test_share, description.path, otherwise)
        for path, file, of_image in zip(paths, files, splits, strict=True):
            labels = disk.file(file)
            boxes = [] if labels is None else list(_boxes(root / labels, description))
            objects += [(len(rows), number, corners) for number, corners in boxes]
            rows.append(
                {
                    "image_id": path,
                    "path": path,
                    "split": of_image,
                    "labels": sorted({number for number, _ in boxes}),
                    "ignored": [],
                    "width": None,
                    "height": None,
                }
            )
    return Listing(
        vocabulary=description.names,
        split_name="/".join(settings.splits.values()),
        sources=hash_sources(root, sorted(sources)),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=ListedBoxes(
            rows=np.array([row for row, *_ in objects], dtype=np.int64),
            classes=np.array([number + 1 for _, number, _ in objects], dtype=np.int64),
            pixels=np.array([corners for *_, corners in objects]).reshape(-1, 4),
            relative=np.ones(len(objects), dtype=bool),
        ),
        notes=tuple(notes),
        disk=disk,
    )


# --- data.yaml -----------------------------------------------------------------------------------


def _describe(root: Path, settings: YoloSettings, load_yaml: LoadYaml) -> _Description:
    """Read data.yaml; raises as `read_yolo`."""
    path = root / settings.file
    setting = f"`prepare.{root.name}"
    found = sorted(one.relative_to(root).as_posix() for one in root.glob("*.y*ml"))
    there = f" There is {found[0]}." if found else ""
    content = read_source(
        path, f"Put the file there, or set {setting}.file` in params.yaml to its name.{there}"
    )
    again = "Export the data set again, or correct the file as UTF-8 text."
    try:
        raw = load_yaml(content.decode("utf-8-sig"), str(path), again)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read as UTF-8 ({error}).", again) from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} is {type(raw).__name__}, expected keys such as `names`.", again)
    splits: dict[Split, list[str]] = {}
    for split, name in settings.splits.items():
        entry = raw.get(name)
        entries: list[Any] = entry if isinstance(entry, list) else [entry]
        if not entries or not all(isinstance(one, str) and one.strip() for one in entries):
            others = [key for key in ("train", "val", "test") if raw.get(key)]
            raise InputError(
                f"{path}: `{name}` is {entry!r}, expected the folder or list of the split "
                f"{split!r}. The file has the splits {', '.join(others) or 'of no usual name'}.",
                f"Set {setting}.{split}` in params.yaml to one of them; or {setting}.test_share: "
                f"0.2`, without `test`, to test on a fifth of {settings.train!r}.",
            )
        splits[split] = entries
        _refuse_shared(path, splits, settings, setting)
    base = raw.get("path")
    return _Description(
        path=path,
        names=_names(path, raw.get("names")),
        splits=splits,
        base=base if isinstance(base, str) else "",
        has_key_points=raw.get("kpt_shape") is not None,
    )


def _refuse_shared(
    path: Path, splits: Mapping[Split, list[str]], settings: YoloSettings, setting: str
) -> None:
    """Refuse an entry of two splits, as in data.yaml of examples; ``setting`` is `prepare.NAME`."""
    owners: dict[str, Split] = {}
    for split, entries in splits.items():
        for entry in entries:
            owner = owners.setdefault(entry.strip().rstrip("/"), split)
            if owner != split:
                first, second = settings.splits[owner], settings.splits[split]
                raise InputError(
                    f"{path}: `{first}` and `{second}` have the same photographs, {entry!r}; "
                    "expected others to test on.",
                    f"Set {setting}.test_share: 0.2` in params.yaml, without `test` and `val`, to "
                    f"test on a fifth of {settings.train!r}.",
                )


def _names(path: Path, raw: Any) -> tuple[str, ...]:
    """The names of the classes, from a list or by their numbers."""
    expected = "a name for each class, such as `[cat, dog]` or `{0: cat, 1: dog}`"
    if isinstance(raw, dict):
        numbers = {str(key): value for key, value in raw.items()}
        if set(numbers) != set(map(str, range(len(numbers)))):
            raise InputError(
                f"{path}: `names` has the numbers {', '.join(numbers)}; expected 0 to "
                f"{len(numbers) - 1}, each once.",
                "Correct `names`.",
            )
        raw = [numbers[str(number)] for number in range(len(numbers))]
    if not isinstance(raw, list) or not 1 <= len(raw) <= _MOST_LABELS:
        raise InputError(f"{path}: `names` is {raw!r}; expected {expected}.", "Correct `names`.")
    names: dict[str, int] = {}
    for number, given in enumerate(raw):
        # Digits are whole numbers to YAML; an empty value or `true` is no name.
        is_text = isinstance(given, str | int) and not isinstance(given, bool)
        name = plain_text(str(given)) if is_text else ""
        if not name or name in names:
            raise InputError(
                f"{path}: class {number} of `names` is {given!r}; expected {expected}, each once.",
                "Correct `names`.",
            )
        names[name] = number
    return tuple(names)


# --- photographs ---------------------------------------------------------------------------------


def _files(
    description: _Description,
    split: Split,
    entries: Sequence[str],
    disk: Disk,
    sources: set[str],
) -> tuple[list[str], list[str], list[str]]:
    """The paths of a split's photographs, those of their label files, and notes.

    What they were found by is added to ``sources``; raises as `_photographs`, and a MissingError if
    there is no label file.
    """
    paths: list[str] = []
    notes: list[str] = []
    for entry in entries:
        found, of_entry, source = _photographs(description, entry, disk)
        sources.add(source)
        notes += of_entry
        paths += found
    files = [_label_file(path) for path in paths]
    if not any(disk.file(file) for file in files):
        raise MissingError(
            f"{description.path}: none of the {len(paths)} photographs of {split!r} has a file of "
            f"labels. The first is {paths[0]}, expected {disk.root / files[0]}.",
            "Put the folder `labels` beside the folder `images`.",
        )
    # Photographs may lie beside them, which take too long to hash.
    sources |= {"/".join([*file.split("/")[:-1], "*.txt"]) for file in files}
    return paths, files, notes


def _photographs(
    description: _Description, entry: str, disk: Disk
) -> tuple[list[str], list[str], str]:
    """The paths of the photographs in a folder or list, notes, and the source to hash.

    Raises:
        MissingError: there is no such folder or list, or no photograph in it.
    """
    where = f"{description.path}: `{entry}`"
    place = _place(description, entry, disk.root)
    if place is None:
        raise MissingError(
            f"{where} is no folder or list below {disk.root}, and neither is an end of this path.",
            f"Put the data set there, or a link to its folder, or correct {description.path}.",
        )
    if (disk.root / place).is_dir():
        folder = disk.root / place
        files = [path.relative_to(disk.root).as_posix() for path in files_below(folder)]
        paths, source = [file for file in files if disk.is_photograph(file)], f"{place}/"
        notes: list[str] = []
    else:
        lines = read_lines(disk.root / place, _FIX)
        names = {str(number): line for number, line in lines}
        folder_of_list = place.rpartition("/")[0] or "."
        paths, notes = find_photographs(disk, folder_of_list, names, disk.root / place)
        paths, source = [path.removeprefix("./") for path in paths], place
    if not paths:
        raise MissingError(
            f"{where} has no photograph.", f"Put photographs in {disk.root / place}."
        )
    return paths, notes, source


def _place(description: _Description, entry: str, root: Path) -> str | None:
    """What an entry of data.yaml means, relative to the root: the longest end that is there.

    An entry such as `.` is the folder of data.yaml.
    """
    above = description.path.parent.relative_to(root).as_posix()
    for base in (f"{above}/{description.base}", above):
        parts = f"{base}/{entry}".replace("\\", "/").split("/")
        parts = [part for part in parts if part not in ("", ".", "..")]
        for start in range(len(parts)):
            place = "/".join(parts[start:])
            if (root / place).exists():
                return place
        if not parts:
            return above
    return None


def _label_file(path: str) -> str:
    """The path of a photograph's labels."""
    before, images, after = f"/{path}".rpartition("/images/")
    moved = f"{before}/labels/{after}"[1:] if images else path
    return f"{without_suffix(moved)}.txt"


# --- labels --------------------------------------------------------------------------------------


def _boxes(path: Path, description: _Description) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield class number and box of each line: x0, y0, x1, y1 in [0,1] of the picture."""
    for number, line in read_lines(path, _FIX):
        where = f"{path}, line {number}"
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            values = []
        if len(values) < 5 or (len(values) % 2 == 0 and not description.has_key_points):
            raise InputError(
                f"{where}: found {line[:100]!r}, expected `class x y width height`, or a class and "
                "the points of an outline.",
                _FIX,
            )
        index, *coordinates = values
        if index not in range(len(description.names)):
            raise InputError(
                f"{where}: the class is {line.split()[0]}, expected a number from 0 to "
                f"{len(description.names) - 1}, since {description.path.name} has "
                f"{len(description.names)} names.",
                _FIX,
            )
        is_box = len(values) == 5 or description.has_key_points
        read = coordinates[:4] if is_box else coordinates
        if not all(-_ROUNDING <= one <= 1 + _ROUNDING for one in read):
            wrong = next(one for one in read if not -_ROUNDING <= one <= 1 + _ROUNDING)
            raise InputError(
                f"{where}: found {wrong:g}, expected shares of width and height, from 0 to 1.",
                "If these are pixels, divide them by width and height. " + _FIX,
            )
        if is_box and min(read[2:]) < 0:
            raise InputError(
                f"{where}: found the width or height {min(read[2:]):g}, expected 0 or more.", _FIX
            )
        yield int(index), _corners(read) if is_box else _extent(read)


def _corners(box: Sequence[float]) -> tuple[float, ...]:
    x, y, width, height = box
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _extent(points: Sequence[float]) -> tuple[float, ...]:
    x, y = points[::2], points[1::2]
    return (min(x), min(y), max(x), max(y))
