"""The folder of shards: what is current, what is stale and why, and kills at any moment."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
from builders import make_rows
from caches import DATASET, RECIPE, cut

from pipeline import files
from pipeline.errors import BusyError, DamagedError, MissingError
from pipeline.files import in_turn, sha256_file
from pipeline.shards import store as module
from pipeline.shards.failures import Failure, read_failures
from pipeline.shards.index import read_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import Recipe, fingerprint, without_images
from pipeline.shards.shard import shard_name, whole_shards, write_shard
from pipeline.shards.store import ImagesById, ShardStore, Survey, open_store

COMMON = without_images(RECIPE)
IMAGES = ImagesById([f"image-{n}" for n in range(12)])
PER_SHARD = 4


class ChangedImages(ImagesById):
    """The same images, one of which has another file now."""

    def __init__(self, changed: int) -> None:
        super().__init__([f"image-{n}" for n in range(12)])
        self._changed = changed

    def digest(self, numbers: module.Numbers, views: module.Views) -> str:
        return super().digest(numbers, views) + "changed" * (self._changed in numbers)


def shard_recipe(first: int, rows: int = PER_SHARD, **changes: object) -> Recipe:
    """The recipe of a shard with `image-<first>` and those that follow it."""
    numbers = np.arange(first, first + rows)
    digest = IMAGES.digest(numbers, np.zeros(rows, np.int16))
    return {**COMMON, "images": digest, **changes}  # type: ignore[dict-item]


def fill(store: ShardStore, survey: Survey) -> list[str]:
    """Write the images that the current shards lack, and return the names of the new shards."""
    missing = np.setdiff1d(np.arange(len(IMAGES)), survey.numbers)
    names = store.free_names()
    written = []
    for start in range(0, len(missing), PER_SHARD):
        first, rows = int(missing[start]), len(missing[start : start + PER_SHARD])
        written.append(next(names))
        store.write(written[-1], make_rows(rows, first=first), shard_recipe(first, rows))
    return written


def complete(folder: Path, *, replace: bool = False) -> list[str]:
    """Do what a writer does: survey, drop what is stale, write what is missing, and finish."""
    with open_store(folder, DATASET) as store:
        survey = store.survey(COMMON, IMAGES)
        assert replace or not survey.stale
        store.drop(survey.stale)
        written = fill(store, survey)
        store.finish(COMMON, store.survey(COMMON, IMAGES))
    return written


def content(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


@pytest.fixture
def cache(folder: Path) -> Path:
    """A finished folder of three shards of four rows."""
    assert complete(folder) == [shard_name(number) for number in range(3)]
    return folder


@pytest.fixture
def store(cache: Path) -> Iterator[ShardStore]:
    with open_store(cache, DATASET) as opened:
        yield opened


# One writer --------------------------------------------------------------------------------------


def test_a_folder_is_created_and_open_for_one_writer(folder: Path) -> None:
    with open_store(folder, DATASET) as store:
        assert folder.is_dir()
        with pytest.raises(BusyError, match=str(folder)), open_store(folder, DATASET):
            pass
        with in_turn(folder, store.turn):
            pass
    with (
        open_store(folder, DATASET),
        pytest.raises(BusyError, match=str(folder)),
        in_turn(folder, store.turn),
    ):
        pass


def test_unfinished_files_are_removed(cache: Path) -> None:
    before = content(cache)
    (cache / "regions-00003.h5.0123abcd.tmp").write_bytes(b"a part of it")
    (cache / "index.parquet.0123abcd.tmp").touch()
    with open_store(cache, DATASET):
        assert content(cache) == before


def test_what_a_dead_worker_left_is_removed_at_the_end(cache: Path) -> None:
    """Another worker has written its rows by then, under another temporary name."""
    before = content(cache)
    with open_store(cache, DATASET) as store:
        (cache / "regions-00003.h5.0123abcd.tmp").write_bytes(b"a part of it")
        store.finish(COMMON, store.survey(COMMON, IMAGES))
        assert content(cache) == before


# Survey ------------------------------------------------------------------------------------------


def test_a_finished_folder_is_current(store: ShardStore) -> None:
    survey = store.survey(COMMON, IMAGES)
    assert [path.name for path in survey.current] == [shard_name(number) for number in range(3)]
    assert list(survey.current.values()) == [
        fingerprint(shard_recipe(first)) for first in (0, 4, 8)
    ]
    assert survey.numbers.tolist() == list(range(12))
    assert survey.views.tolist() == [0] * 12
    assert survey.images == IMAGES.digest(np.arange(12), np.zeros(12, np.int16))
    assert survey.stale == ()


def test_an_empty_folder_holds_nothing(folder: Path) -> None:
    with open_store(folder, DATASET) as store:
        survey = store.survey(COMMON, IMAGES)
    assert (survey.current, survey.images, survey.stale) == ({}, "", ())
    assert survey.numbers.tolist() == survey.views.tolist() == []


def rewrite(path: Path, **changes: object) -> None:
    """Write the second shard again with some of its recipe or of its data set changed."""
    dataset = str(changes.pop("dataset", DATASET))
    write_shard(path, make_rows(4, first=4), dataset=dataset, recipe=shard_recipe(4, **changes))


def write_unknown(path: Path) -> None:
    write_shard(path, make_rows(1, first=70), dataset=DATASET, recipe=shard_recipe(4))


def write_again(path: Path) -> None:
    """Let the second shard hold the rows of the first one."""
    write_shard(path, make_rows(4), dataset=DATASET, recipe=shard_recipe(0))


def write_newer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 9


@pytest.mark.parametrize(
    ("spoil", "kind", "reason", "rows", "numbers"),
    [
        (lambda path: path.write_bytes(b"no shard"), "unreadable", "HDF5", 0, []),
        (lambda path: cut(path, 900), "unreadable", "truncated", 0, []),
        (write_newer, "unreadable", "newer", 0, []),
        (lambda path: rewrite(path, m=4), "settings", "m is 4, expected 3", 4, [4, 5, 6, 7]),
        (lambda path: rewrite(path, dataset="other"), "settings", "'other'", 4, [4, 5, 6, 7]),
        (lambda path: rewrite(path, images="of old"), "images", "changed", 4, [4, 5, 6, 7]),
        (write_unknown, "removed", "'image-70'", 1, []),
        (write_again, "images", "'image-0', view 0", 4, [0, 1, 2, 3]),
    ],
)
def test_a_stale_shard_is_named_with_its_reason(
    cache: Path,
    spoil: Callable[[Path], object],
    kind: str,
    reason: str,
    rows: int,
    numbers: list[int],
) -> None:
    path = cache / shard_name(1)
    spoil(path)
    before = content(cache)
    with open_store(cache, DATASET) as store:
        survey = store.survey(COMMON, IMAGES)
    (stale,) = survey.stale
    assert (stale.path, stale.kind, stale.rows) == (path, kind, rows)
    assert reason in stale.reason
    assert stale.bytes == path.stat().st_size
    assert stale.numbers.tolist() == numbers
    assert [current.name for current in survey.current] == [shard_name(0), shard_name(2)]
    assert survey.numbers.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert content(cache) == before  # a survey changes nothing
    assert complete(cache, replace=True) == [shard_name(1)]
    assert RegionCache.open(cache).ids == [f"image-{n}" for n in range(12)]


def test_a_changed_image_costs_its_own_shard(store: ShardStore) -> None:
    survey = store.survey(COMMON, ChangedImages(6))
    assert [(stale.path.name, stale.kind) for stale in survey.stale] == [(shard_name(1), "images")]


def test_views_of_an_image_are_different_rows(folder: Path) -> None:
    with open_store(folder, DATASET) as store:
        for view in (0, 1):
            rows = make_rows(4, view=view)
            store.write(shard_name(view), rows, shard_recipe(0))
        survey = store.survey(COMMON, IMAGES)
    assert survey.stale == ()
    assert survey.views.tolist() == [0] * 4 + [1] * 4


def test_a_shard_that_the_system_can_not_read_is_not_stale(store: ShardStore) -> None:
    """Else a disk that fails, or a wrong permission, would cost days of work."""
    shard = store.folder / shard_name(0)
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # whose first byte can't be read: a real EIO
    with pytest.raises(OSError, match=r"Input/output") as caught:
        store.survey(COMMON, IMAGES)
    assert caught.value.errno == errno.EIO


# Changes -----------------------------------------------------------------------------------------


def test_dropping_removes_the_index_first(cache: Path) -> None:
    rewrite(cache / shard_name(1), m=4)
    with open_store(cache, DATASET) as store:
        stale = store.survey(COMMON, IMAGES).stale
        before = content(cache)
        store.drop([])
        assert content(cache) == before
        with (
            mock.patch.object(Path, "unlink", side_effect=[None, KeyboardInterrupt]) as unlink,
            pytest.raises(KeyboardInterrupt),
        ):
            store.drop(stale)
        assert unlink.call_count == 2
        store.drop(stale)
    assert sorted(content(cache)) == [shard_name(0), shard_name(2)]


def test_free_names_are_the_lowest_that_are_free(cache: Path) -> None:
    (cache / shard_name(1)).unlink()
    with open_store(cache, DATASET) as store:
        names = store.free_names()
        assert [next(names) for _ in range(3)] == [shard_name(n) for n in (1, 3, 4)]


def test_shards_that_another_machine_wrote_are_waited_for(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.wait_for({shard_name(0), shard_name(2)})
    later = [whole_shards(store.folder)[:1]] * 2 + [whole_shards(store.folder)]
    monkeypatch.setattr(module, "whole_shards", lambda folder: later.pop(0))
    naps: list[float] = []
    monkeypatch.setattr(module.time, "sleep", naps.append)
    store.wait_for({shard_name(0), shard_name(1)})
    assert len(naps) == 2
    monkeypatch.undo()
    with pytest.raises(MissingError, match=r"tiny.*regions-00007\.h5"):
        store.wait_for({shard_name(0), shard_name(7)}, patience=0)


def test_the_index_is_written_only_if_it_changes(cache: Path) -> None:
    index = cache / "index.parquet"
    before = index.stat().st_mtime_ns
    assert complete(cache) == []
    assert index.stat().st_mtime_ns == before
    for damage in (lambda: index.write_bytes(b"damaged"), index.unlink):
        damage()
        assert complete(cache) == []
        assert len(read_index(cache).row) == 12
    # Older than the shards, as a killed run leaves it.
    older = index.read_bytes()
    (cache / shard_name(1)).unlink()
    complete(cache)
    (cache / shard_name(2)).unlink()
    with open_store(cache, DATASET) as store:
        store.finish(COMMON, store.survey(COMMON, IMAGES))
    index.write_bytes(older)
    with open_store(cache, DATASET) as store:
        store.finish(COMMON, store.survey(COMMON, IMAGES))
    assert [entry.name for entry in read_index(cache).shards] == [shard_name(0), shard_name(1)]


def test_failures_are_written_before_the_index(store: ShardStore) -> None:
    failures = [Failure("image-12", "12.jpg", "broken"), Failure("image-12", "12.jpg", "also")]
    store.drop_index()
    survey = store.survey(COMMON, IMAGES)
    with (
        mock.patch.object(module, "write_index", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        store.finish(COMMON, survey, failures)
    assert list(read_failures(store.folder)) == ["image-12"]
    written = store.finish(COMMON, survey, failures)
    assert [failure.reason for failure in written] == ["also"]
    assert store.finish(COMMON, survey) == []
    assert read_failures(store.folder) == {}


def test_without_shards_there_is_no_index(store: ShardStore) -> None:
    for path in whole_shards(store.folder):
        path.unlink()
    store.finish(COMMON, store.survey(COMMON, IMAGES))
    assert list(store.folder.iterdir()) == []


def read_if_complete(folder: Path) -> None:
    """Open the folder as a reader does: it is refused, or it holds all rows."""
    images = IMAGES.digest(np.arange(12), np.zeros(12, np.int16))
    try:
        cache = RegionCache.open(folder, {**COMMON, "images": images})
    except (DamagedError, MissingError):
        return
    assert cache.gather(np.arange(12)).image_id.tolist() == [b"image-%d" % n for n in range(12)]


def test_a_process_that_is_killed_at_any_moment_costs_nothing_that_is_whole(folder: Path) -> None:
    """It stops before and after each rename, and at each removal, while it replaces a shard."""
    complete(folder)
    rewrite(folder / shard_name(1), m=4)
    (folder / shard_name(2)).unlink()
    start = folder.with_name("start")
    shutil.copytree(folder, start)
    complete(folder, replace=True)
    whole = content(folder)
    stops = 0
    for owner, name in ((files.os, "fsync"), (files, "fsync_folder"), (Path, "unlink")):
        original = getattr(owner, name)
        for moment in range(1, 99):
            shutil.rmtree(folder)
            shutil.copytree(start, folder)
            calls = 0

            def stopping(*arguments: object, moment: int = moment, original: object = original,
                         **options: object) -> object:  # fmt: skip
                nonlocal calls
                calls += 1
                if calls == moment:
                    raise KeyboardInterrupt
                return original(*arguments, **options)  # type: ignore[operator]

            try:
                with mock.patch.object(owner, name, stopping):
                    complete(folder, replace=True)
                break
            except KeyboardInterrupt:
                stops += 1
            read_if_complete(folder)
            (folder / "regions-00007.h5.0123abcd.tmp").write_bytes(b"unfinished")
            complete(folder, replace=True)
            assert content(folder) == whole
    assert stops >= 10
