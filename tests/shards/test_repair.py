"""Repairs of a folder of shards: what is kept and what is refused, decided before anything changes.

The folder is that of test_store.py: three shards of four rows.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from builders import make_rows
from caches import DATASET, cut, flip_bit
from test_store import COMMON, IMAGES, PER_SHARD, ChangedImages, complete, content, rewrite

from pipeline.errors import AccessError
from pipeline.shards.index import read_index
from pipeline.shards.repair import plan_repair
from pipeline.shards.shard import shard_name, whole_shards, write_shard
from pipeline.shards.store import ImagesById, WantedImages, open_store
from pipeline.shards.verification import verify_cache


@pytest.fixture
def cache(folder: Path) -> Path:
    """A finished folder."""
    complete(folder)
    return folder


class Photographs:
    """Images that are known by more than their ids: they may have changed."""

    def __init__(self, images: ImagesById) -> None:
        self.numbers, self.digest, self._images = images.numbers, images.digest, images

    def __len__(self) -> int:
        return len(self._images)


def repair(folder: Path, images: WantedImages = IMAGES, *, with_index: bool = True) -> list[str]:
    """Repair a folder, and return the names of the shards that are left. The index stays."""
    before = content(folder)
    index = read_index(folder) if with_index else None
    with open_store(folder, DATASET) as store:
        plan = plan_repair(store, index, verify_cache(folder, index), COMMON, images)
        assert content(folder) == before
        assert list(plan.stale) == []
        plan.carry_out()
    assert content(folder).get("index.parquet") == before.get("index.parquet")
    return [path.name for path in whole_shards(folder)]


def stale(folder: Path, images: WantedImages = IMAGES, *, with_index: bool = True) -> list[str]:
    """Names of the shards that keep a repair from touching anything."""
    index = read_index(folder) if with_index else None
    with open_store(folder, DATASET) as store:
        plan = plan_repair(store, index, verify_cache(folder, index), COMMON, images)
    return [shard.path.name for shard in plan.stale]


def held(folder: Path) -> list[int]:
    """Numbers of the images that the current shards hold. None may be stale."""
    with open_store(folder, DATASET) as store:
        survey = store.survey(COMMON, IMAGES)
    assert survey.stale == ()
    return survey.numbers.tolist()


@pytest.mark.parametrize("with_index", [True, False])
def test_repair_keeps_all_sound_rows(cache: Path, with_index: bool) -> None:
    flip_bit(cache / shard_name(0), "features", 2)
    cut(cache / shard_name(1), 900)
    if not with_index:
        (cache / "index.parquet").unlink()
    assert repair(cache, with_index=with_index) == [shard_name(0), shard_name(2)]
    assert held(cache) == [0, 1, 3, 8, 9, 10, 11]
    # Again, as after a kill: the shard that was written is not the one of the index, but sound.
    before = content(cache)
    repair(cache, with_index=with_index)
    assert content(cache) == before


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("field", ["image_id", "view"])
def test_repair_keeps_the_other_rows_if_a_row_lost_its_name(
    cache: Path, field: str, with_index: bool
) -> None:
    """These images are known by their ids only, so they can't have changed."""
    flip_bit(cache / shard_name(1), field, 2)
    if not with_index:
        (cache / "index.parquet").unlink()
    repair(cache, with_index=with_index)
    assert held(cache) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_a_row_that_lost_its_name_costs_its_shard_if_nobody_knows_it(cache: Path) -> None:
    """Without an index, for images that may have changed."""
    flip_bit(cache / shard_name(1), "image_id", 2)
    (cache / "index.parquet").unlink()
    assert repair(cache, Photographs(IMAGES), with_index=False) == [shard_name(0), shard_name(2)]


def test_repair_keeps_unlisted_shards_that_belong_to_the_cache(cache: Path) -> None:
    older = (cache / "index.parquet").read_bytes()
    more = ImagesById([f"image-{n}" for n in range(20)])
    for number, recipe in ((3, {}), (4, {"m": 4})):
        first = 4 * number
        digest = more.digest(np.arange(first, first + 4), np.zeros(4, np.int16))
        write_shard(
            cache / shard_name(number),
            make_rows(4, first=first),
            dataset=DATASET,
            recipe={**COMMON, "images": digest, **recipe},
        )
    (cache / "index.parquet").write_bytes(older)
    # One of other settings may be a whole cache's: it is not for a repair to drop.
    assert stale(cache, more) == [shard_name(4)]
    (cache / shard_name(4)).unlink()
    assert repair(cache, more) == [shard_name(number) for number in range(4)]


def test_of_two_shards_with_the_same_rows_the_unlisted_one_goes(cache: Path) -> None:
    (cache / shard_name(0)).rename(cache / shard_name(7))
    complete(cache)
    (cache / shard_name(7)).unlink()
    complete(cache)
    shutil.copy(cache / shard_name(2), cache / shard_name(6))
    assert repair(cache) == [shard_name(number) for number in range(3)]


@pytest.mark.parametrize("with_index", [True, False])
def test_repair_refuses_shards_whose_images_changed(cache: Path, with_index: bool) -> None:
    flip_bit(cache / shard_name(1), "features", 2)
    flip_bit(cache / shard_name(2), "features", 2)
    if not with_index:
        (cache / "index.parquet").unlink()
    for image, shard in ((6, 1), (2, 0)):
        changed = Photographs(ChangedImages(image))
        assert stale(cache, changed, with_index=with_index) == [shard_name(shard)]


def test_repair_refuses_an_unreadable_shard_whose_images_changed(cache: Path) -> None:
    cut(cache / shard_name(1), 900)
    assert stale(cache, Photographs(ChangedImages(6))) == [shard_name(1)]
    assert stale(cache, ImagesById([f"image-{n}" for n in range(11)])) == [shard_name(2)]


def test_repair_drops_a_shard_without_any_sound_row(cache: Path) -> None:
    for row in range(PER_SHARD):
        flip_bit(cache / shard_name(1), "boxes", row)
    assert repair(cache) == [shard_name(0), shard_name(2)]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_sound_shard_of_other_settings_is_never_dropped(cache: Path, with_index: bool) -> None:
    """Not even if the index lists another one: it may be the index that is old."""
    rewrite(cache / shard_name(1), m=4)
    assert stale(cache, with_index=with_index) == [shard_name(1)]


def test_repair_touches_nothing_if_the_system_can_not_read_a_shard(cache: Path) -> None:
    """As another user's; root may read everything."""
    flip_bit(cache / shard_name(2), "features", 2)
    before = content(cache)
    path = cache / shard_name(1)
    original = os.open

    def denied(name: Any, *arguments: Any, **options: Any) -> int:
        if Path(os.fsdecode(name)) == path:
            raise PermissionError(13, "Permission denied", str(name))
        return original(name, *arguments, **options)

    index = read_index(cache)
    with mock.patch.object(os, "open", denied):
        damages = verify_cache(cache, index)
        assert (shard_name(1), "inaccessible") in [(one.shard, one.kind) for one in damages]
        with (
            open_store(cache, DATASET) as store,
            pytest.raises(AccessError, match=r"regions-00001\.h5.*Permission denied"),
        ):
            plan_repair(store, index, damages, COMMON, IMAGES)
    assert content(cache) == before
