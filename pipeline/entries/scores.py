"""A model's scores in a file: a column `image_id`, and a column per label with its scores.

The file is CSV (a comma between cells, a point in numbers), TSV or Parquet. Its rows and columns
may be in any order. Rows of other images and columns of other names are left out, with a note.

Letters: N images, C labels.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError, briefly
from pipeline.files import open_regular, raise_if_refused
from pipeline.formats.text import counted, first_few

IMAGE = "image_id"
"""The column of the images' ids."""

_FARTHEST = 1000.0
"""The logits of the probabilities 0 and 1 are minus and plus this. Those of all other numbers in
float64 are between -745 and 37."""


@dataclass(frozen=True)
class ScoreTable:
    """The scores in a file.

    Attributes:
        file: the file.
        image_ids: N.
        labels: C.
        scores: (N, C) float64, finite, also as float32.
        notes: sentences on what was left out, and on scores that say nothing.
    """

    file: Path
    image_ids: Sequence[str]
    labels: Sequence[str]
    scores: NDArray[np.float64]
    notes: Sequence[str]

    def logits_of_probabilities(self) -> NDArray[np.float64]:
        """The logits (N, C) of scores that are probabilities.

        Raises:
            InputError: a score is not in [0, 1].
        """
        outside = (self.scores < 0) | (self.scores > 1)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise InputError(
                f"{self.file}, image {self.image_ids[row]!r}: the score of "
                f"{self.labels[column]!r} is {self.scores[row, column]:g}, expected a probability "
                f"from 0 to 1; {counted(int(outside.sum()), 'score')} of {outside.size:,} "
                f"{'is' if outside.sum() == 1 else 'are'} outside."
            )
        with np.errstate(divide="ignore"):
            logits = np.log(self.scores) - np.log1p(-self.scores)
        return logits.clip(-_FARTHEST, _FARTHEST)


def read_scores(file: Path, labels: Sequence[str], image_ids: Sequence[str]) -> ScoreTable:
    """Read the scores of some images for all labels of a data set.

    Args:
        file: a name that ends in .csv, .tsv or .parquet.
        labels: C, all of which must have a column.
        image_ids: N, all of which must have a row.

    Raises:
        InputError: a label or an image is missing or there twice, or a score is no finite number;
            names the first few.
        OSError: the file can't be read.
    """
    table = _read_table(file)
    _check_columns(file, table.column_names, labels)
    ids = _ids(file, table)
    rows = {image_id: row for row, image_id in enumerate(ids)}
    _check_images(file, ids, rows, image_ids)
    table = table.take([rows[image_id] for image_id in image_ids])
    columns = [_numbers(file, label, table.column(label), image_ids) for label in labels]
    scores = np.stack(columns, axis=1)
    notes = []
    if more := len(ids) - len(image_ids):
        notes.append(f"{file}: {counted(more, 'row')} of other images left out.")
    if others := [name for name in table.column_names if name not in {IMAGE, *labels}]:
        notes.append(f"{file}: columns that are no labels left out: {_listed(others)}.")
    if len(scores) > 1 and (constant := np.ptp(scores, axis=0) == 0).any():
        names = [label for label, one in zip(labels, constant, strict=True) if one]
        notes.append(
            f"{file}: all images have the same score for {_listed(names)}, so the AP of such a "
            "label is its share of positives."
        )
    return ScoreTable(file, image_ids, labels, scores, notes)


def _read_table(file: Path) -> pa.Table:
    """Read the whole file. Ids in CSV stay texts; other columns get the type they look like."""
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise InputError(
            f"{file}: expected a name that ends in .csv, .tsv or .parquet, found {suffix!r}.",
            "Save the scores in one of these formats.",
        )
    try:
        with open_regular(file) as stream:
            if suffix == ".parquet":
                return pq.ParquetFile(stream).read()
            return pacsv.read_csv(
                stream,
                parse_options=pacsv.ParseOptions(delimiter="," if suffix == ".csv" else "\t"),
                convert_options=pacsv.ConvertOptions(column_types={IMAGE: pa.string()}),
            )
    except FileNotFoundError:
        raise InputError(f"There is no file {file}.", "Check its path.") from None
    except (OSError, pa.ArrowException) as error:
        raise_if_refused(error, file)
        raise InputError(
            f"{file} can't be read: {briefly(error)}.", "Write the file again, as CSV or Parquet."
        ) from error


