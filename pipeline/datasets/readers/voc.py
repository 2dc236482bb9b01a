"""PASCAL VOC, as its development kit lays it out, and other data sets in its layout.

    data/voc2007/VOCdevkit/VOC2007/
        ImageSets/Main/trainval.txt             one image id per line: the training split
        ImageSets/Main/test.txt                 the test split
        ImageSets/Main/<class>_trainval.txt     for `labels: lists`: id and 1, 0 or -1 per line
        ImageSets/Main/<class>_test.txt
        Annotations/<id>.xml                    for `labels: annotations`
        JPEGImages/<id>.jpg

The archives VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar, unpacked in data/voc2007/,
make this tree, and VOCtrainval_11-May-2012.tar makes VOC2012, whose test labels are not public: its
lists are `train` and `val`. The devkit's documentation (devkit_doc.pdf) describes the format. Lists
may have CRLF or LF line ends, blank lines, and blanks around an entry.

A class whose objects in an image are all marked `difficult` is a difficult label there: neither
positive nor negative. A 0 in the class lists means the same, so both sources give the same labels.

Boxes are in the XML files only. Pixels count from 1, and those at both ends belong to the box: it
covers xmin-1 to xmax of the image's width. Difficult objects are left out of the boxes.

Labelling tools write variations of this, which are read where their meaning is plain:

- An id may have dots, blanks and slashes. A line of a list may be the file name or path of a
  photograph or annotation, or of both, may be in quotes, and may have a second column with a 1. The
  files that exist decide what is meant.
- The photograph is `<id>.jpg`, or else the only file in JPEGImages with the name `<id>` and the
  suffix of another format, in upper or lower case. The element `filename` is not read.
- No `difficult`, an empty one and `Unspecified` mean 0.
- An object with `<deleted>1</deleted>` is left out.
- If no coordinate of a split's boxes is greater than 1, they are shares of width and height.
- An object without `bndbox` counts as a label. Corners may be in any order.
- `size` may be absent or wrong: `pipeline.datasets.frames` compares it with the photograph.
- An annotation may have a namespace, a byte order mark, and any encoding that Python knows.

Such data sets name their vocabulary in the settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from pipeline.datasets.disk import Disk, is_inside, without_suffix
from pipeline.datasets.listing import (
    ListedBoxes,
    Listing,
    are_relative,
    hash_sources,
    note_relative,
    read_lines,
    read_source,
    split_by_share,
)
from pipeline.datasets.manifest import COLUMNS, Split
from pipeline.datasets.readers.rows import did_you_mean
from pipeline.errors import InputError
from pipeline.formats.encodings import plain_text
from pipeline.formats.text import composed
from pipeline.formats.xml import DocumentTypeError, parse_xml
from pipeline.settings import VocSettings

VOCABULARY = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car"),
    *("cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike"),
    *("person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The devkit's classes, in its (alphabetical) order."""

_FIX_FILE = "Fix the file."

_SHOWN = 5  # lists that an error names

_NOT_DIFFICULT = ("", "unspecified", "false", "no", "none")
_DIFFICULT = ("true", "yes")
_DELETED = ("1", "true")


@dataclass
class _Image:
    """What the files say about one image.

    Attributes:
        positive: classes with an object that is not difficult.
        difficult: classes with a difficult object.
        width, height: in pixels, where the source gives them.
        objects: class number from 1, and corners as they are written, the smaller first, of each
            object that is not difficult; nan where it has no box.
        exchanged: whether corners of an object are in another order.
    """

    positive: set[int] = field(default_factory=set)
    difficult: set[int] = field(default_factory=set)
    width: int | None = None
    height: int | None = None
    objects: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    exchanged: bool = False


