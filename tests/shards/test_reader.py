"""Rows are gathered as they were written, and nothing damaged is ever read."""

from __future__ import annotations

import json
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import make_rows
from caches import (
    DATASET,
    RECIPE,
    RECIPE_OF_WHOLE,
    assert_same_rows,
    changed_rows,
    cut,
    with_metadata,
    write_cache,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.files import canonical_json
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import AXES, RegionRows, fingerprint, row_checksums
from pipeline.shards.shard import read_header, shard_name, write_shard


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_cache_returns_its_rows(folder: Path, dtype: str, whole: bool) -> None:
    parts = [
        make_rows(rows, feature_dtype=dtype, first=first, whole=whole)
        for rows, first in ((4, 0), (3, 98))
    ]
    rows = write_cache(folder, *parts)
    recipe = RECIPE_OF_WHOLE if whole else RECIPE
    cache = RegionCache.open(folder, recipe)
    assert (cache.dataset, cache.recipe, cache.has_whole) == (DATASET, recipe, whole)
    assert cache.fingerprint == fingerprint(recipe)
    assert (cache.regions, cache.feature_size, cache.feature_dtype) == (3, 5, dtype)
    assert cache.ids == [*(f"image-{n}" for n in (0, 1, 2, 3, 98, 99, 100))]
    assert cache.views.tolist() == [0] * len(cache) == [0] * 7
    assert_same_rows(cache.gather(np.arange(7)), rows)
    assert_same_rows(cache.gather(cache.lookup(["image-99", "image-2"])), rows.take([5, 2]))
    assert len(cache.gather([])) == 0


@pytest.mark.parametrize("field", [*AXES, "row_crc32"])
def test_a_flipped_bit_is_never_read(folder: Path, field: str) -> None:
    rows = write_cache(folder, make_rows(4, whole=True), make_rows(4, first=4, whole=True))
    path = folder / shard_name(1)
    header = read_header(path)
    with h5py.File(path, "r") as file:
        size = file[field].nbytes // header.rows
    with path.open("r+b") as stream:
        stream.seek(header.offsets[field] + 2 * size)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    cache = RegionCache.open(folder, RECIPE_OF_WHOLE)
    sound = [0, 1, 2, 3, 4, 5, 7]
    assert_same_rows(cache.gather(sound), rows.take(sound))
    for _ in range(2):
        with pytest.raises(
            DamagedError, match=r"tiny/regions-00001\.h5.*row 2.*'image-6', view 0.*is damaged"
        ):
            cache.gather([0, 6, 5])


@pytest.mark.parametrize(
    ("field", "index", "value"), [("boxes", (1, 0, 0), 2), ("whole", (1, 0), np.nan)]
)
def test_a_row_that_breaks_the_contract_is_not_read(
    folder: Path, field: str, index: tuple[int, ...], value: float
) -> None:
    broken = changed_rows(field, index, value)
    write_cache(folder, make_rows(whole=field == "whole"))
    path = folder / shard_name(0)
    with h5py.File(path, "r+") as file:
        file[field][...] = getattr(broken, field)
        file["row_crc32"][...] = row_checksums(broken)
    with pytest.raises(DamagedError, match=rf"regions-00000\.h5.*row 1.*'image-1'.*{field}\[0\]"):
        RegionCache.open(folder).gather([1])


@pytest.mark.parametrize("whole", [False, True])
def test_a_shard_of_the_other_version_is_named(folder: Path, whole: bool) -> None:
    """All shards of a cache hold the vectors of whole views, or none does."""
    write_cache(folder, make_rows(whole=whole), make_rows(first=4, whole=whole))
    path = folder / shard_name(1)
    recipe = {**(RECIPE if whole else RECIPE_OF_WHOLE), "images": path.name}
    write_shard(path, make_rows(first=4, whole=not whole), dataset=DATASET, recipe=recipe)
    with pytest.raises(MismatchError, match=r"regions-00001\.h5.*whole is "):
        reopened_without_sizes(folder, 1).gather([5])
    # Nor if its recipe is that of the cache.
    with h5py.File(path, "r+") as file:
        ours = {**(RECIPE_OF_WHOLE if whole else RECIPE), "images": path.name}
        file.attrs["recipe"] = np.bytes_(canonical_json(ours))
        file.attrs["fingerprint"] = np.bytes_(fingerprint(ours))
    with pytest.raises(DamagedError, match=r"regions-00001\.h5.*`whole: true`.*version"):
        reopened_without_sizes(folder, 1).gather([5])


def test_an_index_that_lists_other_shards_is_refused(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    recipe = {**RECIPE, "images": path.name}
    rewrite = {"dataset": DATASET, "recipe": recipe}
    write_shard(path, make_rows().take([1, 0, 2, 3]), **rewrite)
    with pytest.raises(
        DamagedError, match=r"regions-00000\.h5.*row 0.*'image-0'.*index\.parquet.*'image-1'"
    ):
        RegionCache.open(folder).gather([0])
    write_shard(path, make_rows(), dataset=DATASET, recipe={**recipe, "m": 4})
    with pytest.raises(MismatchError, match=r"regions-00000\.h5.*m is 4, expected 3"):
        RegionCache.open(folder).gather([0])
    other = {**RECIPE, "images": "regions-00001.h5"}
    write_shard(path, make_rows(), dataset=DATASET, recipe=other)
    with pytest.raises(MismatchError, match=rf"regions-00000\.h5.*{fingerprint(other)}"):
        reopened_without_sizes(folder).gather([0])
    write_shard(path, make_rows(regions=4), **rewrite)
    with pytest.raises(MismatchError, match=r"regions-00000\.h5.*4, 'tiny', 4.*4, 'tiny', 3"):
        reopened_without_sizes(folder).gather([0])


def reopened_without_sizes(folder: Path, number: int = 0) -> RegionCache:
    """A cache whose index gives the size that a shard has now."""
    path = folder / "index.parquet"
    table = pq.read_table(path, partitioning=None)
    about = json.loads(table.schema.metadata[b"gmpipe"])
    about["shards"][number]["bytes"] = (folder / shard_name(number)).stat().st_size
    pq.write_table(with_metadata(table, about), path)
    return RegionCache.open(folder)


def test_a_truncated_or_missing_shard_is_noticed_on_opening(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    size = path.stat().st_size
    cut(path, size - 1)
    with pytest.raises(DamagedError, match=rf"regions-00000\.h5.*{size - 1} bytes.*{size}"):
        RegionCache.open(folder)
    path.unlink()
    with pytest.raises(MissingError, match=r"regions-00000\.h5.*index\.parquet"):
        RegionCache.open(folder)


def test_missing_images_are_named_and_counted(folder: Path) -> None:
    write_cache(folder, make_rows(2), make_rows(1, view=1))
    cache = RegionCache.open(folder)
    assert cache.lookup(["image-1", "image-0", "image-1"]).tolist() == [1, 0, 1]
    assert cache.lookup(["image-0"], view=1).tolist() == [2]
    assert cache.lookup([]).tolist() == []
    with pytest.raises(MissingError, match=r"view 0.*'x'.*2 of 3 images"):
        cache.lookup(["image-0", "x", "y"])
    with pytest.raises(MissingError, match=r"view 1.*'image-1'.*1 of 1 images"):
        cache.lookup(["image-1"], view=1)


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_outside_the_cache_is_an_index_error(folder: Path, row: int) -> None:
    write_cache(folder, make_rows())
    with pytest.raises(IndexError, match=re.escape(f"row {row} of a cache of 4 rows")):
        RegionCache.open(folder).gather([0, row])


def test_a_cache_pickles_without_its_maps(folder: Path) -> None:
    rows = write_cache(folder, make_rows(rows=40, feature_size=1000))
    cache = RegionCache.open(folder)
    cache.gather(np.arange(40))
    stored = pickle.dumps(cache)
    assert len(stored) < rows.features.nbytes / 10
    copy = pickle.loads(stored)
    assert_same_rows(copy.gather([39, 0]), rows.take([39, 0]))
    # The copy checks every row again, in the process that reads it.
    header = read_header(folder / shard_name(0))
    with (folder / shard_name(0)).open("r+b") as stream:
        stream.seek(header.offsets["features"])
        stream.write(b"\xff")
    with pytest.raises(DamagedError, match="is damaged"):
        pickle.loads(stored).gather([0])


def test_mapped_shards_keep_no_files_open(folder: Path) -> None:
    rows = write_cache(folder, *(make_rows(2, first=2 * part) for part in range(40)))
    cache = RegionCache.open(folder)
    cache.gather([0])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 20, limit[1])
    )
    try:
        assert_same_rows(cache.gather(np.arange(80)[::-1]), rows.take(np.arange(80)[::-1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_shard_that_changes_after_opening_is_refused(folder: Path) -> None:
    write_cache(folder, make_rows(), make_rows(first=4))
    cache = RegionCache.open(folder, remedy="Restore it.")
    path = folder / shard_name(1)
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(DamagedError, match=rf"regions-00001\.h5.*{size + 4} bytes.*{size}"):
        cache.gather([4])
    path.unlink()
    with pytest.raises(MissingError, match=r"regions-00001\.h5.*Restore it\."):
        cache.gather([4])


def test_rows_are_read_unchecked_only_on_request(folder: Path) -> None:
    write_cache(folder, make_rows())
    path = folder / shard_name(0)
    with path.open("r+b") as stream:
        stream.seek(read_header(path).offsets["scores"])
        stream.write(b"\xff")
    assert RegionCache.open(folder, check_rows=False).gather([0]).scores.view(np.uint8)[0, 0] == 255
    with pytest.raises(DamagedError, match="is damaged"):
        RegionCache.open(folder).gather([0])


ANONYMOUS_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from pipeline.shards.reader import RegionCache

def anonymous():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return 1024 * int(line.split()[1])

def read(folder):
    cache = RegionCache.open(folder)
    cache.lookup([f"image-{number}" for number in range(len(cache))])
    for start in range(0, len(cache), 32):
        cache.gather(np.arange(start, min(start + 32, len(cache))))
    return cache

small, large = map(Path, sys.argv[1:])
caches = [read(small)]
before = anonymous()
caches.append(read(large))
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_a_reader_takes_little_memory_of_its_own_for_each_row(tmp_path: Path) -> None:
    rows = 100_000  # what the second cache takes whatever its size, 3 MB, is little beside it
    for name, count in (("small", 1000), ("large", rows)):
        parts = [
            make_rows(1000, regions=1, feature_size=1, first=first)
            for first in range(0, count, 1000)
        ]
        write_cache(tmp_path / name, *parts)
    command = [sys.executable, "-c", ANONYMOUS_MEMORY, tmp_path / "small", tmp_path / "large"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 150 * rows


@pytest.fixture(scope="module")
def read_often(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegionCache, RegionRows]:
    folder = tmp_path_factory.mktemp("cache") / DATASET
    parts = (
        make_rows(5, whole=True),
        make_rows(1, first=5, whole=True),
        make_rows(6, view=1, whole=True),
    )
    rows = write_cache(folder, *parts)
    return RegionCache.open(folder), rows


@given(numbers=st.lists(st.integers(0, 11), max_size=30))
def test_gathered_rows_equal_their_source(
    read_often: tuple[RegionCache, RegionRows], numbers: list[int]
) -> None:
    cache, rows = read_often
    assert_same_rows(cache.gather(numbers), rows.take(numbers))