def _check_columns(file: Path, names: Sequence[str], labels: Sequence[str]) -> None:
    found = Counter(names)
    wanted = (IMAGE, *labels)
    missing = [name for name in wanted if name not in found]
    if missing:
        others = [name for name in found if name not in wanted]
        raise InputError(
            f"{file}: the columns of {_listed(missing)} are missing. It has "
            f"{_listed(list(found))}.{_perhaps(missing[0], others)}",
            f"Name the columns `{IMAGE}` and exactly as the labels of the data set, with a comma "
            "between names in CSV.",
        )
    if twice := [name for name in wanted if found[name] > 1]:
        raise InputError(
            f"{file}: there are several columns of {_listed(twice)}, expected one of each.",
            "Remove or rename the others.",
        )


def _perhaps(label: str, names: Sequence[str]) -> str:
    """A sentence, after a blank, with the name that may be meant; empty if none is like it."""
    plain = {"".join(filter(str.isalnum, name)).casefold(): name for name in names}
    sought = "".join(filter(str.isalnum, label)).casefold()
    close = difflib.get_close_matches(sought, plain, n=1)
    return f" Is {plain[close[0]]!r} the column of {label!r}?" if close else ""


def _ids(file: Path, table: pa.Table) -> list[str]:
    column = table.column(IMAGE)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not is_text and not pa.types.is_integer(kind):
        raise InputError(
            f"{file}: the column `{IMAGE}` has the type {column.type}, expected text.",
            "Write the ids as text.",
        )
    ids: list[str] = pc.fill_null(column.cast(kind).cast(pa.string()), "").to_pylist()
    return ids


def _check_images(
    file: Path, ids: Sequence[str], rows: dict[str, int], image_ids: Sequence[str]
) -> None:
    if len(rows) < len(ids):
        twice = [image_id for image_id, count in Counter(ids).items() if count > 1]
        raise InputError(
            f"{file}: there are several rows of {_listed(twice)}, expected one of each image.",
            "Remove the others.",
        )
    if missing := [image_id for image_id in image_ids if image_id not in rows]:
        # As programs change ids: numbers lose their zeros, and files their suffix.
        plain = {Path(image_id).stem.lstrip("0"): image_id for image_id in ids}
        like = plain.get(Path(missing[0]).stem.lstrip("0"))
        perhaps = f" Is {like!r} the row of {missing[0]!r}?" if like is not None else ""
        raise InputError(
            f"{file}: {counted(len(missing), 'test image')} of {len(image_ids):,} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {_listed(missing)}.{perhaps}",
            f"Score all images of the test split, and write their ids into the column `{IMAGE}` "
            "exactly as the data set has them.",
        )


def _numbers(
    file: Path, label: str, column: pa.ChunkedArray, image_ids: Sequence[str]
) -> NDArray[np.float64]:
    """(N,) float64, finite."""
    try:
        numbers = np.asarray(column.cast(pa.float64()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        numbers = np.array([_number(value) for value in column.to_pylist()])
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))  # as predictions are stored
    if len(bad):
        found = column[int(bad[0])].as_py()
        raise InputError(
            f"{file}, image {image_ids[bad[0]]!r}: the score of {label!r} is "
            f"{'missing' if found is None else repr(found)}, expected a finite number. "
            f"{counted(len(bad), 'score')} of this label can't be used.",
            "Write a number with a decimal point for every image.",
        )
    return numbers.astype(np.float64)


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("nan")


def _listed(names: Sequence[str]) -> str:
    return first_few([repr(name) for name in names])