def read_voc(root: Path, settings: VocSettings) -> Listing:
    """List VOC, or another data set in its layout. Image ids are the devkit's (``000005``).

    Args:
        root: data/<dataset>/.
        settings: the folder of the devkit, its lists, whether labels are read from annotations or
            class lists, and the vocabulary.

    Raises:
        MissingError: a file does not exist.
        InputError: a file breaks the format; names the file and the line or object.
    """
    devkit = _Devkit(root, settings)
    vocabulary = tuple(map(plain_text, settings.vocabulary or VOCABULARY))
    numbers = {name: number for number, name in enumerate(vocabulary)}
    sources = [f"{devkit.lists}/{name}.txt" for name in settings.splits.values()]
    ids: dict[str, Split] = {}
    for split, source in zip(settings.splits, sources, strict=True):
        devkit.read_ids(root / source, split, ids)
    images = {image_id: _Image() for image_id in ids}
    if settings.labels == "annotations":
        for image_id, image in images.items():
            _read_annotation(devkit.annotation(image_id), image, numbers, devkit)
        sources += devkit.annotation_folders(images)
    else:
        for split, name in settings.splits.items():
            of_split = {key: image for key, image in images.items() if ids[key] == split}
            for label, number in numbers.items():
                sources.append(f"{devkit.lists}/{label}_{name}.txt")
                devkit.read_class_list(root / sources[-1], number, of_split)
    paths = [devkit.photograph(image_id) for image_id in images]
    if settings.test_share is not None:
        otherwise = "set `test` to the name of another list."
        shared = split_by_share(paths, settings.test_share, root / sources[0], otherwise)
        ids = dict(zip(ids, shared, strict=True))
    rows = [
        {
            "image_id": image_id,
            "path": path,
            "split": ids[image_id],
            "labels": sorted(image.positive),
            "ignored": sorted(image.difficult - image.positive),
            "width": image.width,
            "height": image.height,
        }
        for (image_id, image), path in zip(images.items(), paths, strict=True)
    ]
    boxes, notes = _listed_boxes(images, ids, root)
    exchanged = [image_id for image_id, image in images.items() if image.exchanged]
    return Listing(
        vocabulary=vocabulary,
        split_name=_split_name(settings),
        sources=hash_sources(root, sources),
        table=pa.Table.from_pylist(rows, schema=COLUMNS),
        boxes=boxes if settings.labels == "annotations" else None,
        notes=(*_note_exchanged(exchanged), *notes),
        disk=devkit.disk,
    )


def _split_name(settings: VocSettings) -> str:
    if settings.vocabulary:
        return "own"
    names = "/".join(settings.splits.values())
    return "official" if names == "trainval/test" else names


def _listed_boxes(
    images: dict[str, _Image], splits: Mapping[str, Split], root: Path
) -> tuple[ListedBoxes, list[str]]:
    """The objects of all images; and notes on splits whose boxes are relative."""
    objects = [
        (row, number, corners)
        for row, image in enumerate(images.values())
        for number, corners in image.objects
    ]
    rows = np.array([row for row, _, _ in objects], dtype=np.int64)
    written = np.array([corners for *_, corners in objects], dtype=np.float64).reshape(-1, 4)
    split_of = np.array([splits[image_id] for image_id in images])[rows]
    relative, notes = np.zeros(len(rows), dtype=bool), []
    for split in dict.fromkeys(splits.values()):
        of_split = split_of == split
        if are_relative(written[of_split]):
            relative |= of_split
            notes.append(note_relative(f"{root.name}, split {split!r}"))
    first = np.where(relative[:, None], 0, [[1, 1, 0, 0]])  # pixels count from 1
    boxes = ListedBoxes(
        rows=rows,
        classes=np.array([number for _, number, _ in objects], dtype=np.int64),
        pixels=written - first,
        relative=relative,
    )
    return boxes, notes


def _note_exchanged(image_ids: list[str]) -> tuple[str, ...]:
    """A note on images of which corners are in another order, if there are any."""
    if not image_ids:
        return ()
    first = f"In {image_ids[0]}.xml"
    where = first if len(image_ids) == 1 else f"{first} and {len(image_ids) - 1} more annotations"
    return (
        f"{where}, xmin is greater than xmax, or ymin than ymax. These boxes are read as two "
        "opposite corners in another order.",
    )


# --- files and lists -----------------------------------------------------------------------------


