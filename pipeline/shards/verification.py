"""Every damage of a cache by name, and the rows of a damaged shard that are sound.

Letters: R rows of a shard, N rows of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedError, GmpipeError, MismatchError
from pipeline.files import exists, sha256_file
from pipeline.machine import cores
from pipeline.shards.index import INDEX_NAME, Index, check_listed
from pipeline.shards.schema import (
    Recipe,
    RegionRows,
    check_same_recipe,
    row_checksums,
    without_images,
)
from pipeline.shards.shard import map_shard, whole_shards, write_shard

Kind = Literal[
    "missing", "inaccessible", "unreadable", "foreign", "file", "row", "index", "unlisted"
]
"""What is wrong with a shard:

- `missing`: the index lists it, but there is no such file;
- `inaccessible`: the system can't read the file, for instance since this user may not; its content
  may be sound;
- `unreadable`: its header breaks the format;
- `foreign`: it was made with other settings or of other images than the index says;
- `file`: the sha256 of its bytes is not the one in the index;
- `row`: a row's checksum or contents are wrong;
- `index`: the index lists another image for a sound row, or does not list the row exactly once;
- `unlisted`: the file exists, but the index does not list it.
"""

_BLOCK = 64
"""Rows checked together: enough to make each step cheap, few enough to take little memory."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a shard or one of its rows."""

    shard: str
    """File name."""
    kind: Kind
    found: str
    expected: str
    row: int | None = None
    """Number of the row in its shard; None for the shard as a whole."""
    image_id: str | None = None
    """Of that row, as the index lists it; as the shard has it if the index lacks the row."""
    view: int | None = None

    def __str__(self) -> str:
        """One line for the user."""
        where = ""
        if self.row is not None:
            where = f" row {self.row} (image {self.image_id!r}, view {self.view}):"
        return f"{self.shard}:{where} found {self.found}; expected {self.expected}."


def verify_cache(
    folder: Path, index: Index | None, on_shard: Callable[[str], None] = lambda name: None
) -> list[Damage]:
    """Find all damages of the shards in ``folder``, shard by shard; none if it is sound.

    Every file is read once from disk. Threads share the shards among them.

    Args:
        folder: of the shards.
        index: of the folder; None if it is missing or damaged: the shards are then checked alone.
        on_shard: called with the name of each shard after it was checked.
    """
    checks: dict[str, Callable[[], Iterator[Damage]]] = {}
    if index is not None:
        order = np.argsort(index.shard, kind="stable")
        ends = np.searchsorted(index.shard[order], np.arange(len(index.shards) + 1))
        for shard, entry in enumerate(index.shards):
            rows = order[ends[shard] : ends[shard + 1]]
            path = folder / entry.name
            checks[entry.name] = partial(_listed_damages, path, index, shard, rows)
    for path in whole_shards(folder):
        if path.name not in checks:
            checks[path.name] = partial(_unlisted_damages, path, has_index=index is not None)

    damages: list[Damage] = []
    with ThreadPoolExecutor(cores()) as pool:
        for name, named in zip(
            checks, pool.map(lambda check: list(check()), checks.values()), strict=True
        ):
            damages += named
            on_shard(name)
    return damages


def salvage_shard(path: Path, keep: npt.ArrayLike, recipe: Recipe) -> None:
    """Write a shard again with only some of its rows: sound ones.

    Args:
        path: of the shard.
        keep: (N,) numbers of the rows, at least one.
        recipe: of the rows that are kept; it differs from the shard's only in `images`.

    Raises:
        GmpipeError: as `pipeline.shards.shard.read_header`.
        MismatchError: the shard was made with other settings.
        InputError: there is no row to keep.
        DamagedError: a row to be kept is damaged.
    """
    header, rows, checksums = map_shard(path)
    check_same_recipe(without_images(header.recipe), without_images(recipe), str(path))
    numbers = np.asarray(keep, dtype=np.int64)
    kept = rows.take(numbers)
    for position, (breach, _) in _row_breaches(kept, checksums[numbers]):
        raise DamagedError(
            f"{path}: row {numbers[position]} is damaged: {breach}; only sound rows can be kept.",
            "Delete the shard, and write its rows again.",
        )
    write_shard(path, kept, dataset=header.dataset, recipe=recipe)


