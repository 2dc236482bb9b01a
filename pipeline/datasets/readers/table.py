"""Any data set from one table with one row per image. This is how users bring their own.

The file is CSV (UTF-8, with or without a byte order mark; with a header; commas between cells;
quotes as in RFC 4180) or Parquet, by the suffix of its name. The settings name three of its
columns, and others are ignored:

- the image's path, relative to the folder ``images`` of the settings or, without one, to
  data/<dataset>/, with forward slashes. Without a leading ``./``, it is also the image's id;
- its labels: text with a separator between labels or, in Parquet, a list of texts. Blanks around a
  label are removed. An empty cell, or null, is an image without labels. An empty part, as in
  ``cat;;dog``, is an error, because a label may have been lost there. A label that a cell repeats,
  as in exports with one label per object, counts once;
- its split: ``train``, ``test`` or, for images that validate each training, ``val``. A table
  without this column is split by the setting ``test_share``.

The vocabulary is that of the settings or, without one, all labels of the table, sorted by code
point.

Letters: N rows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.listing import Listing, hash_sources
from pipeline.datasets.manifest import Split
from pipeline.datasets.readers.rows import (
    Rows,
    check_paths,
    encode_labels,
    join_folder,
    listing_table,
    parse_splits,
    read_csv,
    read_parquet,
)
from pipeline.errors import InputError
from pipeline.settings import TableSettings

_SPLIT_WORDS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}


def read_table(root: Path, settings: TableSettings) -> Listing:
    """List the images of a table below ``root``, which is data/<dataset>/.

    Raises:
        MissingError: the table does not exist.
        InputError: it can't be read, lacks a column, or breaks a rule of the module's docstring;
            names the file, and the line (CSV) or the row counted from 0 (Parquet).
    """
    file = root / settings.file
    block = f"prepare.{root.name}"
    names = {"image": settings.image, "labels": settings.labels}
    hints = {}
    if settings.test_share is None:
        names["split"] = settings.split
        hints[settings.split] = (
            f" Without such a column, set `{block}.test_share: 0.2` to make a fifth of the images "
            "the test split."
        )
    remedy = f"Put the table there, or set `{block}.file` in params.yaml to its path below {root}."
    if file.suffix == ".csv":
        rows = read_csv(file, names, remedy, hints, block)
    elif file.suffix == ".parquet":
        rows = read_parquet(file, names, remedy, hints, block)
    else:
        raise InputError(
            f"{file}: the suffix is {file.suffix!r}, expected .csv or .parquet.",
            "Save the table in one of these formats, with its suffix.",
        )
    if settings.test_share is not None and settings.split in rows.header:
        raise InputError(
            f"{file} has a column {settings.split!r}, but `{block}.test_share` in params.yaml asks "
            "for another split.",
            "Remove one of the two.",
        )
    labels = rows.table.column("labels")
    if pa.types.is_string(labels.type):
        cells = pc.utf8_trim_whitespace(labels)
        cells = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
        labels = pc.split_pattern(cells, settings.separator)
    images = pc.replace_substring_regex(rows.table.column("image"), r"^(\./)+", "")
    check_paths(images, rows.where)
    vocabulary, numbers = encode_labels(
        labels, settings.vocabulary, rows.where, f"`{block}.vocabulary` of params.yaml"
    )
    return Listing(
        vocabulary=vocabulary,
        split_name=settings.split_name,
        sources=hash_sources(root, [settings.file]),
        table=listing_table(
            images, join_folder(settings.images, images), _splits(images, rows, settings), numbers
        ),
    )


def _splits(images: pa.ChunkedArray, rows: Rows, settings: TableSettings) -> pa.ChunkedArray:
    """The split of each of N images: the table's, or by `hash_fraction`."""
    if settings.test_share is None:
        return parse_splits(rows.table.column("split"), _SPLIT_WORDS, rows.where)
    tests = [hash_fraction(path) < settings.test_share for path in images.to_pylist()]
    if all(tests) or not any(tests):
        raise InputError(
            f"{rows.file}: with `test_share: {settings.test_share}`, {sum(tests)} of {len(tests)} "
            "images are in the test split. Expected some in each split.",
            f"Change it, or add a column {settings.split!r} with `train` or `test` in each row.",
        )
    return pa.chunked_array([["test" if test else "train" for test in tests]])


def hash_fraction(path: str) -> float:
    """A number in [0,1), uniform over paths: the first 8 bytes of sha256 as a fraction."""
    digest = hashlib.sha256(path.encode()).digest()
    # A float has 53 bits: with all 64, the largest fraction would be rounded to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