class _Devkit:
    """The folders of the layout, and the images that its lists name.

    Attributes:
        disk: the files of the data set.
        lists: the folder of the lists, relative to the data set's root.
        remedy: of errors about missing files: which folders must be where.
        broken: the remedy of errors about annotations that are not XML.
    """

    def __init__(self, root: Path, settings: VocSettings) -> None:
        folder = PurePosixPath(settings.folder)
        self.lists = folder / "ImageSets" / "Main"
        self.remedy = _layout(root, folder, settings)
        self._own = settings.vocabulary is not None
        self.broken = "Export it again, as XML in UTF-8." if self._own else self.remedy
        self._root = root
        self._annotations = folder / "Annotations"
        self._photographs = folder / "JPEGImages"
        self.disk = Disk(root)

    def annotation(self, image_id: str) -> Path:
        """The XML file of an image, whether it exists or not."""
        path = f"{self._annotations}/{image_id}.xml"
        return self._root / (self.disk.file(path) or path)

    def annotation_remedy(self, name: str) -> str:
        """The remedy of errors about an image's XML file that is missing, by the file's name."""
        if self._own:
            return (
                "Put the file there, or remove the line from the list. A photograph without "
                f"labels needs a file without <object>.{self._other_case(name)}"
            )
        return self.remedy

    def _other_case(self, name: str) -> str:
        """A sentence about an XML file of the same name in other letters, after a blank."""
        for other in self.disk.names(str(self._annotations)):
            if other != name and other.casefold() == name.casefold():
                return f" There is {self._annotations / other}: correct upper and lower case."
        return ""

    def annotation_folders(self, image_ids: Iterable[str]) -> list[str]:
        """The folders of the XML files of some images, relative to the data set's root."""
        files = (self.annotation(image_id).relative_to(self._root) for image_id in image_ids)
        folders = {file.parent.as_posix() for file in files}
        return sorted(folders | {str(self._annotations)})

    def photograph(self, image_id: str) -> str:
        """The path of an image's photograph, relative to the root, whether it exists or not.

        Raises:
            InputError: several files can be meant.
        """
        path = f"{self._photographs}/{image_id}"
        usual = path if self.disk.is_photograph(path) else f"{path}.jpg"
        return self.disk.file(f"{path}.jpg") or self.disk.find(path) or usual

    def read_ids(self, path: Path, split: Split, ids: dict[str, Split]) -> None:
        """Add the image ids of a split to ``ids``."""
        for number, line in read_lines(path, self._list_remedy(path)):
            image_id = self._image_id(line, columns=True)
            if image_id is None:
                raise InputError(
                    f"{path}, line {number}: found {line!r}, expected an image id such as 000005. "
                    f"{self._annotations.name} and {self._photographs.name} have no file of this "
                    "name.",
                    "Fix the line, or remove it.",
                )
            if image_id in ids:
                raise InputError(
                    f"{path}, line {number}: the image {image_id} is already in the list of "
                    f"{ids[image_id]}.",
                    "Remove it from one of the lists.",
                )
            ids[image_id] = split

    def read_class_list(self, path: Path, number: int, images: dict[str, _Image]) -> None:
        """Add what the list of the class ``number`` says of each image of a split to ``images``."""
        seen = set()
        for line_number, line in read_lines(path, self.remedy):
            where = f"{path}, line {line_number}"
            parts = re.fullmatch(r"(.+?)\s+(1|0|-1)", line)
            image_id = self._image_id(parts[1]) if parts else None
            if parts is None or image_id is None:
                raise InputError(
                    f"{where}: found {line!r}, expected an image id and 1, 0 (difficult) or -1.",
                    "Fix the line.",
                )
            if image_id in seen or image_id not in images:
                problem = (
                    "appears a second time" if image_id in seen else "is not in the split's list"
                )
                raise InputError(f"{where}: the image {image_id} {problem}.", "Remove the line.")
            seen.add(image_id)
            if parts[2] == "1":
                images[image_id].positive.add(number)
            elif parts[2] == "0":
                images[image_id].difficult.add(number)
        lacking = [image_id for image_id in images if image_id not in seen]
        if lacking:
            raise InputError(
                f"{path}: {len(lacking)} of the split's {len(images)} images have no line. The "
                f"first is {lacking[0]}.",
                self.remedy,
            )

    def _image_id(self, line: str, columns: bool = False) -> str | None:
        """The image that a line means: the first reading of which there is a file.

        Without any file, an id in the devkit's form; None if it is not one.

        Args:
            columns: whether the line may have a second column.
        """
        texts = [line, re.sub(r"\s+1$", "", line)] if columns else [line]
        pair = re.fullmatch(r"(.+?\.\w+)[\s,]+(.+\.xml)", line, re.IGNORECASE)
        if columns and pair and self.disk.is_photograph(pair[1]):
            texts = [pair[1]]  # a photograph and its annotation
            if len({PurePosixPath(path.replace("\\", "/")).stem for path in pair.groups()}) > 1:
                return None
        readings = [reading for text in dict.fromkeys(texts) for reading in self._readings(text)]
        for reading in readings:
            if self.disk.file(f"{self._annotations}/{reading}.xml") or self.disk.photographs(
                f"{self._photographs}/{reading}"
            ):
                return composed(reading)
        if not is_inside(line):
            return None
        for reading in readings:
            if re.fullmatch(r"[\w./-]+", reading) and not self._has_suffix(reading):
                return composed(reading)
        return None

    def _readings(self, text: str) -> Iterator[str]:
        """The ids that a name or path can stand for, as it is written first."""
        path = text.strip("\"'").replace("\\", "/").removeprefix("./")
        inner = [
            path.rpartition(f"{folder.name}/")[2]
            for folder in (self._photographs, self._annotations)
        ]
        for name in dict.fromkeys([path, *inner, path.rpartition("/")[2]]):
            if is_inside(name):
                yield name
                if self._has_suffix(name):
                    yield without_suffix(name)

    def _has_suffix(self, name: str) -> bool:
        """Whether a name is that of a photograph or an annotation."""
        return self.disk.is_photograph(name) or name.lower().endswith(".xml")

    def _list_remedy(self, path: Path) -> str:
        """The remedy of errors about a list; names the lists that there are in its place."""
        names = self.disk.names(path.parent.relative_to(self._root).as_posix())
        lists = [name for name in names if name.endswith(".txt")]
        if not lists or path.name in lists:
            return self.remedy
        return (
            f"There are {', '.join(lists[:_SHOWN])}: set `prepare.{self._root.name}.train` and "
            f"`prepare.{self._root.name}.test` in params.yaml to the names of two lists, without "
            f".txt. {self.remedy}"
        )


