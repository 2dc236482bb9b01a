"""Regions that were made elsewhere become rows of a shard, best first, or are refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from region_files import make_arrays, make_lines, write_tsv

from pipeline.errors import InputError
from pipeline.shards.imports import BottomUpFiles, ImageRegions, NpzFile, region_rows
from pipeline.shards.schema import RegionRows


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6), st.integers(1, 7))
def test_the_best_regions_are_stored_in_descending_order(scores: list[float], regions: int) -> None:
    """Scores tie; every other number of a region shows its position in the file."""
    n = len(scores)
    features = np.arange(n * 3).reshape(n, 3) / 4
    boxes = np.arange(n)[:, None] / 16 + np.array([0, 0.25, 0.5, 0.5])
    image = ImageRegions("here", features, boxes, np.array(scores), np.arange(n) * 100)
    rows = region_rows([image], ["a"], regions=regions, feature_size=3, feature_dtype="float16")
    rows.check()
    best = sorted(range(n), key=lambda region: -scores[region])[:regions]  # stable
    assert (rows.image_id.tolist(), rows.count.tolist()) == ([b"a"], [len(best)])
    columns = (rows.scores[0], rows.features[0], rows.boxes[0], rows.classes[0])
    kept = list(zip(*(column.tolist() for column in columns), strict=True))
    assert kept[: len(best)] == [
        (scores[r], features[r].tolist(), boxes[r].tolist(), r * 100 + 1) for r in best
    ]


def test_regions_of_equal_scores_stay_in_the_order_of_the_file() -> None:
    """Enough regions that numpy's default sort would not keep their order."""
    n = 100
    image = ImageRegions(
        "here",
        np.arange(n, dtype=np.float32)[:, None],
        np.zeros((n, 4)),
        np.arange(n) % 2,
        np.zeros(n, np.int64),
    )
    rows = region_rows([image], ["a"], regions=n, feature_size=1, feature_dtype="float16")
    assert rows.features.ravel().tolist() == [*range(1, n, 2), *range(0, n, 2)]


def one_region(**changes: Any) -> ImageRegions:
    """An image of two regions, the better one last."""
    sound = {
        "features": np.array([[1, 2], [3, 4]], np.float32),
        "boxes": np.array([[0, 0, 1, 1], [0, 0.5, 0.5, 1]], np.float32),
        "scores": np.array([0.25, 0.5], np.float32),
        "classes": np.array([0, 7], np.int64),
    }
    return ImageRegions("line 1", **{**sound, **changes})


def stored(image: ImageRegions, feature_dtype: str = "float16") -> RegionRows:
    return region_rows([image], ["a"], regions=2, feature_size=2, feature_dtype=feature_dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.array([[1, 2], [3, np.nan]])}, r"features\[1\]\[1\].*nan"),
        ({"scores": np.array([np.inf, 0])}, r"scores\[0\].*inf"),
        ({"scores": np.array([0, 1e300])}, r"scores\[1\].*1e\+300"),
        ({"boxes": np.array([[0, 0, 1, 1], [0, np.nan, 1, 1]])}, r"boxes\[1\]\[1\].*nan"),
        ({"boxes": np.array([[0, 0, 1, 1], [0, 0, 1.5, 1]])}, r"boxes\[1\].*1\.5.*\[0, 1\]"),
        ({"boxes": np.array([[-0.5, 0, 1, 1], [0, 0, 1, 1]])}, r"boxes\[0\].*-0\.5.*\[0, 1\]"),
        ({"boxes": np.array([[0, 0, 1, 1], [0.5, 0, 0.25, 1]])}, r"boxes\[1\].*x0 <= x1"),
        ({"boxes": np.array([[0, 1, 1, 0.5], [0, 0, 1, 1]])}, r"boxes\[0\].*y0 <= y1"),
        ({"classes": np.array([-2, 3])}, r"classes\[0\].*-2.*0 to 32766"),
        ({"classes": np.array([0, 32767])}, r"classes\[1\].*32767.*0 to 32766"),
    ],
)
def test_a_region_that_can_not_be_is_named(changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^line 1: {message}"):
        stored(one_region(**changes))


def test_a_feature_too_large_for_its_type_is_named_with_the_type_that_holds_it() -> None:
    image = one_region(features=np.array([[1, 2], [3, 70000]], np.float32))
    with pytest.raises(
        InputError, match=r"^line 1: features\[1\]\[1\].*70000\.0.*65504.*feature_dtype.*float32"
    ):
        stored(image)
    assert stored(image, "float32").features.tolist() == [[[3, 70000], [1, 2]]]
    with pytest.raises(InputError, match=r"features\[0\]\[0\].*1e\+39"):
        stored(one_region(features=np.array([[1e39, 2], [3, 4]])), "float32")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_the_last_class_of_a_narrow_type_has_a_next_one(dtype: str) -> None:
    last = min(np.iinfo(dtype).max, 32766)
    classes = stored(one_region(classes=np.array([last, 0], dtype))).classes
    assert classes.tolist() == [[1, last + 1]]


# Memory ------------------------------------------------------------------------------------------


def peak(run: Callable[[], object]) -> int:
    """Most bytes that Python and numpy allocate while ``run`` runs."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_files_are_read_as_streams(tmp_path: Path) -> None:
    """Files of 20 MB take 2 MB of memory: a chunk, a line or an image at a time."""
    lines = make_lines(1, size=40_000) * 100
    for number, line in enumerate(lines):
        lines[number] = {**line, "image_id": str(number)}
    tsv = write_tsv(tmp_path / "a.tsv", lines)
    npz = tmp_path / "a.npz"
    np.savez(npz, **make_arrays(300, slots=2, size=16_000))
    for path in (tsv, npz):
        assert path.stat().st_size > 19e6

    def drain(source: NpzFile | BottomUpFiles) -> None:
        for _ in source.read(np.arange(len(source.counts))):
            pass

    bottom_up: list[BottomUpFiles] = []
    assert peak(lambda: bottom_up.append(BottomUpFiles.open([tsv]))) < 4e6
    assert peak(lambda: drain(bottom_up[0])) < 4e6
    arrays: list[NpzFile] = []
    assert peak(lambda: arrays.append(NpzFile.open(npz))) < 4e6
    assert peak(lambda: drain(arrays[0])) < 4e6