def _listed_damages(
    path: Path, index: Index, shard: int, numbers: npt.NDArray[np.intp]
) -> Iterator[Damage]:
    """Yield the damages of the shard that the index lists as ``shard``, with rows ``numbers``."""
    entry = index.shards[shard]
    if not exists(path):
        yield Damage(path.name, "missing", "no file", f"a file of {entry.bytes} bytes")
        return
    try:
        # Plain reads come first, since a disk error in mapped memory kills the process.
        size, sha256 = path.stat().st_size, sha256_file(path)
        header, rows, checksums = map_shard(path)
    except (OSError, GmpipeError) as error:
        yield _unreadable(path, error)
        return
    if (size, sha256) != (entry.bytes, entry.sha256):
        yield Damage(
            path.name,
            "file",
            f"{size} bytes with sha256 {sha256}",
            f"{entry.bytes} bytes with {entry.sha256}, as in {INDEX_NAME}",
        )
    try:
        check_listed(path, header, index, shard)
    except MismatchError as error:
        yield Damage(path.name, "foreign", _reason(path, error), f"the one that {INDEX_NAME} lists")
        return

    number_of = np.full(len(rows), -1, dtype=np.int64)  # of each row, in the index
    number_of[index.row[numbers]] = numbers
    times = np.bincount(index.row[numbers], minlength=len(rows))
    breaches = dict(_row_breaches(rows, checksums))
    stored_ids, stored_views = rows.image_id[:], rows.view[:]
    listed_ids, listed_views = index.image_ids[number_of], index.views[number_of]
    moved = (stored_ids != listed_ids) | (stored_views != listed_views)
    for row in sorted({*breaches, *np.flatnonzero(moved | (times != 1)).tolist()}):
        stored = f"image {_text(stored_ids[row])!r}, view {stored_views[row]}"
        if times[row]:
            image_id, view = _text(listed_ids[row]), int(listed_views[row])
        else:
            image_id, view = _text(stored_ids[row]), int(stored_views[row])
        if row in breaches:
            yield Damage(path.name, "row", *breaches[row], row, image_id, view)
        if times[row] != 1:
            count = f"{times[row]} rows in {INDEX_NAME}"
            yield Damage(path.name, "index", count, "one", row, image_id, view)
        elif moved[row] and row not in breaches:
            listed = f"what {INDEX_NAME} lists"
            yield Damage(path.name, "index", stored, listed, row, image_id, view)


def _unlisted_damages(path: Path, *, has_index: bool) -> Iterator[Damage]:
    """Yield the damages of a shard that the index does not list, which is one itself."""
    if has_index:
        yield Damage(path.name, "unlisted", "a shard", f"only those that {INDEX_NAME} lists")
    try:
        sha256_file(path)  # a plain read comes first, as above
        _, rows, checksums = map_shard(path)
    except (OSError, GmpipeError) as error:
        yield _unreadable(path, error)
        return
    for row, breach in _row_breaches(rows, checksums):
        image_id, view = _text(rows.image_id[row]), int(rows.view[row])
        yield Damage(path.name, "row", *breach, row, image_id, view)


def _row_breaches(
    rows: RegionRows, checksums: npt.NDArray[np.uint32]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the number of each damaged row, with what was found and what was expected."""
    for start in range(0, len(rows), _BLOCK):
        block = rows.take(np.arange(start, min(start + _BLOCK, len(rows))))
        sums, expected = row_checksums(block), checksums[start : start + _BLOCK]
        broken = block.breaches()
        for row in range(len(block)):
            if sums[row] != expected[row]:
                yield start + row, (f"checksum {sums[row]:#010x}", f"{expected[row]:#010x}")
            elif row in broken:
                yield start + row, broken[row]


def _text(image_id: bytes) -> str:
    return image_id.decode(errors="replace")


def _unreadable(path: Path, error: OSError | GmpipeError) -> Damage:
    """The damage of a shard that can't be opened."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return Damage(path.name, "inaccessible", reason, "a file that can be read")
    return Damage(path.name, "unreadable", _reason(path, error), "a whole shard")


def _reason(path: Path, error: GmpipeError) -> str:
    """What is wrong with a shard, without the path and the remedy that an error has."""
    return error.problem.removeprefix(f"{path}: ").removesuffix(".")
