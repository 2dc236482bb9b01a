"""The manifest: what a data set is, one row per image; and the boxes that some data sets have.

Letters: N images, C labels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.difficult import treated
from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.files import canonical_json
from pipeline.formats.sealed import read_sealed_table, write_sealed_table
from pipeline.settings import DifficultSettings, Treatment

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""All splits, in their order. A manifest always has images of `train` and of `test`. Those of
`val`, if there are any, validate a training: nobody trains on them, and no result is of them."""
REQUIRED_SPLITS: tuple[Split, ...] = ("train", "test")

MANIFEST_VERSION = 4
_ALL_IGNORED_VERSION = 3
"""The version of manifests whose difficult labels are ignored in all splits. They lack the key
`difficult`, and are the same in all else, so that earlier versions of gmpipe read them."""

COUNTS = ("listed", "missing", "unlabelled", "images")
"""The keys of `Manifest.counts` in each split."""

_FIX_SOURCE = "Fix the files that the data set is read from, then prepare it again."

_BOX_COLUMNS = pa.schema(
    {"image_id": pa.string(), "class": pa.int16(), "box": pa.list_(pa.float32(), 4)}
)

# A path that leads outside the root: empty, absolute, with a part `..`, or with a backslash.
_OUTSIDE = r"^$|^/|(^|/)\.\.(/|$)|\\"

COLUMNS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.int16()), nullable=False),
        pa.field("ignored", pa.list_(pa.int16()), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)
"""The columns of `Manifest.table`."""


