"""The folder of a cache's shards, for the one process that changes it.

A folder is opened with `open_store`, which keeps other writers out. A writer then surveys it, drops
what is stale, writes the shards that are missing, and lists them in the index, which comes last:
whatever is killed at whatever moment, the next run surveys the folder again and redoes nothing that
is whole.

Letters: as in `pipeline.shards.schema`; N images that a cache should hold.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.files import begin_turn, folder_lock, matching, sha256_json
from pipeline.shards.failures import Failure, write_failures
from pipeline.shards.index import INDEX_NAME, check_sizes, read_index, write_index
from pipeline.shards.schema import (
    IMAGES,
    Recipe,
    RegionRows,
    fingerprint,
    recipe_differences,
    without_images,
)
from pipeline.shards.shard import (
    ShardHeader,
    decoded_ids,
    map_shard,
    shard_name,
    whole_shards,
    write_shard,
)

_log = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]
Views = npt.NDArray[np.int16]

StaleKind = Literal["unreadable", "settings", "images", "removed"]
"""Why a shard is stale:

- `unreadable`: it is damaged, or a newer version of gmpipe wrote it;
- `settings`: it was made with other settings, or for another data set;
- `images`: it holds an image that changed since, or rows that another shard holds as well;
- `removed`: it holds an image that is not wanted. Its other images may have changed, too.
"""


class WantedImages(Protocol):
    """The N images that a cache should hold, numbered from 0."""

    def __len__(self) -> int:
        """N."""

    def numbers(self, image_ids: Sequence[str]) -> Numbers:
        """The number of each of R images (R,), -1 for one that the cache should not hold."""

    def digest(self, numbers: Numbers, views: Views) -> str:
        """The recipe's field `images` for a set of R rows: the images as they are now."""


class ImagesById:
    """Images of which only the id is known, as those of imported regions are."""

    def __init__(self, image_ids: Sequence[str]) -> None:
        self._ids = list(image_ids)
        self._numbers = {image_id: number for number, image_id in enumerate(self._ids)}

    def __len__(self) -> int:
        return len(self._ids)

    def numbers(self, image_ids: Sequence[str]) -> Numbers:
        """See `WantedImages`."""
        return np.array([self._numbers.get(image_id, -1) for image_id in image_ids], dtype=np.int64)

    def digest(self, numbers: Numbers, views: Views) -> str:
        """Hex sha256 over the set of ids. Such images have only view 0."""
        return sha256_json(sorted(self._ids[number] for number in numbers.tolist()))


@dataclass(frozen=True, eq=False)
class StaleShard:
    """A shard that does not belong to the cache that is wanted.

    Attributes:
        path: of the file.
        kind: what is wrong.
        reason: the same in words, to follow the shard's name: `made with other settings: ...`.
        rows: R; 0 if they can't be counted.
        bytes: size of the file.
        numbers: of the wanted images that it holds, each once.
    """

    path: Path
    kind: StaleKind
    reason: str
    rows: int
    bytes: int
    numbers: Numbers


@dataclass(frozen=True, eq=False)
class Survey:
    """What a folder holds of a wanted cache.

    Attributes:
        current: paths of the shards that belong to it, each with its fingerprint.
        numbers: (R,) number of the image of each row of the current shards.
        views: (R,) view of each of these rows.
        images: the recipe's field `images` for these rows; empty without any.
        stale: the other shards.
    """

    current: Mapping[Path, str]
    numbers: Numbers
    views: Views
    images: str
    stale: tuple[StaleShard, ...]


@contextmanager
def open_store(folder: Path, dataset: str) -> Iterator[ShardStore]:
    """Open a folder of shards for writing. It is created if it does not exist.

    No other process opens it until the block ends. Workers that a killed run left behind are waited
    for, and the unfinished files of such a run are removed.

    Raises:
        BusyError: another process has it open, or workers of an earlier run are still writing.
    """
    with folder_lock(folder):
        folder.mkdir(parents=True, exist_ok=True)
        store = ShardStore(folder, dataset, begin_turn(folder))
        store.remove_unfinished()
        yield store


