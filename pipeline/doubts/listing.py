"""The list of a data set's doubtful labels, as Parquet for the page and as CSV for other programs.

`DoubtList.table` has a row for each doubtful label of an image, the most doubtful first:

    image_id, path, split  as in the manifest
    label                  its name
    given                  `present` or `absent`: what the data set says
    score                  probability that the label is present, by networks that were not trained
                           on the image
    duplicate_of           ids of the other images whose files have the same content

The CSV has `rank`, from 1, as a further column, and the ids of `duplicate_of` with blanks between
them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.manifest import Manifest
from pipeline.doubts.ranking import Entries
from pipeline.errors import DamagedError
from pipeline.files import replacing
from pipeline.formats.sealed import read_sealed_table, write_sealed_table
from pipeline.formats.text import csv_cell, storable

Given = Literal["present", "absent"]

COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("given", pa.string()),
        ("score", pa.float32()),
        ("duplicate_of", pa.list_(pa.string())),
    ]
)
_CSV = ("image_id", "path", "split", "label", "given", "score", "rank", "duplicate_of")


@dataclass(frozen=True)
class DoubtList:
    """The doubtful labels of a data set, and what they were found with.

    Attributes:
        dataset, variant, seed, folds: of the trainings.
        key: hex sha256 over all that decides the list.
        fingerprint: of the regions.
        train_sha256, test_sha256: of the manifest.
        judged: how many labels of images were judged, of all images together.
        not_judged: names of the labels that were not, because too few images have or lack them.
        across: groups of ids of images in different splits whose files have the same content.
        table: the rows, with the columns of `COLUMNS`.
    """

    dataset: str
    variant: str
    seed: int
    folds: int
    key: str
    fingerprint: str
    train_sha256: str
    test_sha256: str
    judged: int
    not_judged: list[str]
    across: list[list[str]]
    table: pa.Table = field(repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def of(self, given: Given, top: int) -> list[dict[str, Any]]:
        """The first ``top`` rows of one kind as dicts, with their `rank` in the whole list."""
        ranked = self.table.append_column("rank", pa.array(np.arange(1, len(self) + 1)))
        rows = ranked.filter(pc.equal(ranked.column("given"), given)).slice(0, top).to_pylist()
        return [dict(row) for row in rows]

    def count(self, given: Given) -> int:
        """How many rows are of one kind."""
        return int(pc.sum(pc.equal(self.table.column("given"), given)).as_py() or 0)


_ABOUT = [one.name for one in fields(DoubtList) if one.name != "table"]


def doubt_table(
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    copies: Mapping[str, Sequence[str]],
    scores: npt.NDArray[np.floating[Any]],
    truth: npt.NDArray[np.int8],
    entries: Entries,
) -> pa.Table:
    """Make `DoubtList.table`.

    Args:
        rows: of the manifest, N images.
        labels: C names.
        copies: image id -> the ids of its duplicates.
        scores, truth: (N, C), probabilities of presence, and what is given.
        entries: to list, in this order.
    """
    chosen = [rows[image] for image in entries[0].tolist()]
    columns: dict[str, Any] = {
        name: [row[name] for row in chosen] for name in ("image_id", "path", "split")
    }
    columns |= {
        "label": [labels[label] for label in entries[1].tolist()],
        "given": np.where(truth[entries] == 1, "present", "absent").tolist(),
        "score": scores[entries].astype(np.float32),
        "duplicate_of": [list(copies.get(row["image_id"], ())) for row in chosen],
    }
    return pa.table(columns, schema=COLUMNS)


def copies_of(groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Image id -> the ids of the other images of its group."""
    return {one: [other for other in group if other != one] for group in groups for one in group}


def across_splits(groups: Sequence[Sequence[str]], manifest: Manifest) -> list[list[str]]:
    """The groups whose images lie in more than one split."""
    columns = (manifest.table.column(name).to_pylist() for name in ("image_id", "split"))
    split_of = dict(zip(*columns, strict=True))
    return [list(group) for group in groups if len({split_of[one] for one in group}) > 1]


def write_doubts(path: Path, doubts: DoubtList) -> None:
    """Write a list as sealed Parquet, whole or not at all."""
    write_sealed_table(path, doubts.table, {name: getattr(doubts, name) for name in _ABOUT})


def read_doubts(path: Path) -> DoubtList:
    """Read what `write_doubts` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: the file was changed, or is not such a list.
    """
    table, about = read_sealed_table(path, COLUMNS)
    if sorted(about) != sorted(_ABOUT):
        raise DamagedError(f"{path} is not a list of doubtful labels.")
    return DoubtList(**about, table=table)


def write_csv(path: Path, doubts: DoubtList) -> None:
    """Write a list as CSV, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_CSV)
        for rank, row in enumerate(doubts.table.to_pylist(), 1):
            cells = {
                **row,
                "score": f"{row['score']:.4f}",
                "rank": str(rank),
                "duplicate_of": " ".join(row["duplicate_of"]),
            }
            writer.writerow([csv_cell(storable(cells[name])) for name in _CSV])
