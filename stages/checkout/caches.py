"""The cache of a data set: opening it, and saying what in it is stale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import DamagedError, GmpipeError, MismatchError, MissingError, advising
from pipeline.formats.text import counted
from pipeline.shards.failures import Failure
from pipeline.shards.index import read_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import Recipe, recipe_differences, without_images
from pipeline.shards.shard import read_header
from pipeline.shards.store import StaleShard
from stages.checkout.disk import shown_bytes
from stages.checkout.layout import cache_folder
from stages.checkout.params import read_request

_LINES = 10  # of a list of stale shards
_FAILURES = 5  # images that a list of those without regions names


def open_cache(dataset: str) -> RegionCache:
    """Open the cache of a data set. Errors about it name the command that fixes it.

    Raises:
        GmpipeError: as `RegionCache.open`, and as `check_dataset`.
    """
    with advising_on_cache(dataset):
        cache = RegionCache.open(cache_folder(dataset), remedy=_repair(dataset))
    check_dataset(cache.dataset, dataset)
    return cache


def check_dataset(found: str, dataset: str) -> None:
    """Check that the index in the cache's folder is of the data set.

    Raises:
        MismatchError: it is of another one.
    """
    if found != dataset:
        folder = cache_folder(dataset)
        raise MismatchError(
            f"{folder} holds the regions of the data set {found!r}, expected {dataset!r}.",
            f"Move them to {cache_folder(found)}, and restore those of {dataset} or make them "
            "again.",
        )


@contextmanager
def advising_on_cache(dataset: str) -> Iterator[None]:
    """Name the command that fixes a cache for errors about it that are raised in the block."""
    try:
        with advising(_repair(dataset), DamagedError):
            yield
    except MissingError as error:
        command = fill_command(dataset, imported=_are_imported(dataset))
        error.remedy = f"Run `{command}`, which writes only what is missing."
        raise


def fill_command(dataset: str, *, imported: bool) -> str:
    """The command that writes regions to the cache of a data set."""
    if imported:
        return f"gmpipe import-regions FILE --dataset {dataset}"
    return f"gmpipe extract --dataset {dataset}"


def _are_imported(dataset: str) -> bool:
    """Whether the regions of a data set are imported: by the cache, or else by params.yaml."""
    with suppress(GmpipeError, OSError):
        return "imported_from" in read_index(cache_folder(dataset)).recipe
    with suppress(GmpipeError, OSError):
        return read_request(dataset).detector.source == "imported"
    return False


def _repair(dataset: str) -> str:
    return f"Run `gmpipe cache verify --dataset {dataset} --repair`."


def amount_of(shards: Sequence[StaleShard]) -> str:
    """E.g. `2 shards (20 rows, 14.3 kB)`."""
    rows = counted(sum(shard.rows for shard in shards), "row")
    size = shown_bytes(sum(shard.bytes for shard in shards))
    return f"{counted(len(shards), 'shard')} ({rows}, {size})"


def reasons_of(shards: Sequence[StaleShard]) -> str:
    """Say which shards are stale and why: a line for each reason, at most ten."""
    by_reason: dict[str, list[StaleShard]] = {}
    for shard in shards:
        by_reason.setdefault(shard.reason, []).append(shard)
    lines: list[str] = []
    for reason, alike in by_reason.items():
        others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        lines.append(f"  {alike[0].path.name}{others}: {reason}\n")
    if len(lines) > _LINES:
        lines[_LINES:] = [f"  and {counted(len(lines) - _LINES, 'more reason')}\n"]
    return "".join(lines)


def recipes_of(shards: Sequence[StaleShard]) -> list[Recipe]:
    """The recipes of those shards that were made with other settings."""
    return [read_header(shard.path).recipe for shard in shards if shard.kind == "settings"]


def how_to_keep(
    dataset: str, found: Sequence[Recipe], without_whole: Recipe, otherwise: str
) -> str:
    """Say how to keep regions that were made with other settings: a sentence or two.

    Args:
        dataset: name of the data set.
        found: the recipes of the regions.
        without_whole: what the wanted recipe would be without the vectors of whole views.
        otherwise: the sentence for regions that lack more than these vectors.
    """
    if not found or any(recipe_differences(without_images(one), without_whole) for one in found):
        return otherwise
    return (
        "They lack only the vectors of whole views, which some heads read. To keep them as they "
        f"are, set `extract.{dataset}.whole: false` in params.yaml."
    )


def drop_message(folder: Path, shards: Sequence[StaleShard]) -> str:
    """Say which shards are dropped from a cache's folder, and why."""
    return f"{folder}: dropping {amount_of(shards)}\n{reasons_of(shards).rstrip()}"


def shown_failures(failures: Sequence[Failure]) -> str:
    """Say which images have no regions and why: a line for each, at most five."""
    lines = [
        f"  {one.reason if one.path in one.reason else f'{one.image_id}: {one.reason}'}"
        for one in failures[:_FAILURES]
    ]
    if len(failures) > _FAILURES:
        lines.append(f"  and {len(failures) - _FAILURES} more")
    return "\n".join(lines)