class ShardStore:
    """A folder of shards that this process may change.

    Attributes:
        folder: of the shards and the index.
        dataset: name of the data set.
        turn: of `pipeline.files.begin_turn`; workers write `in_turn`.
    """

    def __init__(self, folder: Path, dataset: str, turn: str) -> None:
        """Use `open_store`."""
        self.folder = folder
        self.dataset = dataset
        self.turn = turn

    def remove_unfinished(self) -> None:
        """Remove the files that a killed process was writing."""
        for unfinished in matching(self.folder, "*.tmp"):
            unfinished.unlink()

    def survey(self, recipe: Recipe, wanted: WantedImages) -> Survey:
        """Find out which shards belong to a cache, and why the others don't. Changes nothing.

        Args:
            recipe: of the wanted cache, without `images`.
            wanted: its images, as they are now.

        Raises:
            OSError: the system can't read the folder or a shard, for instance since this user may
                not.
        """
        current: dict[Path, str] = {}
        stale: list[StaleShard] = []
        held: dict[int, npt.NDArray[np.bool_]] = {}  # by view, (N,): what the current shards hold
        all_numbers: list[Numbers] = [np.zeros(0, np.int64)]
        all_views: list[Views] = [np.zeros(0, np.int16)]
        for path in whole_shards(self.folder):
            size = path.stat().st_size
            try:
                header, rows, _ = map_shard(path)
                image_ids, views = decoded_ids(path, rows), rows.view.copy()
            except (DamagedError, MismatchError) as error:
                reason = error.problem.removeprefix(f"{path}: ")
                none = np.zeros(0, np.int64)
                stale.append(StaleShard(path, "unreadable", reason, 0, size, none))
                continue
            numbers = wanted.numbers(image_ids)
            verdict = verdict_on_settings(header, self.dataset, recipe) or _verdict_on_images(
                header, image_ids, numbers, views, wanted, held
            )
            if verdict is not None:
                known = np.unique(numbers[numbers >= 0])
                stale.append(StaleShard(path, *verdict, header.rows, size, known))
                continue
            for view in np.unique(views).tolist():
                held.setdefault(view, np.zeros(len(wanted), np.bool_))
                held[view][numbers[views == view]] = True
            current[path] = header.fingerprint
            all_numbers.append(numbers)
            all_views.append(views)
        numbers, views = np.concatenate(all_numbers), np.concatenate(all_views)
        images = wanted.digest(numbers, views) if current else ""
        return Survey(current, numbers, views, images, tuple(stale))

    def drop(self, shards: Sequence[StaleShard]) -> None:
        """Remove shards. Unless there are none, the index goes first: it may list them."""
        if shards:
            self.drop_index()
        for shard in shards:
            shard.path.unlink()
            _log.info("dropped %s", shard.path)

    def drop_index(self) -> None:
        """Remove the index, if there is one."""
        (self.folder / INDEX_NAME).unlink(missing_ok=True)

    def free_names(self) -> Iterator[str]:
        """File names for further shards: the lowest numbers that are free at this call.

        So a run that continues a killed one ends with the same names as one that was never killed.
        """
        taken = {path.name for path in whole_shards(self.folder)}
        return (name for number in itertools.count() if (name := shard_name(number)) not in taken)

    def write(self, name: str, rows: RegionRows, recipe: Recipe) -> None:
        """Write a shard of this data set; see `pipeline.shards.shard.write_shard`."""
        write_shard(self.folder / name, rows, dataset=self.dataset, recipe=recipe)

    def wait_for(self, names: set[str], patience: float = 90) -> None:
        """Wait until this machine sees the shards that workers wrote.

        NFS shows new names up to a minute late.

        Args:
            names: of the shards.
            patience: seconds to wait.

        Raises:
            MissingError: a shard is not seen.
        """
        deadline = time.monotonic() + patience
        while missing := names - {path.name for path in whole_shards(self.folder)}:
            if time.monotonic() > deadline:
                raise MissingError(
                    f"{self.folder}: a worker wrote {min(missing)}, but this machine does not see "
                    "it.",
                    "Check that all machines share this folder, and run the same command again.",
                )
            time.sleep(1)

    def finish(
        self,
        recipe: Recipe,
        survey: Survey,
        failures: Iterable[Failure] = (),
        *,
        trust_index: bool = True,
    ) -> list[Failure]:
        """Write the failures and then the index of the current shards.

        What workers that died left unfinished is removed: others have written its rows by now.
        An index that lists exactly these shards is not written again. Without any shard there is no
        index.

        Args:
            recipe: of the cache, without `images`.
            survey: of the folder, after its last change.
            failures: images without regions.
            trust_index: whether the rows of an index that lists these shards are right; without it
                the index is written in any case.

        Returns:
            the failures that were written, one for each image.

        Raises:
            GmpipeError: as `pipeline.shards.index.write_index`.
        """
        self.remove_unfinished()
        written = write_failures(self.folder, failures)
        if not survey.current:
            self.drop_index()
            return written
        whole = {**recipe, IMAGES: survey.images}
        if not (trust_index and self._is_listed(whole, survey.current)):
            write_index(self.folder, self.dataset, whole, list(survey.current))
        return written

    def _is_listed(self, recipe: Recipe, shards: Mapping[Path, str]) -> bool:
        """Whether the index is of ``recipe`` and lists exactly ``shards``."""
        try:
            index = read_index(self.folder)
            check_sizes(self.folder, index)
        # A killed run leaves no index, or one that is older than the shards.
        except (MissingError, DamagedError, MismatchError):
            return False
        listed = {entry.name: entry.fingerprint for entry in index.shards}
        wanted = {path.name: shard_fingerprint for path, shard_fingerprint in shards.items()}
        return index.fingerprint == fingerprint(recipe) and listed == wanted


def verdict_on_settings(
    header: ShardHeader, dataset: str, recipe: Recipe
) -> tuple[StaleKind, str] | None:
    """Why a shard's settings make it stale, or None.

    Args:
        header: of the shard.
        dataset, recipe: of the wanted cache, without `images`.
    """
    if header.dataset != dataset:
        return "settings", f"made for the data set {header.dataset!r}"
    if differences := recipe_differences(without_images(header.recipe), recipe):
        return "settings", f"made with other settings: {differences}"
    return None


def _verdict_on_images(
    header: ShardHeader,
    image_ids: Sequence[str],
    numbers: Numbers,
    views: Views,
    wanted: WantedImages,
    held: Mapping[int, npt.NDArray[np.bool_]],
) -> tuple[StaleKind, str] | None:
    """Why a shard's images make it stale, or None.

    Args:
        header: of the shard.
        image_ids, numbers, views: (R,) of its rows.
        wanted: all images.
        held: which rows the shards before it hold.
    """
    if (numbers < 0).any():
        unknown = image_ids[int(np.argmin(numbers))]
        return "removed", f"holds image {unknown!r}, which the data set does not have"
    if wanted.digest(numbers, views) != header.recipe.get(IMAGES):
        return "images", "holds images that changed after their regions were written"
    for view in np.unique(views).tolist():
        rows = np.flatnonzero(views == view)
        if view in held and (again := held[view][numbers[rows]]).any():
            image_id = image_ids[int(rows[again][0])]
            return "images", f"holds image {image_id!r}, view {view}, a second time"
    return None
