"""The images of a cache that have no regions: `failures.parquet` beside its index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.errors import DamagedError, advising
from pipeline.formats.sealed import read_sealed_table, write_sealed_table

FAILURES_NAME = "failures.parquet"

_COLUMNS = pa.schema([("image_id", pa.string()), ("path", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True, order=True)
class Failure:
    """An image that has no regions, for instance since it can't be decoded."""

    image_id: str
    path: str
    """Relative to the data set's root."""
    reason: str


def write_failures(folder: Path, failures: Iterable[Failure]) -> list[Failure]:
    """Write the first failure of each image, ordered by image id. Without any, remove the file.

    Returns:
        what was written.
    """
    by_image: dict[str, Failure] = {}
    for failure in sorted(failures):
        by_image.setdefault(failure.image_id, failure)
    path = folder / FAILURES_NAME
    if not by_image:
        path.unlink(missing_ok=True)
        return []
    columns = [list(column) for column in zip(*map(astuple, by_image.values()), strict=True)]
    write_sealed_table(path, pa.table(columns, schema=_COLUMNS), {})
    return list(by_image.values())


def read_failures(folder: Path) -> dict[str, Failure]:
    """Read the failures of a cache by image id; empty if there is no such file.

    Raises:
        DamagedError: the file was changed.
    """
    path = folder / FAILURES_NAME
    try:
        with advising("Delete it, and write the regions again.", DamagedError):
            table, _ = read_sealed_table(path, _COLUMNS)
    except FileNotFoundError:
        return {}
    return {row["image_id"]: Failure(**row) for row in table.to_pylist()}