@dataclass(frozen=True)
class Manifest:
    """The images of a data set with their splits and labels, checked on construction.

    Attributes:
        dataset: its name in params.yaml.
        split_name: name of the division into train and test, e.g. ``official``.
        vocabulary: the C label names. The number of a label is its index in this tuple.
        sources: what the manifest was made from: file (or ``settings``) -> sha256.
        counts: per split that the source has, how many images it lists (``listed``), how many of
            them have no file and are left out (``missing``), how many of the others have neither a
            positive nor a difficult label (``unlabelled``), and how many rows there are
            (``images``): all that are not missing, without the unlabelled where the settings leave
            those out.
        table: the N rows, with the columns of `COLUMNS`: ``image_id`` unique; ``path`` relative
            to the data set's root, with forward slashes; ``split`` train, val or test; ``labels``
            the numbers of the positive labels; ``ignored`` the numbers of the difficult labels,
            which the source gives as neither positive nor negative; ``width`` and ``height`` in
            pixels of the upright picture, null where they are not known.
        notes: sentences on what was read in a way that could be wrong.
        difficult: what the difficult labels of each split count as. `rows` and all that is made
            from it, such as the truth and the hashes, have them treated; `table` and `counts` don't
            depend on it, so that neither the images nor their regions do.

    Raises:
        InputError: something contradicts the above; names the first row with its image id.
    """

    dataset: str
    split_name: str
    vocabulary: tuple[str, ...]
    sources: dict[str, str]
    counts: dict[str, dict[str, int]]
    table: pa.Table = field(repr=False)
    notes: tuple[str, ...] = ()
    difficult: DifficultSettings = field(default_factory=DifficultSettings)

    def __post_init__(self) -> None:
        if not self.vocabulary or len(set(self.vocabulary)) != len(self.vocabulary):
            raise InputError(
                f"Manifest of {self.dataset}: the vocabulary is {list(self.vocabulary)}, expected "
                "at least one label, and each only once.",
                _FIX_SOURCE,
            )
        if not self.table.schema.equals(COLUMNS):
            raise InputError(
                f"Manifest of {self.dataset}: expected the columns\n{COLUMNS}\nfound\n"
                f"{self.table.schema.remove_metadata()}\n",
                _FIX_SOURCE,
            )
        self._check_rows()
        self._check_counts()

    def _check_rows(self) -> None:
        valid = self._valid_rows()
        if not valid.all():
            row = int(valid.argmin())
            raise InputError(
                f"Manifest of {self.dataset}, row {row} "
                f"({self.table.column('image_id')[row].as_py()!r}): {self._row_problem(row)}.",
                _FIX_SOURCE,
            )
        for split in REQUIRED_SPLITS:
            if not pc.any(pc.equal(self.table.column("split"), split)).as_py():
                raise InputError(
                    f"Manifest of {self.dataset}: the split {split!r} has no image.", _FIX_SOURCE
                )

    def _valid_rows(self) -> npt.NDArray[np.bool_]:
        """(N,) bool: which rows have no `_row_problem`, for all rows at once."""
        image_ids, paths, splits, labels, ignored = self.table.columns[:5]
        lists = pc.and_(pc.is_valid(labels), pc.is_valid(ignored))
        named = pc.fill_null(pc.not_equal(image_ids, ""), False)
        inside = pc.invert(pc.fill_null(pc.match_substring_regex(paths, _OUTSIDE), True))
        split = pc.is_in(splits, value_set=pa.array(SPLITS))
        valid: npt.NDArray[np.bool_] = np.logical_and.reduce([named, inside, split, lists])
        codes = np.asarray(
            pc.fill_null(pc.dictionary_encode(image_ids).combine_chunks().indices, -1)
        )
        valid[repeats(codes)] = False
        keys = []
        for column in (labels, ignored):
            rows, numbers = _entries(column)
            unknown = (numbers < 0) | (numbers >= len(self.vocabulary))
            valid[rows[unknown]] = False
            keys.append((rows * len(self.vocabulary) + numbers)[~unknown])
        valid[np.intersect1d(*keys) // len(self.vocabulary)] = False
        return valid

    def _row_problem(self, row: int) -> str:
        """What is wrong with a row that is not valid."""
        image_id, path, split, labels, ignored = (
            self.table.column(name)[row].as_py() for name in COLUMNS.names[:5]
        )
        numbers = range(len(self.vocabulary))
        if not image_id:
            return "the image id is empty"
        first = pc.index(self.table.column("image_id"), image_id).as_py()
        if first < row:
            return f"row {first} has the same image id"
        if not path or re.search(_OUTSIDE, path):
            return (
                f"the path {path!r} leads outside the data set's root, expected a relative path "
                "below it"
            )
        if split not in SPLITS:
            return f"the split is {split!r}, expected one of {SPLITS}"
        if labels is None or ignored is None:
            return "labels or ignored is null, expected a list"
        if unknown := [number for number in (*labels, *ignored) if number not in numbers]:
            return f"unknown label {unknown[0]}, expected numbers from 0 to {len(numbers) - 1}"
        both = set(labels) & set(ignored)
        return f"the label {self.vocabulary[min(both)]!r} is both positive and ignored"

    def _check_counts(self) -> None:
        """Check the counts, after the rows: a wrong count is the least important problem."""
        expected = list(splits_of(self.table))
        if sorted(self.counts) != sorted(expected):
            raise InputError(
                f"Manifest of {self.dataset}: it has counts of the splits {sorted(self.counts)}, "
                f"expected {sorted(expected)}.",
                _FIX_SOURCE,
            )
        for split in self.splits:
            counts = self.counts[split]
            rows = self.rows(split).num_rows
            valid = set(counts) == set(COUNTS) and all(
                type(number) is int and number >= 0 for number in counts.values()
            )
            if valid:
                existing = counts["listed"] - counts["missing"]
                # without and with `drop_unlabelled`
                possible = (existing, existing - counts["unlabelled"])
                valid = counts["images"] == rows and counts["images"] in possible
            if not valid:
                raise InputError(
                    f"Manifest of {self.dataset}: the counts of {split} are {counts}, expected "
                    f"{', '.join(COUNTS)} with {rows} images: those listed without the missing "
                    "and, where they are left out, without the unlabelled.",
                    _FIX_SOURCE,
                )

    def __len__(self) -> int:
        return cast(int, self.table.num_rows)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have images: `train`, `test`, and between them `val`, if it has any."""
        return tuple(split for split in SPLITS if split in self.counts)

    def _listed(self, split: Split) -> pa.Table:
        return self.table.filter(pc.equal(self.table.column("split"), split))

    def rows(self, split: Split) -> pa.Table:
        """The rows of one split, in the manifest's order, with its difficult labels treated.

        They stay in ``ignored``, are moved to ``labels``, or are in neither, as `difficult` says.
        """
        return treated(self._listed(split), getattr(self.difficult, split))

    def image_ids(self, split: Split) -> list[str]:
        """The image ids of one split, in the manifest's order."""
        return cast(list[str], self._listed(split).column("image_id").to_pylist())

    @property
    def difficult_counts(self) -> dict[Split, int]:
        """How many difficult labels the images of each split have together, where they have any."""
        counts = {split: _entries(self._listed(split).column("ignored")) for split in self.splits}
        return {split: len(numbers) for split, (_, numbers) in counts.items() if len(numbers)}

    @property
    def treatments(self) -> Mapping[str, Treatment]:
        """What the difficult labels of each split count as, where its images have any."""
        return {split: getattr(self.difficult, split) for split in self.difficult_counts}

    @property
    def train_sha256(self) -> str:
        """Hex sha256 over all that a training reads: the vocabulary, and the images of `train` and
        of `val` with their labels, in order."""
        return self._labels_sha256(*(split for split in self.splits if split != "test"))

    @property
    def test_sha256(self) -> str:
        """Hex sha256 over the vocabulary and the images of `test` with their labels, in order."""
        return self._labels_sha256("test")

    def _labels_sha256(self, *splits: Split) -> str:
        # The hash of the JSON value [vocabulary, rows, rows...], made in parts to save memory.
        digest = hashlib.sha256(f"[{canonical_json(self.vocabulary)}".encode())
        for split in splits:
            digest.update(b",[")
            rows = self.rows(split).select(["image_id", "labels", "ignored"])
            for number, batch in enumerate(rows.to_batches(max_chunksize=1 << 14)):
                part = canonical_json(batch.to_pylist())[1:-1]
                digest.update(f"{',' if number else ''}{part}".encode())
            digest.update(b"]")
        digest.update(b"]")
        return digest.hexdigest()

    def truth(self, split: Split) -> np.ndarray:
        """The labels of one split as (N, C) int8: 1 positive, 0 negative, -1 ignored."""
        rows = self.rows(split)
        truth = np.zeros((rows.num_rows, len(self.vocabulary)), dtype=np.int8)
        for name, value in (("labels", 1), ("ignored", -1)):
            truth[_entries(rows.column(name))] = value
        return truth


def repeats(codes: np.ndarray) -> npt.NDArray[np.bool_]:
    """Find the rows that repeat an earlier one.

    Args:
        codes: (N,) integers, of a dictionary encoding of the rows: they count up from 0 in order of
            appearance. Null is -1, and repeats.

    Returns:
        (N,) bool.
    """
    # Only a new value is a new maximum.
    found: npt.NDArray[np.bool_] = (
        codes <= np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1]
    )
    return found


