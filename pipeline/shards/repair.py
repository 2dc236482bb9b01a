"""The repair of a cache: what becomes of each shard is decided before anything is touched.

The index stays until the repaired shards are listed in a new one. So a repair that is killed at any
moment can be repeated: shards that it has written are sound, whatever the old index says of them.

Letters: R rows of a shard, N rows of some of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import AccessError, DamagedError
from pipeline.shards.index import Index
from pipeline.shards.schema import (
    IMAGES,
    Recipe,
    RegionRows,
    fingerprint,
)
from pipeline.shards.shard import map_shard, whole_shards
from pipeline.shards.store import (
    ImagesById,
    Numbers,
    ShardStore,
    StaleKind,
    StaleShard,
    Views,
    WantedImages,
    verdict_on_settings,
)
from pipeline.shards.verification import Damage, salvage_shard

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Repair:
    """What becomes of the shards of a folder. Those that are not named stay as they are.

    Attributes:
        kept: (N,) numbers of the sound rows that a shard is written again with, and its recipe, by
            its path.
        removed: paths of the shards of which no row can be kept.
        stale: shards of other settings, or of images that are not wanted or have changed. Nothing
            may be touched while there are any.
    """

    kept: Mapping[Path, tuple[Numbers, Recipe]]
    removed: Sequence[Path]
    stale: Sequence[StaleShard]

    def carry_out(self) -> None:
        """Write and remove the shards. Afterwards, `ShardStore.survey` finds what is missing."""
        for path, (rows, recipe) in self.kept.items():
            salvage_shard(path, rows, recipe)
        for path in self.removed:
            path.unlink()


def plan_repair(
    store: ShardStore,
    index: Index | None,
    damages: Sequence[Damage],
    recipe: Recipe,
    wanted: WantedImages,
) -> Repair:
    """Decide what becomes of each shard of a folder. Changes nothing.

    Sound rows of a damaged shard are kept, unless nobody knows whether they are of the images as
    they are now: the shard's recipe tells only whether all of its rows are, and a damaged row may
    have lost the name of its image. (Images of which only the id is known don't change.)

    Args:
        store: the folder.
        index: of the folder, which was made with ``recipe``; None if it is missing or damaged.
        damages: of `verify_cache`.
        recipe: of the cache that is wanted, without `images`.
        wanted: its images, as they are now.

    Raises:
        AccessError: the system can't read a shard, which may be sound.
        MismatchError: a newer version of gmpipe wrote a shard.
    """
    by_shard: dict[str, list[Damage]] = {}
    for damage in damages:
        if damage.kind == "inaccessible":
            raise AccessError(
                f"{store.folder / damage.shard} can't be read ({damage.found}). Nothing was "
                "changed.",
                "Make it readable, or remove it if its disk is broken, and repair again.",
            )
        by_shard.setdefault(damage.shard, []).append(damage)
    listings = {} if index is None else {entry.name: n for n, entry in enumerate(index.shards)}
    kept: dict[Path, tuple[Numbers, Recipe]] = {}
    removed: list[Path] = []
    stale: list[StaleShard] = []
    held = _NONE  # of all rows that are kept: number of the image and view in one
    # Listed shards first: of two that hold the same row, the copy that is not listed goes.
    for path in sorted(whole_shards(store.folder), key=lambda path: path.name not in listings):
        listing = None
        if index is not None and path.name in listings:
            listing = _Listing.of(index, listings[path.name], wanted)
        found = _examine(path, store.dataset, listing, by_shard.get(path.name, []), recipe, wanted)
        if isinstance(found, StaleShard):
            stale.append(found)
            continue
        keys, first = np.unique(_keys(found.numbers, found.views), return_index=True)
        first = np.sort(first[~np.isin(keys, held)])
        held = np.concatenate([held, keys])
        if not len(first):
            removed.append(path)
        elif found.write_again or len(first) < found.total:
            images = wanted.digest(found.numbers[first], found.views[first])
            kept[path] = found.rows[first], {**recipe, IMAGES: images}
    return Repair(kept, removed, stale)


@dataclass(frozen=True, eq=False)
class _Listing:
    """What the index says of a shard: its fingerprint, and the R images and views of its rows."""

    fingerprint: str
    numbers: Numbers
    views: Views

    @classmethod
    def of(cls, index: Index, shard: int, wanted: WantedImages) -> _Listing:
        rows = index.shard == shard
        return cls(
            index.shards[shard].fingerprint,
            wanted.numbers(_texts(index.image_ids[rows].tolist())),
            index.views[rows],
        )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The sound rows of a shard.

    Attributes:
        total: R.
        rows: (N,) their numbers in the shard.
        numbers, views: (N,) of their images.
        write_again: whether the file is damaged, even if no row is.
    """

    total: int
    rows: Numbers
    numbers: Numbers
    views: Views
    write_again: bool


_NO_ROWS = _Rows(0, _NONE, _NONE, np.zeros(0, np.int16), write_again=False)


def _examine(
    path: Path,
    dataset: str,
    listing: _Listing | None,
    damages: Sequence[Damage],
    recipe: Recipe,
    wanted: WantedImages,
) -> _Rows | StaleShard:
    """The sound rows of a shard, or why it must not be touched.

    Args:
        path, dataset: of the shard.
        listing: None if the index does not list the shard.
        damages: of the shard.
        recipe, wanted: as `plan_repair`.
    """
    try:
        header, rows, _ = map_shard(path)
    except DamagedError:
        if listing and listing.fingerprint != _fingerprint_now(listing, recipe, wanted):
            return _stale(path, "images", _CHANGED, 0, listing.numbers)
        return _NO_ROWS
    stored = wanted.numbers(_texts(rows.image_id.tolist())), rows.view.copy()
    if verdict := verdict_on_settings(header, dataset, recipe):
        # Even if the index says that another shard belongs here: it may be days of work.
        return _stale(path, *verdict, header.rows, stored[0])
    kinds = {damage.kind for damage in damages}
    # One that a killed repair wrote is not the one that the index lists.
    is_listed = listing is not None and listing.fingerprint == header.fingerprint
    broken = {damage.row for damage in damages if damage.kind == "row"}
    sound = np.array([row for row in range(header.rows) if row not in broken], dtype=np.int64)
    sets = [stored, (listing.numbers, listing.views)] if listing and is_listed else [stored]
    if not any(_digest(wanted, *one) == header.recipe.get(IMAGES) for one in sets):
        only_ids = isinstance(wanted, ImagesById)
        nameless = bool(broken) and (only_ids or not is_listed or "index" in kinds)
        nameless = nameless and (only_ids or _is_nameless(stored, sound))
        if not nameless or (stored[0][sound] < 0).any():
            return _stale(path, "images", _reason(rows, stored[0]), header.rows, stored[0])
        if not only_ids:
            return _NO_ROWS
    numbers, views = stored[0][sound], stored[1][sound]
    return _Rows(header.rows, sound, numbers, views, is_listed and "file" in kinds)


_CHANGED = "holds images that changed after their regions were written"


def _is_nameless(stored: tuple[Numbers, Views], sound: Numbers) -> bool:
    """Whether a damaged row has no name that it can have had: a wanted one that no other row has.

    Args:
        stored: (R,) image and view of each row.
        sound: numbers of the sound rows.
    """
    broken = np.setdiff1d(np.arange(len(stored[0])), sound)
    keys = _keys(*stored)
    return bool(
        (stored[0][broken] < 0).any()
        or not np.isin(stored[1][broken], stored[1][sound]).all()
        or np.isin(keys[broken], keys[sound]).any()
    )


def _keys(numbers: Numbers, views: Views) -> Numbers:
    """Number of the image and view of each row in one number."""
    return (numbers << 16) + views


def _reason(rows: RegionRows, numbers: Numbers) -> str:
    """Why the images of a shard are not the wanted ones."""
    if (numbers < 0).any():
        unknown = _texts([rows.image_id[int(np.argmin(numbers))]])[0]
        return f"holds image {unknown!r}, which the data set does not have"
    return _CHANGED


def _stale(path: Path, kind: StaleKind, reason: str, rows: int, numbers: Numbers) -> StaleShard:
    known = np.unique(numbers[numbers >= 0])
    return StaleShard(path, kind, reason, rows, path.stat().st_size, known)


def _digest(wanted: WantedImages, numbers: Numbers, views: Views) -> str | None:
    """The recipe's field `images` for some rows as they are now; None if one is not wanted."""
    return wanted.digest(numbers, views) if (numbers >= 0).all() else None


def _fingerprint_now(listing: _Listing, recipe: Recipe, wanted: WantedImages) -> str:
    """The fingerprint that a shard of these rows would have."""
    return fingerprint({**recipe, IMAGES: _digest(wanted, listing.numbers, listing.views)})


def _texts(image_ids: Sequence[bytes]) -> list[str]:
    return [image_id.decode(errors="replace") for image_id in image_ids]
