"""SIGKILL for everything that writes the cache, at seeded moments of each command: 8, or 20 with
the environment variable GMPIPE_ALL_CASES.

Half of the moments are spread over the whole command, and half over the time in which it writes.
The whole process group is killed, so that workers die as well. Then the same command runs again.
The cache must be the one of a command that was never killed, byte for byte.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from caches import cut, flip_bit, rows_of
from clusters import worker_in_this_process
from flows import ALL_CASES, BIN, Flow
from region_files import make_arrays, write_npz

from pipeline.shards.shard import whole_shards

pytestmark = pytest.mark.slow

KILLS = 20 if ALL_CASES else 8


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    """The commands that are not killed run in this process, which saves the start of a worker."""
    with worker_in_this_process():
        yield


def state(folder: Path) -> list[tuple[str, int]]:
    """What is in a folder, and when it was written. A file may vanish while this looks."""
    try:
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class Timing:
    """When a command first changes its folder, and when it ends, in seconds from its start."""

    change: float
    end: float


def start(flow: Flow, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A command in a process group of its own."""
    return subprocess.Popen(
        [BIN / "gmpipe", *command],
        cwd=flow.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_change(
    flow: Flow, before: list[tuple[str, int]], run: subprocess.Popen[bytes]
) -> None:
    while state(flow / "cache/tiny") == before and run.poll() is None:
        time.sleep(0.001)


def timing(flow: Flow, command: Sequence[str]) -> Timing:
    began, before = time.monotonic(), state(flow / "cache/tiny")
    run = start(flow, command)
    wait_for_change(flow, before, run)
    change = time.monotonic() - began
    assert run.wait() == 0
    return Timing(change, time.monotonic() - began)


def killed(flow: Flow, command: Sequence[str], times: Timing, late: bool, share: float) -> bool:
    """Run a command and kill it after a share of its time, or of the time in which it writes.

    Returns:
        whether it was killed before its end.
    """
    before = state(flow / "cache/tiny")
    run = start(flow, command)
    if late:
        wait_for_change(flow, before, run)
    time.sleep(share * (times.end - times.change if late else times.end))
    os.killpg(run.pid, signal.SIGKILL)  # a group that has ended is not reaped yet
    return run.wait() == -signal.SIGKILL


def check_kills(prepared: Flow, command: Sequence[str], tmp_path: Path, kills: int = KILLS) -> None:
    """Kill a command at several moments, each in a copy of a checkout, and run it again.

    Args:
        prepared: the checkout before the command.
    """

    def copy(name: str) -> Flow:
        return Flow(Path(shutil.copytree(prepared.folder, tmp_path / name)))

    never = copy("never")
    times = timing(never, command)
    expected = never.bytes("cache/tiny")
    rows = rows_of(never / "cache/tiny")
    chance = random.Random(command[0])
    moments = [(number % 2 == 1, chance.random()) for number in range(kills)]
    flows = [copy(f"killed-{number}") for number in range(kills)]
    with ThreadPoolExecutor(2) as pool:  # of this machine's cores
        done = pool.map(lambda flow, moment: killed(flow, command, times, *moment), flows, moments)
        count = sum(done)
    kept = 0
    for flow in flows:
        folder = flow / "cache/tiny"
        whole = {
            path: path.stat().st_mtime_ns
            for path in whole_shards(folder)
            if path.read_bytes() == expected.get(f"cache/tiny/{path.name}")
        }
        kept += len(whole)
        flow.ok(*command)
        # What was whole is not written again.
        assert {path: path.stat().st_mtime_ns for path in whole} == whole
        assert rows_of(folder) == rows
        # The same files, names and bytes: no unfinished file is left, and the index is the same.
        assert flow.bytes("cache/tiny") == expected
        assert "all sound" in flow.ok("cache", "verify")
    print(f"{command}: {times}, {count} of {kills} killed before the end, {kept} shards kept")
    assert count >= kills // 2


def test_kills_of_extract(flow: Flow, made: Flow, tmp_path: Path) -> None:
    shutil.rmtree(flow / "cache/tiny")
    check_kills(flow, ["extract"], tmp_path)
    assert rows_of(tmp_path / "never/cache/tiny") == rows_of(made / "cache/tiny")


@pytest.mark.parametrize(("index", "kills"), [("sound", KILLS), ("damaged", 4), ("missing", 4)])
def test_kills_of_repair(flow: Flow, tmp_path: Path, index: str, kills: int) -> None:
    folder = flow / "cache/tiny"
    flip_bit(folder / "regions-00001.h5", "features", 3)
    (folder / "regions-00002.h5").unlink()
    cut(folder / "regions-00003.h5", 2000)
    flip_bit(folder / "regions-00004.h5", "boxes", 9)
    if index == "damaged":
        cut(folder / "index.parquet", 500)
    elif index == "missing":
        (folder / "index.parquet").unlink()
    check_kills(flow, ["cache", "verify", "--repair"], tmp_path, kills)


def write_imported(flow: Flow, images: int) -> None:
    write_npz(flow.folder, **make_arrays(images))
    flow.params(
        prepare__tiny={"source": "imported"},
        detector__tiny={"source": "imported"},
        extract__tiny={"regions": 3, "rows_per_shard": 2},
    )


def test_kills_of_import_regions(tmp_path: Path) -> None:
    prepared = Flow(tmp_path / "prepared")
    prepared.folder.mkdir()
    write_imported(prepared, images=120)
    check_kills(prepared, ["import-regions", "made.npz"], tmp_path)
