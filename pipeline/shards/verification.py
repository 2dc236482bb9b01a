"""Every damage of a cache by name, and what of a damaged shard can be kept.

Letters: R rows of a shard, N rows of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import GmpipeError
from pipeline.files import sha256_file
from pipeline.machine import cores
from pipeline.shards.reader import Index, check_listed, map_shard, read_index, whole_shards
from pipeline.shards.schema import (
    INDEX_NAME,
    Recipe,
    RegionRows,
    check_same_recipe,
    row_checksums,
    without_images,
)
from pipeline.shards.writer import write_shard

Kind = Literal["missing", "unreadable", "foreign", "file", "row", "index", "unlisted"]
"""What is wrong with a shard:

- `missing`: the index lists it, and it is not there;
- `unreadable`: the file can't be read, or its header breaks the format;
- `foreign`: it was made with other settings or of other images than the index says;
- `file`: its bytes are not those that the index has the sha256 of;
- `row`: a row's checksum or contents are wrong;
- `index`: the index tells of another image in a sound row, or not of the row exactly once;
- `unlisted`: it is there, and the index does not list it.
"""

_BLOCK = 64
"""Rows looked at together: enough to make each step cheap, few enough to take little memory."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a shard or one of its rows."""

    shard: str
    """File name."""
    kind: Kind
    found: str
    expected: str
    row: int | None = None
    """Number of the row in its shard; None where the whole shard is meant."""
    image_id: str | None = None
    """Of that row, as the index has it; as the shard has it if the index lacks the row."""
    view: int | None = None

    def __str__(self) -> str:
        """One line for the user."""
        where = ""
        if self.row is not None:
            where = f" row {self.row} (image {self.image_id!r}, view {self.view}):"
        return f"{self.shard}:{where} found {self.found}; expected {self.expected}."


def verify_cache(folder: Path, on_shard: Callable[[str], None] = lambda name: None) -> list[Damage]:
    """All damages of the shards in ``folder``, shard by shard; an empty list if it is sound.

    Every file is read once from disk. Threads share the shards among them.

    Args:
        on_shard: called with each shard's name once it was looked at.

    Raises:
        GmpipeError: the index is missing, damaged or of another format. Never for a shard.
    """
    index = read_index(folder)
    order = np.argsort(index.shard, kind="stable")
    ends = np.searchsorted(index.shard[order], np.arange(len(index.shards) + 1))
    listed = {entry.name for entry in index.shards}
    unlisted = [path for path in whole_shards(folder) if path.name not in listed]

    def look(shard: int) -> tuple[str, list[Damage]]:
        if shard < len(index.shards):
            numbers = order[ends[shard] : ends[shard + 1]]
            name = index.shards[shard].name
            return name, list(_listed_damages(folder / name, index, shard, numbers))
        path = unlisted[shard - len(index.shards)]
        return path.name, list(_unlisted_damages(path))

    damages: list[Damage] = []
    with ThreadPoolExecutor(cores()) as pool:
        for name, found in pool.map(look, range(len(index.shards) + len(unlisted))):
            damages += found
            on_shard(name)
    return damages


def sound_rows(path: Path) -> tuple[npt.NDArray[np.int64], list[str], npt.NDArray[np.int16]]:
    """Numbers (N,), image ids and views (N,) of a shard's rows that are not damaged.

    Raises:
        GmpipeError: the shard is missing or its header breaks the format: none can be trusted.
    """
    _, rows, checksums = map_shard(path)
    breaches = dict(_row_breaches(rows, checksums))
    sound = np.array([row for row in range(len(rows)) if row not in breaches], dtype=np.int64)
    image_ids = [image_id.decode() for image_id in rows.image_id[sound].tolist()]
    return sound, image_ids, rows.view[sound]


def salvage_shard(path: Path, keep: npt.ArrayLike, recipe: Recipe) -> None:
    """Write a shard anew with some of its rows only, e.g. those of `sound_rows`.

    Args:
        keep: (N,) numbers of the rows, at least one.
        recipe: of the rows that are kept; it differs from the shard's in `images` alone.

    Raises:
        GmpipeError: the shard is missing or its header breaks the format, it was made with other
            settings, there is nothing to keep, or a row to be kept is damaged.
    """
    header, rows, checksums = map_shard(path)
    check_same_recipe(without_images(header.recipe), without_images(recipe), str(path))
    numbers = np.asarray(keep, dtype=np.int64)
    kept = rows.take(numbers)
    for place, (found, _) in _row_breaches(kept, checksums[numbers]):
        raise GmpipeError(
            f"{path}: row {numbers[place]} is damaged: found {found}; expected to keep sound rows. "
            f"Delete the shard and run `gmpipe extract --dataset {header.dataset}` again."
        )
    write_shard(path, kept, dataset=header.dataset, recipe=recipe)


def _listed_damages(
    path: Path, index: Index, shard: int, numbers: npt.NDArray[np.intp]
) -> Iterator[Damage]:
    """What is wrong with the shard ``shard`` of the index, which lists the rows ``numbers``."""
    entry = index.shards[shard]
    if not path.is_file():
        yield Damage(path.name, "missing", "no file", f"one of {entry.bytes} bytes")
        return
    try:
        # First, with plain reads: an error of the disk ends a process that meets it in a map.
        found = (path.stat().st_size, sha256_file(path))
        header, rows, checksums = map_shard(path)
    except (OSError, GmpipeError) as error:
        yield Damage(path.name, "unreadable", str(error), "a whole shard")
        return
    if found != (entry.bytes, entry.sha256):
        yield Damage(
            path.name,
            "file",
            f"{found[0]} bytes with sha256 {found[1]}",
            f"{entry.bytes} with {entry.sha256}, as {INDEX_NAME} says",
        )
    try:
        check_listed(path, header, index, shard)
    except GmpipeError as error:
        yield Damage(path.name, "foreign", str(error), f"the shard that {INDEX_NAME} lists")
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
            count = f"{times[row]} rows of {INDEX_NAME}"
            yield Damage(path.name, "index", count, "one", row, image_id, view)
        elif moved[row] and row not in breaches:
            told = f"what {INDEX_NAME} tells of"
            yield Damage(path.name, "index", stored, told, row, image_id, view)


def _unlisted_damages(path: Path) -> Iterator[Damage]:
    """A shard of which the index knows nothing, and what is wrong with its rows."""
    yield Damage(path.name, "unlisted", "a shard", f"only those that {INDEX_NAME} lists")
    try:
        sha256_file(path)  # as above
        _, rows, checksums = map_shard(path)
    except (OSError, GmpipeError) as error:
        yield Damage(path.name, "unreadable", str(error), "a whole shard")
        return
    for row, (found, expected) in _row_breaches(rows, checksums):
        image_id, view = _text(rows.image_id[row]), int(rows.view[row])
        yield Damage(path.name, "row", found, expected, row, image_id, view)


def _row_breaches(
    rows: RegionRows, checksums: npt.NDArray[np.uint32]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """The number of each damaged row, with what was found and expected, in order."""
    for start in range(0, len(rows), _BLOCK):
        block = rows.take(np.arange(start, min(start + _BLOCK, len(rows))))
        found, expected = row_checksums(block), checksums[start : start + _BLOCK]
        broken = block.breaches()
        for row in range(len(block)):
            if found[row] != expected[row]:
                yield start + row, (f"checksum {found[row]:#010x}", f"{expected[row]:#010x}")
            elif row in broken:
                yield start + row, broken[row]


def _text(image_id: bytes) -> str:
    return image_id.decode(errors="replace")
