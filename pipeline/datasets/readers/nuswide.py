"""NUS-WIDE (Chua et al., CIVR 2009): 269,648 Flickr photographs, 81 concepts, in three forms.

Published numbers on NUS-WIDE use different splits and can't be compared across them. The
publisher's lists have 161,789 training and 107,859 test images. More than a fifth of these have
none of the 81 concepts, and some papers leave them out. The photographs are available on request
only, or from Flickr, where many are gone, so others use the images that they could get. The CSV of
the ASL code is split 70 to 30 without unlabelled images [2]. The lists of hashing papers have a
small training list beside a large "database". So the manifest and all metrics state the name of the
split, and how many images are listed, missing and unlabelled.

Form ``official``, split name ``official``. The archives ImageList.zip, Groundtruth.zip and
ConceptsList.zip of the publisher [1], and the photographs:

    data/nuswide/
        ImageList/TrainImagelist.txt            one image per line, as `actor\\0002_174174086.jpg`
        ImageList/TestImagelist.txt
        Groundtruth/TrainTestLabels/Labels_<concept>_Train.txt      0 or 1 per line, in that order
        Groundtruth/TrainTestLabels/Labels_<concept>_Test.txt
        Concepts81.txt                          one concept per line: the vocabulary, in order
        Flickr/actor/0002_174174086.jpg         the setting `images` names this folder

Form ``csv``, split name ``csv``. One file that came with the code of ASL and that the code of
Query2Label and others reads, here nus_wid_data.csv (setting `file`):

    filepath,label,split_name
    0000_2124494179.jpg,"['clouds', 'sky']",train

`split_name` is ``train`` or ``val``; ``val`` is the test split. `filepath` is relative to the
folder `images`; set `images: .` if it starts with the folder itself. Without Concepts81.txt, the
vocabulary is the 81 labels of the file in alphabetical order, which is the order of Concepts81.txt.

Form ``multi-hot``, split name ``multi-hot``. Two lists in the form of HashNet's (settings
`train_list`, `test_list`; compressed if the name ends in .gz), and Concepts81.txt for the names of
the columns:

    ./data/nuswide_81/images/8228_2275882321_a4bf6754ba_m.jpg 0 0 1 0 ...       81 times 0 or 1

The last part of the path is the name of the image in the folder `images`.

The id of an image is its listed path below the folder `images`, with forward slashes:
`actor/0002_174174086.jpg` or `8228_2275882321_a4bf6754ba_m.jpg`. It does not change when the folder
moves.

Letters: N images, C = 81 concepts.

[1] https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html
[2] https://github.com/Alibaba-MIIL/ASL/issues/20
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.listing import Listing, hash_sources, read_lines, read_source
from pipeline.datasets.manifest import REQUIRED_SPLITS, Split
from pipeline.datasets.readers.cells import encode_labels
from pipeline.datasets.readers.rows import (
    check_once,
    check_paths,
    first_true,
    join_folder,
    label_lists,
    listing_table,
    parse_splits,
    read_csv,
)
from pipeline.datasets.readers.text import FIX_FILE, text_lines
from pipeline.errors import InputError
from pipeline.formats.encodings import plain_text
from pipeline.settings import NuswideSettings

CONCEPTS = 81

_LISTS: dict[Split, str] = {
    "train": "ImageList/TrainImagelist.txt",
    "test": "ImageList/TestImagelist.txt",
}
_LABELS = "Groundtruth/TrainTestLabels"
_FLAGS = frozenset("01")
_QUOTED = r"""('[^'"]+'|"[^'"]+")"""
_LABEL_LIST = rf"^\[({_QUOTED}(\s*,\s*{_QUOTED})*)?\]$"  # a list of names as Python prints it


def read_nuswide(root: Path, settings: NuswideSettings) -> Listing:
    """List NUS-WIDE below ``root``, which is data/<dataset>/.

    Raises:
        MissingError: a file does not exist; says where to put it and which archive has it.
        InputError: a file breaks its format; names the file and the line.
    """
    read: dict[str, Callable[[Path, NuswideSettings], Listing]] = {
        "official": _read_official,
        "csv": _read_csv,
        "multi-hot": _read_multi_hot,
    }
    return read[settings.form](root, settings)


@dataclass(frozen=True)
class _Split:
    """The N images of one split.

    Attributes:
        file: the list of images.
        lines: the line of each image in the list, from 1.
        images: the image ids.
        positive: (N, C) bool.
    """

    file: Path
    lines: Sequence[int]
    images: list[str]
    positive: np.ndarray = field(repr=False)


# --- official ------------------------------------------------------------------------------------


def _read_official(root: Path, settings: NuswideSettings) -> Listing:
    concepts = _read_concepts(root, settings)
    splits = {}
    for split in REQUIRED_SPLITS:
        file = root / _LISTS[split]
        lines = read_lines(file, _unpack("ImageList.zip", root))
        folder = root / _LABELS
        columns = [
            _read_column(folder / f"Labels_{concept}_{split.title()}.txt", file, len(lines), root)
            for concept in concepts
        ]
        splits[split] = _Split(
            file=file,
            lines=[number for number, _ in lines],
            images=[line.replace("\\", "/") for _, line in lines],
            positive=np.stack(columns, axis=1),
        )
    sources = hash_sources(root, [*_LISTS.values(), _LABELS, settings.concepts])
    return _listing(*_join(splits), concepts, settings, sources)


def _read_concepts(root: Path, settings: NuswideSettings) -> tuple[str, ...]:
    """The 81 concepts, in order."""
    file = root / settings.concepts
    remedy = (
        f"The file is in the publisher's ConceptsList.zip: put it there, or set "
        f"`prepare.{root.name}.concepts` in params.yaml to its path below {root}."
    )
    concepts = tuple(plain_text(line) for _, line in read_lines(file, remedy))
    if len(set(concepts)) != CONCEPTS or len(concepts) != CONCEPTS:
        raise InputError(
            f"{file} has {len(concepts)} concepts, {len(set(concepts))} of them different, "
            f"expected {CONCEPTS}.",
            remedy,
        )
    return concepts


def _read_column(file: Path, images: Path, count: int, root: Path) -> np.ndarray:
    """(N,) bool: the labels of one concept for the ``count`` images in the list ``images``."""
    content = read_source(file, _unpack("Groundtruth.zip", root))
    text = content.removeprefix(BOM_UTF8).translate(None, b" \t\r").rstrip(b"\n")
    cells = np.frombuffer(text + b"\n", dtype=np.uint8)
    if len(cells) == 2 * count:
        digits, ends = cells.reshape(count, 2).T
        if (ends == ord("\n")).all() and ((digits == ord("0")) | (digits == ord("1"))).all():
            return np.equal(digits, ord("1"))
    lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line not in (b"0", b"1"):
            raise InputError(
                f"{file}, line {number}: found {line.decode(errors='replace')!r}, expected 0 or 1.",
                FIX_FILE,
            )
    raise InputError(
        f"{file} has {len(lines)} lines, expected {count}, one per image in {images}. One of the "
        "two files is damaged.",
        "Unpack the publisher's ImageList.zip and Groundtruth.zip again.",
    )


def _unpack(archive: str, root: Path) -> str:
    return f"The file is in the publisher's {archive}: unpack that in {root}."


# --- multi-hot -----------------------------------------------------------------------------------


def _read_multi_hot(root: Path, settings: NuswideSettings) -> Listing:
    concepts = _read_concepts(root, settings)
    names: dict[Split, str] = {"train": settings.train_list, "test": settings.test_list}
    splits = {split: _read_list(root / name, split, root) for split, name in names.items()}
    sources = hash_sources(root, [*names.values(), settings.concepts])
    return _listing(*_join(splits), concepts, settings, sources)


def _read_list(file: Path, split: Split, root: Path) -> _Split:
    remedy = (
        f"Put the list there, or set `prepare.{root.name}.{split}_list` in params.yaml to its "
        f"path below {root}."
    )
    lines, images, flags = [], [], []
    for number, line in enumerate(text_lines(file, remedy), 1):
        if not line.strip():
            continue
        path, *columns = line.split()
        if len(columns) != CONCEPTS or not _FLAGS.issuperset(columns):
            other = [column for column in columns if column not in _FLAGS]
            raise InputError(
                f"{file}, line {number}: found {len(columns)} columns after the path"
                f"{f', one of them {other[0]!r}' if other else ''}, expected {CONCEPTS}, each 0 "
                "or 1.",
                FIX_FILE,
            )
        lines.append(number)
        images.append(path.replace("\\", "/").rpartition("/")[2])
        flags.append("".join(columns))
    digits = np.frombuffer("".join(flags).encode(), dtype=np.uint8)
    return _Split(file, lines, images, digits.reshape(-1, CONCEPTS) == ord("1"))


# --- csv -----------------------------------------------------------------------------------------


def _read_csv(root: Path, settings: NuswideSettings) -> Listing:
    file = root / settings.file
    rows = read_csv(
        file,
        {"image": "filepath", "labels": "label", "split": "split_name"},
        f"Put the file there, or set `prepare.{root.name}.file` in params.yaml to its path below "
        f"{root}.",
    )
    images = pc.replace_substring_regex(rows.table.column("image"), r"^(\./)+", "")
    check_paths(images, rows.where)
    check_once(images, rows.where)
    cells = rows.table.column("labels")
    row = first_true(pc.invert(pc.match_substring_regex(cells, _LABEL_LIST)))
    if row is not None:
        raise InputError(
            f"{rows.where(row)}: the labels are {cells[row].as_py()!r}, expected a list such as "
            "['clouds', 'sky'] or [].",
            FIX_FILE,
        )
    inner = pc.replace_substring_regex(cells, r"""^\[['"]?|['"]?\]$""", "")
    inner = pc.if_else(pc.equal(inner, ""), pa.scalar(None, pa.string()), inner)
    labels = pc.split_pattern_regex(inner, r"""['"]\s*,\s*['"]""")
    names = [settings.file]
    vocabulary = None
    if (root / settings.concepts).exists():
        vocabulary = _read_concepts(root, settings)
        names.append(settings.concepts)
    concepts, numbers = encode_labels(labels, vocabulary, rows.where, str(root / settings.concepts))
    if len(concepts) != CONCEPTS:
        raise InputError(
            f"{file} has {len(concepts)} different labels, expected {CONCEPTS}.",
            "Put Concepts81.txt of the publisher's ConceptsList.zip at "
            f"{root / settings.concepts}. A file with fewer labels is then valid, and of a file "
            "with more, an unknown label is named.",
        )
    splits = parse_splits(rows.table.column("split"), {"train": "train", "val": "test"}, rows.where)
    return _listing(images, splits, numbers, concepts, settings, hash_sources(root, names))


# --- all forms -----------------------------------------------------------------------------------


def _join(splits: Mapping[Split, _Split]) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ListArray]:
    """Image ids, splits and label numbers of all N images, none of which may be listed twice."""
    train, test = (splits[split] for split in REQUIRED_SPLITS)

    def where(row: int) -> str:
        part, row = (train, row) if row < len(train.images) else (test, row - len(train.images))
        return f"{part.file}, line {part.lines[row]}"

    images = pa.chunked_array([train.images, test.images], pa.string())
    check_paths(images, where)
    check_once(images, where)
    names = np.repeat(REQUIRED_SPLITS, [len(train.images), len(test.images)])
    rows, numbers = np.nonzero(np.concatenate([train.positive, test.positive]))
    return images, pa.chunked_array([names]), label_lists(rows, numbers, len(images))


def _listing(
    images: pa.ChunkedArray,
    splits: pa.ChunkedArray,
    labels: pa.ListArray,
    concepts: tuple[str, ...],
    settings: NuswideSettings,
    sources: dict[str, str],
) -> Listing:
    return Listing(
        vocabulary=concepts,
        split_name=settings.split_name or settings.form,
        sources=sources,
        table=listing_table(images, join_folder(settings.images, images), splits, labels),
    )