def archives_of(folder: str) -> str:
    """The publisher's archives that make the folder of a devkit."""
    if PurePosixPath(folder).name == "VOC2012":
        return "VOCtrainval_11-May-2012.tar, whose lists are train and val,"
    return "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar"


def _layout(root: Path, folder: PurePosixPath, settings: VocSettings) -> str:
    folders = "ImageSets/Main/, Annotations/ and JPEGImages/"
    if settings.vocabulary is None:
        return (
            f"VOC needs {folders} in {root / folder}: unpack {archives_of(str(folder))} in {root}."
        )
    others = []
    if not (root / folder / "ImageSets").is_dir():
        others = sorted(
            path.parent for path in [*root.glob("*/ImageSets"), *root.glob("*/*/ImageSets")]
        )
    found = f"`prepare.{root.name}.folder: {others[0].relative_to(root)}`" if others else ""
    return (
        f"{f'There is {others[0]}: set {found} in params.yaml. ' if found else ''}"
        f"This layout needs {folders} in {root / folder}. Put the file there, as "
        "UTF-8 text. docs/own-data.md says how to make this layout from other folders."
    )


# --- annotations ---------------------------------------------------------------------------------


def _read_annotation(path: Path, image: _Image, numbers: dict[str, int], devkit: _Devkit) -> None:
    """Fill in ``image`` from its XML file; ``numbers`` maps class names to their numbers."""
    content = read_source(path, devkit.annotation_remedy(path.name))
    try:
        tree = parse_xml(content)
    except DocumentTypeError:
        raise InputError(
            f"{path} has a document type (<!DOCTYPE>), which no annotation needs and which "
            "could name other files.",
            "Remove it from the file: what begins with `<!DOCTYPE`, up to its closing `>`.",
        ) from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path} is not a VOC annotation: {error}.", devkit.broken) from None
    if tree.tag != "annotation":
        raise InputError(
            f"{path} is not a VOC annotation: its outermost element is <{tree.tag}>, expected "
            "<annotation>.",
            "Export it in the format Pascal VOC.",
        )
    size = tree.find("size")
    image.width, image.height = _side(size, "width"), _side(size, "height")
    for index, item in enumerate(tree.findall("object"), start=1):
        if (item.findtext("deleted") or "").strip() in _DELETED:
            continue
        name = plain_text(item.findtext("name") or "")
        where = f"{path}: object {index} ({name!r})"
        if name not in numbers:
            raise InputError(
                f"{where}: unknown class, expected one of {', '.join(numbers)}.",
                "Fix the file, or list the classes of your own photographs in "
                f"`prepare.<dataset>.vocabulary` of params.yaml.{did_you_mean(name, numbers)}",
            )
        if _is_difficult(item, where):
            image.difficult.add(numbers[name])
            continue
        image.positive.add(numbers[name])
        corners = item.find("bndbox")
        x0, y0, x1, y1 = (_pixel(corners, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
        image.exchanged |= x0 > x1 or y0 > y1
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        image.objects.append((numbers[name] + 1, box))


def _side(size: ElementTree.Element | None, tag: str) -> int | None:
    """The width or height in a child of the element <size>; None if it is not a size."""
    try:
        value = float((size.findtext(tag) if size is not None else None) or "")
    except ValueError:
        return None
    return int(value) if value.is_integer() and 0 < value < 2**31 else None


def _is_difficult(item: ElementTree.Element, where: str) -> bool:
    text = item.findtext("difficult")
    word = (text or "").strip().lower()
    if word in _NOT_DIFFICULT or word in _DIFFICULT:
        return word in _DIFFICULT
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if value not in (0, 1):
        raise InputError(f"{where}: <difficult> is {text!r}, expected 0 or 1.", _FIX_FILE)
    return bool(value)


def _pixel(corners: ElementTree.Element | None, tag: str, where: str) -> float:
    """A coordinate of a box; nan if the object has no box.

    Raises:
        InputError: it is not a number, or the box lacks it.
    """
    if corners is None or not len(corners):
        return math.nan
    text = corners.findtext(tag)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"{where}, <bndbox>: <{tag}> is {text!r}, expected a number of pixels.",
            "Fix the file, or remove <bndbox> to keep the object as a label without a box.",
        )
    return value
