"""Batches of a split are the same however they are read; the bounds of the memory they use.

`toys` describes the toy problem and its letters.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import N_TRAIN, VIEWS, D, M, Toy

from pipeline.heads.contract import RegionBatch
from pipeline.learning import batches as batches_module
from pipeline.learning.batches import Batch, Feed, input_statistics
from pipeline.learning.splits import SplitData
from pipeline.machine import available_memory
from pipeline.shards.schema import RegionRows

CPU = torch.device("cpu")


@dataclass(frozen=True)
class WithWholeViews:
    """The toy problem's cache, with a vector of each whole view."""

    toy: Toy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.toy.cache, name)

    def gather(self, rows: np.ndarray) -> RegionRows:
        vectors = np.random.default_rng(8).normal(3, 2, (len(self.toy.cache), D))
        return replace(self.toy.cache.gather(rows), whole=vectors[rows].astype(np.float16))


def with_whole_views(toy: Toy) -> SplitData:
    return replace(toy.train, cache=WithWholeViews(toy))  # type: ignore[arg-type]


FEEDS = {
    "in memory": {},
    "gathered": {"once": True},
}


@pytest.mark.parametrize("form", FEEDS)
@pytest.mark.parametrize("chunk", [N_TRAIN, 5, 1])
def test_statistics_are_of_the_real_regions_of_view_0(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, chunk: int, form: str
) -> None:
    monkeypatch.setattr(batches_module, "_CHUNK_BYTES", chunk * M * D * 8 + 1)
    asked: list[int] = []
    original = Feed.in_order

    def counted(feed: Feed, size: int) -> Generator[Batch]:
        asked.append(size)
        return original(feed, size)

    monkeypatch.setattr(Feed, "in_order", counted)
    statistics = input_statistics(Feed(toy.train, CPU, **FEEDS[form]))
    assert asked == [chunk]
    rows = toy.cache.gather(toy.train.rows[:, 0])
    real = np.arange(M) < rows.count[:, None]
    features, boxes = rows.features[real].astype(np.float64), rows.boxes[real].astype(np.float64)
    assert real.sum() < real.size
    for ours, expected in (
        (statistics.feature_mean, features.mean(0)),
        (statistics.feature_std, features.std(0)),
        (statistics.box_mean, boxes.mean(0)),
        (statistics.box_std, boxes.std(0)),
    ):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert statistics.classes == 1 + max(rows.classes[real].tolist())
    assert (statistics.whole_mean, statistics.whole_std) == (None, None)


@pytest.mark.parametrize("form", FEEDS)
def test_statistics_of_whole_views_are_over_the_images_in_view_0(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(batches_module, "_CHUNK_BYTES", 5 * M * D * 8 + 1)
    split = with_whole_views(toy)
    statistics = input_statistics(Feed(split, CPU, **FEEDS[form]))
    stored = split.cache.gather(split.rows[:, 0]).whole
    assert stored is not None
    vectors = stored.astype(np.float64)
    for ours, expected in (
        (statistics.whole_mean, vectors.mean(0)),
        (statistics.whole_std, vectors.std(0)),
    ):
        assert ours is not None
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)
    without = input_statistics(Feed(toy.train, CPU, **FEEDS[form]))
    assert torch.equal(statistics.feature_mean, without.feature_mean)
    assert statistics.classes == without.classes


def test_the_number_of_classes_follows_the_largest_class(toy: Toy) -> None:
    """One more than it, as 0 stands for none. Padding has class 0."""

    class Numbered(WithWholeViews):
        def gather(self, rows: np.ndarray) -> RegionRows:
            stored = self.toy.cache.gather(rows)
            return replace(stored, classes=np.where(stored.classes > 0, 40, 0).astype(np.int16))

    split = replace(toy.train, cache=Numbered(toy))  # type: ignore[arg-type]
    assert input_statistics(Feed(split, CPU)).classes == 41


def equal(one: Batch, other: Batch) -> bool:
    """Bit for bit, types included."""
    pairs = [
        *((getattr(one[0], f.name), getattr(other[0], f.name)) for f in fields(RegionBatch)),
        (one[1], other[1]),
    ]
    return all((a is b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@settings(max_examples=30)
@given(data=st.data(), whole=st.booleans())
def test_batches_from_memory_and_from_shards_are_the_same(
    toy: Toy, data: st.DataObject, whole: bool
) -> None:
    split = with_whole_views(toy) if whole else toy.train
    indices = st.lists(st.integers(0, N_TRAIN - 1), min_size=1, max_size=5)
    chosen = []
    for _ in range(data.draw(st.integers(0, 8))):
        images = np.array(data.draw(indices))
        views = data.draw(
            st.lists(st.integers(0, VIEWS - 1), min_size=len(images), max_size=len(images))
        )
        chosen.append((images, np.array(views)))
    in_memory, gathered = (
        list(Feed(split, CPU, **options).batches(chosen)) for options in FEEDS.values()
    )
    assert len(in_memory) == len(gathered) == len(chosen)
    for (images, views), one, other in zip(chosen, in_memory, gathered, strict=True):
        assert equal(one, other)
        assert equal(one, (split.instances(images, views).to(CPU, torch.float32), other[1]))
        assert (one[0].whole is not None) == whole
        assert other[1].tolist() == toy.train.truth[images].tolist()


def test_regions_are_kept_in_memory_only_where_they_fit(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the toy problem: 3 regions x (6 x 2 + 4 x 4 + 4 + 2 + 1 bytes) = 105 bytes."""
    need = N_TRAIN * VIEWS * 105
    asked: list[int] = []
    original = SplitData.instances

    def counted(split: SplitData, images: np.ndarray, views: Any = 0) -> RegionBatch:
        asked.append(len(images))
        return original(split, images, views)

    monkeypatch.setattr(SplitData, "instances", counted)
    for memory, sharers, kept in (
        (2 * need, 1, True),
        (2 * need - 1, 1, False),
        (4 * need, 2, True),
        (4 * need - 1, 2, False),
    ):
        monkeypatch.setattr(batches_module, "available_memory", lambda memory=memory: memory)
        feed = Feed(toy.train, CPU, sharers=sharers)
        asked.clear()
        list(feed.in_order(10))
        assert asked == ([] if kept else [10, 10, 10, 10, 2])


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 1000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max"}, 1000 * 1024),
        # The tightest of the groups around the process counts; idle page cache is free.
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max\n",
                "a/memory.max": "5000\n",
                "a/memory.current": "4500\n",
                "a/memory.stat": "anon 9\ninactive_file 300\n",
            },
            800,
        ),
        # Version 1, in a container that sees its group as the root.
        (
            "5:cpu:/x\n4:memory:/of/the/host\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "7000\n",
                "memory/memory.usage_in_bytes": "9000\n",
                "memory/memory.stat": "total_inactive_file 0\n",
            },
            0,
        ),
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "9000\n",
                "memory/memory.stat": "total_inactive_file 0\n",
            },
            1000 * 1024,
        ),
    ],
)
def test_available_memory_is_what_the_tightest_group_leaves(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    text = "MemTotal: 9000 kB\nMemAvailable:    1000 kB\nBuffers: 1 kB\n"
    (tmp_path / "proc/meminfo").write_text(text)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert available_memory(tmp_path) == expected


def test_this_machine_has_memory_available() -> None:
    assert available_memory() > 2**20
