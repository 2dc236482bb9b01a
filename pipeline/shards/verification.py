"""Every damage of a cache by name, and a repair that keeps all sound rows.

Letters: R rows of a shard, N rows of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedError, GmpipeError, InputError, MismatchError, MissingError
from pipeline.files import exists, sha256_file
from pipeline.machine import cores
from pipeline.shards.index import INDEX_NAME, Index, check_listed, read_index
from pipeline.shards.schema import (
    IMAGES,
    Recipe,
    RegionRows,
    check_same_recipe,
    row_checksums,
    without_images,
)
from pipeline.shards.shard import map_shard, read_header, whole_shards, write_shard
from pipeline.shards.store import ShardStore, WantedImages

Kind = Literal["missing", "unreadable", "foreign", "file", "row", "index", "unlisted"]
"""What is wrong with a shard:

- `missing`: the index lists it, but there is no such file;
- `unreadable`: the file can't be read, or its header breaks the format;
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


def verify_cache(folder: Path, on_shard: Callable[[str], None] = lambda name: None) -> list[Damage]:
    """Find all damages of the shards in ``folder``, shard by shard; none if it is sound.

    Every file is read once from disk. Threads share the shards among them.

    Args:
        folder: of the shards and the index.
        on_shard: called with the name of each shard after it was checked.

    Raises:
        GmpipeError: as `pipeline.shards.index.read_index`. Never for a shard.
        OSError: the system can't read a file, which says nothing about what the file holds.
    """
    index = read_index(folder)
    order = np.argsort(index.shard, kind="stable")
    ends = np.searchsorted(index.shard[order], np.arange(len(index.shards) + 1))
    listed = {entry.name for entry in index.shards}
    unlisted = [path for path in whole_shards(folder) if path.name not in listed]

    def check(shard: int) -> tuple[str, list[Damage]]:
        if shard < len(index.shards):
            numbers = order[ends[shard] : ends[shard + 1]]
            name = index.shards[shard].name
            return name, list(_listed_damages(folder / name, index, shard, numbers))
        path = unlisted[shard - len(index.shards)]
        return path.name, list(_unlisted_damages(path))

    damages: list[Damage] = []
    with ThreadPoolExecutor(cores()) as pool:
        for name, named in pool.map(check, range(len(index.shards) + len(unlisted))):
            damages += named
            on_shard(name)
    return damages


def sound_rows(path: Path) -> tuple[npt.NDArray[np.int64], list[str], npt.NDArray[np.int16]]:
    """Find a shard's rows that are not damaged: their numbers (N,), image ids and views (N,).

    Raises:
        GmpipeError: as `pipeline.shards.shard.read_header`. No row can be trusted then.
    """
    _, rows, checksums = map_shard(path)
    breaches = dict(_row_breaches(rows, checksums))
    sound = np.array([row for row in range(len(rows)) if row not in breaches], dtype=np.int64)
    image_ids = [image_id.decode() for image_id in rows.image_id[sound].tolist()]
    return sound, image_ids, rows.view[sound]


def salvage_shard(path: Path, keep: npt.ArrayLike, recipe: Recipe) -> None:
    """Write a shard again with only some of its rows, e.g. those of `sound_rows`.

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


def repair_shards(
    store: ShardStore,
    index: Index,
    damages: Sequence[Damage],
    recipe: Recipe,
    wanted: WantedImages,
) -> None:
    """Remove everything that is damaged from a folder of shards, and the index.

    Sound rows of a damaged shard are kept, unless the shard can't be read, was made with other
    settings, or holds an image that changed: nobody knows then which rows are of the former image.
    Of the shards that the index does not list, those that belong to the cache stay. Afterwards,
    `ShardStore.survey` finds which rows are missing.

    Args:
        store: the folder.
        index: of the folder.
        damages: of `verify_cache`.
        recipe: of the cache that is wanted, without `images`.
        wanted: its images, as they are now.

    Raises:
        MismatchError: the cache was made with other settings than ``recipe``. Nothing is removed.
    """
    check_same_recipe(without_images(index.recipe), recipe, str(store.folder))
    kinds: dict[str, set[Kind]] = {}
    for damage in damages:
        kinds.setdefault(damage.shard, set()).add(damage.kind)
    for name, kinds_of_shard in kinds.items():
        if kinds_of_shard <= {"file", "row", "index"}:
            _keep_sound_rows(store.folder / name, index, wanted)
        elif kinds_of_shard != {"unlisted"}:
            (store.folder / name).unlink(missing_ok=True)
    store.drop([shard for shard in store.survey(recipe, wanted).stale if shard.path.name in kinds])
    # Last: without an index, nobody would look for damaged rows again if this process is killed.
    store.drop_index()


def _keep_sound_rows(path: Path, index: Index, wanted: WantedImages) -> None:
    """Write a listed shard again with its sound rows, or remove it if its images changed."""
    recipe = read_header(path).recipe
    number = next(n for n, entry in enumerate(index.shards) if entry.name == path.name)
    listed = index.shard == number
    listed_numbers = wanted.numbers([_text(stored) for stored in index.image_ids[listed].tolist()])
    sound, image_ids, views = sound_rows(path)
    unchanged = (listed_numbers >= 0).all() and (
        wanted.digest(listed_numbers, index.views[listed]) == recipe[IMAGES]
    )
    if unchanged and len(sound):
        kept = wanted.digest(wanted.numbers(image_ids), views)
        salvage_shard(path, sound, {**recipe, IMAGES: kept})
    else:
        path.unlink()


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
    except (DamagedError, InputError, MismatchError, MissingError) as error:
        yield Damage(path.name, "unreadable", _reason(path, error), "a whole shard")
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


def _unlisted_damages(path: Path) -> Iterator[Damage]:
    """Yield the damages of a shard that the index does not list, which is one itself."""
    yield Damage(path.name, "unlisted", "a shard", f"only those that {INDEX_NAME} lists")
    try:
        sha256_file(path)  # a plain read comes first, as above
        _, rows, checksums = map_shard(path)
    except (DamagedError, InputError, MismatchError, MissingError) as error:
        yield Damage(path.name, "unreadable", _reason(path, error), "a whole shard")
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


def _reason(path: Path, error: GmpipeError) -> str:
    """What is wrong with a shard, without the path and the remedy that an error has."""
    return error.problem.removeprefix(f"{path}: ").removesuffix(".")
