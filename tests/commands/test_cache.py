"""`gmpipe cache info|verify|estimate`, on the finished flow of 60 rows in 6 shards of 10."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import write_other_weights
from caches import cut, flip_bit
from clusters import worker_in_this_process
from flows import Flow

from pipeline import files
from pipeline.shards.failures import Failure, write_failures
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import RegionRows
from pipeline.shards.shard import map_shard, read_header, whole_shards, write_shard


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    with worker_in_this_process():
        yield


def rows_of(flow: Flow) -> RegionRows:
    """All rows, ordered by id and view."""
    cache = RegionCache.open(flow / "cache/tiny")
    order = np.lexsort([cache.views, np.array(cache.ids)])
    return cache.gather(order)


def same_rows(one: Flow, other: Flow) -> bool:
    """Whether two caches hold the same rows, bit for bit."""
    pair = rows_of(one), rows_of(other)
    return all(
        np.array_equal(getattr(pair[0], field), getattr(pair[1], field))
        for field in RegionRows.__dataclass_fields__
    )


def test_info_says_what_the_cache_holds(made: Flow) -> None:
    said = made.ok("cache", "info")
    assert re.search(r"rows +60, .*6 shards.* [\d.]+ kB", said)
    assert re.search(r"regions of a row +4\n", said)
    assert re.search(r"feature +8 x float16\n", said)
    assert re.search(r"vector of the whole view +16 bytes a row, 960 bytes in total\n", said)
    assert RegionCache.open(made / "cache/tiny").fingerprint in said
    assert re.search(r"\nviews +2\n", said)


def test_a_sound_cache_passes(made: Flow) -> None:
    assert "60 rows in 6 shards, all sound" in made.ok("cache", "verify")


@pytest.mark.parametrize("field", ["features", "boxes", "scores", "classes", "count", "view"])
def test_a_damaged_row_is_named(flow: Flow, field: str) -> None:
    flip_bit(flow / "cache/tiny/regions-00001.h5", field, 3)
    said = flow.gmpipe("cache", "verify")
    # Rows 10 to 19 of the plan are both views of train-00005 to train-00009.
    assert said.refused(r"regions-00001\.h5.*row 3.*'train-00006', view 1.*--repair"), field


def test_repair_extracts_just_what_is_damaged(flow: Flow, made: Flow) -> None:
    """A damaged row, a missing and a truncated shard cost 21 of 60 rows."""
    folder = flow / "cache/tiny"
    flip_bit(folder / "regions-00001.h5", "features", 3)
    (folder / "regions-00002.h5").unlink()
    path = folder / "regions-00003.h5"
    path.write_bytes(path.read_bytes()[:2000])
    said = flow.gmpipe("cache", "verify")
    assert said.refused(r"regions-00001\.h5: row 3.*regions-00002\.h5.*regions-00003\.h5")
    before = (folder / "regions-00000.h5").stat().st_mtime_ns
    assert "60 rows, 21 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert (folder / "regions-00000.h5").stat().st_mtime_ns == before
    assert "all sound" in flow.ok("cache", "verify")
    assert RegionCache.open(folder).fingerprint == RegionCache.open(made / "cache/tiny").fingerprint
    # A row is rounded differently in a batch of other rows; whole shards are the same.
    now, then = rows_of(flow), rows_of(made)
    np.testing.assert_allclose(now.boxes, then.boxes, atol=1e-4)
    np.testing.assert_allclose(now.features, then.features, atol=2e-3)


def test_repair_removes_no_shard_of_other_settings(flow: Flow) -> None:
    """Nobody knows whether the shard or the index is the older one."""
    path = flow / "cache/tiny/regions-00004.h5"
    _, rows, _ = map_shard(path)
    write_shard(path, rows, dataset="tiny", recipe={**read_header(path).recipe, "size": 96})
    assert flow.gmpipe("cache", "verify").refused(r"regions-00004\.h5.*size is 96, expected 64")
    before = flow.bytes("cache/tiny")
    said = flow.gmpipe("cache", "verify", "--repair")
    assert said.refused(r"regions-00004\.h5.*size is 96, expected 64.*gmpipe extract .*--replace")
    assert flow.bytes("cache/tiny") == before


def test_repair_without_lost_rows_extracts_none(flow: Flow, made: Flow) -> None:
    """A bit between the arrays changes the file, but no row."""
    path = flow / "cache/tiny/regions-00005.h5"
    header, rows, _ = map_shard(path)
    used = np.zeros(path.stat().st_size, bool)
    for field, offset in header.offsets.items():
        array = getattr(rows, field, None)
        used[offset : offset + (40 if array is None else array.nbytes)] = True
    content = bytearray(path.read_bytes())
    first = min(header.offsets.values())
    gaps = np.flatnonzero(~used[first:]) + first
    # HDF5's own structures lie in some of the gaps: take one where the header stays readable.
    for byte in gaps[::-1]:
        content[byte] ^= 1
        path.unlink()
        path.write_bytes(content)
        outcome = flow.gmpipe("cache", "verify")
        if outcome.code == 1 and "sha256" in outcome.err and "HDF5" not in outcome.err:
            break
        content[byte] ^= 1
    assert outcome.refused(r"regions-00005\.h5.*sha256")
    assert "60 rows, 0 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert "all sound" in flow.ok("cache", "verify")
    assert same_rows(flow, made)


Change = Callable[[Flow], object]
"""Something that makes a cache other than the one that the checkout asks for."""


def change_weights(flow: Flow) -> None:
    folder = flow / "data/tiny/detector"
    write_other_weights(
        folder, folder, "roi_heads.box_predictor.cls_score.bias", lambda bias: bias.add_(1)
    )


def image(flow: Flow, name: str) -> Path:
    return flow / "data/tiny/prepared/images" / f"{name}.png"


REFUSED: dict[str, tuple[Change, str]] = {
    "settings": (
        lambda flow: flow.params(extract__tiny__regions=3),
        r"regions is 4, expected 3.*gmpipe extract .*--replace",
    ),
    "views": (
        lambda flow: flow.params(extract__tiny__views=1),
        r"views is 2, expected 1.*gmpipe extract .*--replace",
    ),
    "weights": (change_weights, r"weights_sha256 is .*gmpipe extract .*--replace"),
    "detector": (
        lambda flow: shutil.rmtree(flow / "data/tiny/detector"),
        r"data/tiny/detector.*gmpipe detector --dataset tiny",
    ),
    "damaged-weights": (
        lambda flow: (flow / "data/tiny/detector/weights.pt").write_bytes(b"damaged"),
        r"weights\.pt.*gmpipe detector --dataset tiny",
    ),
    "imported": (
        lambda flow: flow.params(detector__tiny={"source": "imported"}),
        r"cache/tiny.*detector.*params\.yaml.*gmpipe import-regions",
    ),
    "changed-photograph": (
        lambda flow: shutil.copy(image(flow, "train-00000"), image(flow, "train-00009")),
        r"regions-00001\.h5.*gmpipe extract .*--replace",
    ),
    "changed-photograph-elsewhere": (
        lambda flow: shutil.copy(image(flow, "train-00000"), image(flow, "train-00012")),
        r"1 shard .*regions-00002\.h5.*gmpipe extract .*--replace",
    ),
    "missing-photograph": (
        lambda flow: image(flow, "train-00007").unlink(),
        r"train-00007.*gmpipe prepare",
    ),
    "smaller-data-set": (
        lambda flow: (flow.params(prepare__tiny__train=20), flow.ok("prepare")),
        r"regions-00004\.h5.*'train-00020'.*gmpipe extract .*--replace",
    ),
    "manifest": (
        lambda flow: (flow / "data/tiny/prepared/manifest.parquet").unlink(),
        r"manifest\.parquet.*gmpipe prepare",
    ),
}
DAMAGED: dict[str, Change] = {
    "row": lambda flow: flip_bit(flow / "cache/tiny/regions-00001.h5", "features", 3),
    "name": lambda flow: flip_bit(flow / "cache/tiny/regions-00001.h5", "image_id", 3),
    "header": lambda flow: cut(flow / "cache/tiny/regions-00001.h5", 2000),
    "index": lambda flow: cut(flow / "cache/tiny/index.parquet", 500),
    "no-index": lambda flow: (
        flip_bit(flow / "cache/tiny/regions-00001.h5", "features", 3),
        (flow / "cache/tiny/index.parquet").unlink(),
    ),
}


@pytest.mark.parametrize(
    ("damage", "change"),
    [
        pytest.param(damage, change, marks=() if "row" in damage or quick else pytest.mark.slow)
        for damage in DAMAGED
        for change in REFUSED
        for quick in [change in ("settings", "changed-photograph", "imported")]
    ],
)
def test_a_repair_that_is_refused_has_touched_nothing(flow: Flow, change: str, damage: str) -> None:
    """Else a changed setting, a missing detector or a photograph would cost the whole cache."""
    DAMAGED[damage](flow)
    spoil, pattern = REFUSED[change]
    spoil(flow)
    before = flow.bytes("cache/tiny")
    assert flow.gmpipe("cache", "verify", "--repair").refused(pattern)
    assert flow.bytes("cache/tiny") == before


@pytest.mark.slow
def test_a_repair_continues_where_a_killed_one_was(flow: Flow, made: Flow) -> None:
    """It stops at each file that it writes or removes itself; its workers go on for a moment."""
    folder = flow / "cache/tiny"
    flip_bit(folder / "regions-00001.h5", "features", 3)
    (folder / "regions-00002.h5").unlink()
    cut(folder / "regions-00003.h5", 2000)
    flip_bit(folder / "regions-00004.h5", "image_id", 9)
    start = flow.bytes("cache/tiny")
    flow.ok("cache", "verify", "--repair")
    repaired = flow.bytes("cache/tiny")
    stops = 0
    for owner, name in ((files, "fsync_folder"), (Path, "unlink")):
        original = getattr(owner, name)
        for moment in range(1, 99):
            shutil.rmtree(folder)
            folder.mkdir()
            for path, content in start.items():
                (flow / path).write_bytes(content)
            calls = 0

            def stopping(
                *arguments: Any, moment: int = moment, of: Any = original, **options: Any
            ) -> Any:
                nonlocal calls
                if threading.current_thread() is threading.main_thread():
                    calls += arguments[0].parent.name in ("tiny", "cache")
                if calls == moment:
                    calls += 1
                    raise KeyboardInterrupt
                return of(*arguments, **options)

            with mock.patch.object(owner, name, stopping):
                done = flow.gmpipe("cache", "verify", "--repair").code == 0
            if done:
                break
            stops += 1
            assert (folder / "index.parquet").exists()
            flow.ok("cache", "verify", "--repair")
            assert flow.bytes("cache/tiny") == repaired
    assert stops >= 6


@pytest.mark.parametrize("damage", [*DAMAGED])
def test_a_repair_keeps_sound_rows_whatever_else_is_damaged(
    flow: Flow, made: Flow, damage: str
) -> None:
    DAMAGED[damage](flow)
    (flow / "cache/tiny/regions-00005.h5").unlink()
    lost = {"row": 11, "name": 11, "header": 20, "index": 10, "no-index": 11}[damage]
    said = flow.ok("cache", "verify", "--repair")
    assert f"60 rows, {lost} of them extracted now" in said
    assert "all sound" in flow.ok("cache", "verify", "--repair")


def test_repair_needs_something_to_repair(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    assert flow.gmpipe("cache", "verify", "--repair").refused(r"index\.parquet.*gmpipe extract")
    assert not (flow / "cache/tiny").exists()


def test_an_index_with_wrong_rows_is_written_again(flow: Flow, made: Flow) -> None:
    path = flow / "cache/tiny/index.parquet"
    table = pq.read_table(path)
    ids = table["image_id"].to_pylist()
    ids[0], ids[2] = ids[2], ids[0]
    table = table.set_column(0, table.schema.field(0), pa.array(ids))
    path.unlink()
    pq.write_table(table, path, write_page_checksum=True)
    assert flow.gmpipe("cache", "verify").refused(r"regions-00000\.h5: row 0.*--repair")
    assert "60 rows, 0 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


def test_a_damaged_index_is_named_and_written_again(flow: Flow, made: Flow) -> None:
    (flow / "cache/tiny/index.parquet").write_bytes(b"damaged")
    assert flow.gmpipe("cache", "verify").refused(r"index\.parquet.*--repair")
    assert flow.gmpipe("train").refused(r"index\.parquet.*--repair")
    assert "60 rows, 0 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")
    (flow / "cache/tiny/index.parquet").unlink()
    assert flow.gmpipe("cache", "verify").refused(r"index\.parquet.*gmpipe extract --dataset tiny")


def damage_failures(flow: Flow) -> None:
    path = flow / "cache/tiny/failures.parquet"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_damaged_failures_are_named_and_written_again(flow: Flow, made: Flow) -> None:
    failures = [Failure("train-00003", "x.png", "broken")]  # it is not broken any more
    write_failures(flow / "cache/tiny", failures)
    damage_failures(flow)
    named = r"failures\.parquet.*`gmpipe cache verify --dataset tiny --repair`"
    for command in (["cache", "verify"], ["cache", "info"], ["train"], ["evaluate"], ["report"]):
        assert flow.gmpipe(*command).refused(named), command
    assert re.search(r"cache/tiny: damaged: .*failures\.parquet", flow.gmpipe("verify").out)
    assert "60 rows, 0 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")
    assert "all sound" in flow.ok("cache", "verify")


def test_a_repair_lists_the_images_without_regions_again(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    path, whole = image(flow, "train-00003"), image(flow, "train-00003").read_bytes()
    path.write_bytes(b"broken")
    flow.params(extract__tiny__max_failures=1)
    flow.ok("extract")
    before = flow.bytes("cache/tiny")
    damage_failures(flow)
    assert "58 rows, 0 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert flow.bytes("cache/tiny") == before
    damage_failures(flow)
    path.write_bytes(whole)
    assert "60 rows, 2 of them extracted now" in flow.ok("cache", "verify", "--repair")
    assert not (flow / "cache/tiny/failures.parquet").exists()


def test_estimate_is_what_the_cache_takes(made: Flow) -> None:
    said = made.ok("cache", "estimate", "--probe", "0")
    assert re.search(r"rows +60 \(views of 36 images\)", said)
    row_bytes = re.search(r"(\d+) bytes", said)
    assert row_bytes
    arrays = 0
    for path in whole_shards(made / "cache/tiny"):
        _, rows, checksums = map_shard(path)
        fields = [getattr(rows, field) for field in RegionRows.__dataclass_fields__]
        arrays += sum(array.nbytes for array in [*fields, checksums])
    # Ids are as wide as the shard's longest; the shards of training images have longer ones.
    assert 0 <= 60 * int(row_bytes[1]) - arrays <= 60 * len("train-") - 60 * len("test-") + 60
    assert "images/s" not in said
    assert re.search(
        r"vector of the whole view +16 bytes of each row, `extract\.tiny\.whole`", said
    )
    without = made.ok("cache", "estimate", "--probe", "0", "--set", "extract.tiny.whole=false")
    assert f" {int(row_bytes[1]) - 16} bytes" in without
    assert re.search(r"vector of the whole view +none\n", without)


def test_estimate_probes_before_there_is_a_cache(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    (flow / "data/tiny/prepared/images/train-00000.png").write_bytes(b"broken")
    said = flow.ok("cache", "estimate", "--probe", "60")
    assert re.search(r"decoding and detector +[\d.]+ images/s; the bottleneck is", said)
    assert re.search(r"time on this machine +about \d+ s", said)
    assert re.search(r"undecodable in the probe +2\n", said)  # in both of its views
    assert not (flow / "cache/tiny").exists()
    shutil.rmtree(flow / "data/tiny/detector")
    assert re.search(r"\d+ bytes", flow.ok("cache", "estimate", "--probe", "0"))
    assert flow.gmpipe("cache", "estimate").refused("gmpipe detector")