def unlabelled_rows(table: pa.Table) -> np.ndarray:
    """(N,) bool: which rows of a manifest's table have neither a positive nor a difficult label."""
    lengths = (pc.list_value_length(table.column(name)) for name in ("labels", "ignored"))
    return np.asarray(pc.equal(pc.add(*lengths), 0), dtype=bool)


def splits_of(table: pa.Table) -> tuple[Split, ...]:
    """The splits of a table's images, in their order; those that every manifest has are included.

    Args:
        table: with the columns of `COLUMNS`.
    """
    found = set(pc.unique(table.column("split")).to_pylist())
    return tuple(split for split in SPLITS if split in found or split in REQUIRED_SPLITS)


def full_counts(table: pa.Table) -> dict[str, dict[str, int]]:
    """`Manifest.counts` of a table from which no image was left out."""
    unlabelled = unlabelled_rows(table)
    counts: dict[str, dict[str, int]] = {}
    for split in splits_of(table):
        rows = np.asarray(pc.equal(table.column("split"), split), dtype=bool)
        listed = int(rows.sum())
        counts[split] = {
            "listed": listed,
            "missing": 0,
            "unlabelled": int((rows & unlabelled).sum()),
            "images": listed,
        }
    return counts


def _entries(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the label number, int64, of every entry of a column of lists; -1 for null."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    numbers = np.asarray(pc.fill_null(pc.list_flatten(lists), -1), dtype=np.int64)
    return np.repeat(np.arange(len(lists)), lengths), numbers


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as sealed Parquet, either completely or not at all.

    Equal manifests give the same bytes.
    """
    all_ignored = manifest.difficult == DifficultSettings()
    about = {
        "version": _ALL_IGNORED_VERSION if all_ignored else MANIFEST_VERSION,
        "dataset": manifest.dataset,
        "split_name": manifest.split_name,
        "vocabulary": manifest.vocabulary,
        "sources": manifest.sources,
        "counts": manifest.counts,
        **({"notes": manifest.notes} if manifest.notes else {}),
        **({} if all_ignored else {"difficult": manifest.difficult.model_dump()}),
    }
    # Parquet calls the entries of lists otherwise: a table that was read has these names.
    write_sealed_table(path, manifest.table.cast(COLUMNS), about)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        MissingError: the file does not exist.
        DamagedError: it was changed, has another version, or contradicts the contract of
            `Manifest`.
    """
    try:
        table, described = read_sealed_table(path, COLUMNS)
    except FileNotFoundError:
        raise MissingError(f"There is no manifest at {path}.") from None
    try:
        version = described["version"]
        if version in (_ALL_IGNORED_VERSION, MANIFEST_VERSION):
            return Manifest(
                dataset=described["dataset"],
                split_name=described["split_name"],
                vocabulary=tuple(described["vocabulary"]),
                sources=described["sources"],
                counts=described["counts"],
                table=table,
                notes=tuple(described.get("notes", ())),
                difficult=DifficultSettings.model_validate(described.get("difficult", {})),
            )
    except InputError as error:  # what is an error of the user's files elsewhere is damage here
        raise DamagedError(f"{path} is damaged. {error.problem}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: the metadata is damaged ({error!r}).") from error
    raise DamagedError(
        f"{path} has version {version} of the manifest's format, expected version "
        f"{MANIFEST_VERSION}."
    )


@dataclass(frozen=True)
class ImageBoxes:
    """The annotated objects of one image. They are needed only to fit a detector.

    Attributes:
        classes: (n,) int64, class numbers from 1; 0 is the detector's background.
        boxes: (n, 4) float32, xyxy in [0,1] of the image.
    """

    classes: np.ndarray
    boxes: np.ndarray


SeenHeader = tuple[int, int, int] | None
"""The stored width and height of a photograph and its EXIF orientation; None if its header can't be
read."""


@dataclass(frozen=True)
class BoxTable:
    """The annotated objects of a data set.

    Attributes:
        classes: their names, number 1 first.
        images: image id -> its objects.
        incomplete: ids of images some of whose objects have no box, or a box whose place in the
            picture is unknown. A detector that is fitted on them learns that there is nothing.
        left_out: path -> what the header of a photograph said whose boxes have no known place in
            it. Another file there may be the one that the boxes were drawn on.
    """

    classes: tuple[str, ...]
    images: dict[str, ImageBoxes]
    incomplete: frozenset[str] = frozenset()
    left_out: Mapping[str, SeenHeader] = field(default_factory=dict)


def write_boxes(path: Path, table: BoxTable) -> None:
    """Write boxes as sealed Parquet, one row per object (``image_id``, ``class``, ``box``).

    The metadata hold the names of the classes and, if there are any, the incomplete images and the
    headers of those whose boxes are left out.
    """
    image_ids: list[str] = []
    for image_id, image in table.images.items():
        image_ids += [image_id] * len(image.classes)
    boxes = np.concatenate(
        [np.empty((0, 4)), *(image.boxes for image in table.images.values())]
    ).astype(np.float32)
    classes = np.concatenate([[], *(image.classes for image in table.images.values())])
    columns = pa.table(
        {
            "image_id": pa.array(image_ids, pa.string()),
            "class": pa.array(classes.astype(np.int16)),
            "box": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
        },
        schema=_BOX_COLUMNS,
    )
    about: dict[str, Any] = {"classes": table.classes}
    if table.incomplete:
        about["incomplete"] = sorted(table.incomplete)
    if table.left_out:
        about["left_out"] = dict(table.left_out)
    write_sealed_table(path, columns, about)


def read_boxes(path: Path, image_ids: Sequence[str]) -> BoxTable:
    """Read the boxes of some images. An image without a row has no boxes.

    Raises:
        MissingError: the data set has no boxes.
        DamagedError: the file was changed, or breaks the format that `write_boxes` writes; names
            the first row.
    """
    try:
        table, about = read_sealed_table(path, _BOX_COLUMNS)
    except FileNotFoundError:
        raise MissingError(
            f"There are no boxes at {path}, and only boxes can fit a detector.",
            "Set `detector.<dataset>.source` in params.yaml to `torchvision` or `file`.",
        ) from None
    if any(column.null_count for column in table.columns):
        raise DamagedError(f"{path}: expected columns without nulls.")
    names = about.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedError(f"{path} does not say which classes its numbers stand for.")
    classes = table.column("class").to_numpy().astype(np.int64)
    boxes = np.asarray(table.column("box").combine_chunks().flatten(), dtype=np.float32)
    boxes = boxes.reshape(-1, 4)
    valid = (
        (classes >= 1)
        & (classes <= len(names))
        & (boxes >= 0).all(1)
        & (boxes <= 1).all(1)
        & (boxes[:, 2:] > boxes[:, :2]).all(1)
    )
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise DamagedError(
            f"{path}, row {row}: class {classes[row]} with the box {boxes[row].tolist()}, expected "
            f"a class in 1..{len(names)}, and x0 < x1 and y0 < y1 in [0,1]."
        )
    rows: dict[str, list[int]] = {image_id: [] for image_id in image_ids}
    for row, image_id in enumerate(table.column("image_id").to_pylist()):
        if image_id in rows:
            rows[image_id].append(row)
    return BoxTable(
        classes=tuple(names),
        images={key: ImageBoxes(classes[index], boxes[index]) for key, index in rows.items()},
        incomplete=frozenset(about.get("incomplete", ())),
        left_out={
            key: None if header is None else tuple(header)
            for key, header in about.get("left_out", {}).items()
        },
    )
