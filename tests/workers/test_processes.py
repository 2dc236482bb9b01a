"""Extraction in real processes: their threads, their deaths, and those of the command.

Each has a quick twin without processes: in test_cluster.py, tests/stages/test_extract.py (Ctrl-C)
and tests/shards/test_store.py (a process that is killed at any moment).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from distributed import Client, LocalCluster
from flows import BIN, Flow, write_params

from pipeline.machine import cores
from pipeline.shards.reader import RegionCache
from pipeline.shards.shard import read_header, whole_shards
from stages.workers.cluster import open_cluster, threads_of_worker

pytestmark = pytest.mark.slow

SHARDS = [f"regions-{n:05d}.h5" for n in range(6)]


def shards(flow: Flow) -> list[str]:
    return sorted(path.name for path in (flow / "cache/tiny").glob("regions-*.h5"))


def rows_of(folder: Path) -> dict[tuple[str, int], bytes]:
    """The features of each row, by image and view."""
    cache = RegionCache.open(folder)
    rows = cache.gather(np.arange(len(cache)))
    keys = zip(cache.ids, cache.views.tolist(), strict=True)
    return {key: features.tobytes() for key, features in zip(keys, rows.features, strict=True)}


# Threads and clusters ----------------------------------------------------------------------------


def loaded_detectors() -> int:
    from stages.workers import tasks

    return len(tasks._loaded)


def test_a_worker_and_its_detector_use_all_cores(flow: Flow) -> None:
    """Dask sets OMP_NUM_THREADS=1 for its workers; the extraction asks for Dask's own count."""
    shutil.rmtree(flow / "cache/tiny")
    with open_cluster(None, {}) as client:
        assert client.submit(threads_of_worker).result() == max(2, cores())
        assert client.submit(os.environ.get, "OMP_NUM_THREADS").result() == "1"
        flow.ok("extract", "--scheduler", client.scheduler.address)
        threads = client.submit(torch.get_num_threads, pure=False).result()
        loaded = client.submit(loaded_detectors, pure=False).result()
    assert (threads, loaded) == (max(2, cores()), 1)


def test_a_worker_ends_without_a_last_garbage_collection(tmp_path: Path) -> None:
    """It takes seconds with torch, and Dask kills a worker that takes 4 s, with a warning."""
    path = tmp_path / "frozen"

    def note_at_the_end() -> None:
        atexit.register(lambda: path.write_text(str(gc.get_freeze_count())))

    with open_cluster(None, {}) as client:
        client.run(note_at_the_end)
    assert int(path.read_text()) > 100_000


def test_an_existing_cluster_gives_the_same_cache(flow: Flow, made: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            resources={"GPU": 1},
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        said = flow.ok("extract", "--scheduler", cluster.scheduler_address, "--resource", "GPU=1")
        assert "60 rows, 60 of them extracted now" in said
        assert list(client.run(loaded_detectors).values()) == [1, 1]
    # On one thread per worker, so that sums are rounded in another order.
    caches = [RegionCache.open(one / "cache/tiny") for one in (flow, made)]
    rows, expected = (cache.gather(range(len(cache))) for cache in caches)
    assert rows.image_id.tolist() == expected.image_id.tolist()
    np.testing.assert_allclose(rows.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_allclose(rows.features, expected.features, atol=2e-3)


# Kills -------------------------------------------------------------------------------------------


def start(flow: Flow, *arguments: str) -> subprocess.Popen[str]:
    """`gmpipe extract` in a process group of its own."""
    return subprocess.Popen(
        [BIN / "gmpipe", "extract", *arguments],
        cwd=flow.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A process in a shell's background ignores Ctrl-C, and so would those that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> bool:
    """Wait until ``condition`` holds; false if the run ends before."""
    while not condition():
        if run.poll() is not None:
            return condition()
        time.sleep(0.0005)
    return True


def test_ctrl_c_leaves_whole_shards(flow: Flow, made: Flow) -> None:
    for _ in range(10):  # the run may end before the signal comes
        shutil.rmtree(flow / "cache/tiny")
        run = start(flow)
        assert wait_for(lambda: len(shards(flow)) >= 1, run)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        said, _ = run.communicate(timeout=60)
        if run.returncode != 0:
            break
    assert run.returncode == 130, said
    assert "Error: stopped" in said
    assert "Traceback" not in said
    for path in whole_shards(flow / "cache/tiny"):
        read_header(path)
    flow.ok("extract")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


def workers_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes of a command."""
    workers = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended in between
            if "spawn_main" in " ".join(process.cmdline()):
                workers.append(process)
    return workers


def test_a_killed_worker_is_replaced_and_its_shards_are_extracted_again(
    flow: Flow, made: Flow
) -> None:
    for _ in range(10):  # the run may end before its worker is killed
        shutil.rmtree(flow / "cache/tiny")
        run = start(flow)
        # Looked up beforehand, since the time from the first shard to the last is short.
        assert wait_for(lambda run=run: bool(workers_of(run)), run)
        workers = workers_of(run)
        assert wait_for(lambda: len(shards(flow)) >= 1, run)
        workers[0].kill()
        done = shards(flow) == SHARDS
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 0, said
        if not done:
            break
    assert len(workers) == 1
    assert not done
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


def test_after_a_kill_at_any_moment_the_next_run_completes(flow: Flow, made: Flow) -> None:
    """SIGKILL at 20 seeded moments, half of them while a shard is open. Half of each kind goes to
    the whole group and half only to the command, whose workers then outlive it for a moment."""
    chance = random.Random(0)
    folder = flow / "cache/tiny"
    kills = dict.fromkeys(("open", "between"), 0)
    redone = 0
    while sum(kills.values()) < 20:
        wanted = "open" if kills["open"] <= kills["between"] else "between"
        if shards(flow) == SHARDS or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        before = shards(flow)
        run = start(flow)

        def is_open() -> bool:
            return any(folder.glob("regions-*.tmp"))

        target = len(before) + chance.randrange(len(SHARDS) - len(before))
        late = chance.random() * 0.05
        assert wait_for(lambda n=target: len(shards(flow)) >= n, run)
        if wanted == "open":
            caught = wait_for(is_open, run)
        else:
            time.sleep(late)
            caught = any(folder.iterdir()) and not (folder / "index.parquet").exists()
        if chance.random() < 0.5:
            os.killpg(run.pid, signal.SIGKILL)
        else:
            run.kill()
        run.communicate()
        kills[wanted] += caught
        for path in whole_shards(folder):
            read_header(path)
        # What was whole stays whole, byte for byte.
        now = flow.bytes("cache/tiny")
        then = made.bytes("cache/tiny")
        assert all(now[f"cache/tiny/{name}"] == then[f"cache/tiny/{name}"] for name in before)
        redone += len(before)
    flow.ok("extract")
    assert rows_of(folder) == rows_of(made / "cache/tiny")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")
    assert redone > 0


# Memory ------------------------------------------------------------------------------------------

MEMORY_PROBE = Path(__file__).with_name("memory_probe.py")


def test_memory_hardly_grows_with_the_rows(tmp_path: Path) -> None:
    """Anonymous memory of `extract` and of a reader at 1,000, 10,000 and 100,000 rows."""
    peaks: dict[str, list[int]] = {"extract": [], "read": []}
    for rows in (1_000, 10_000, 100_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        write_params(folder)
        for what, of_sizes in peaks.items():
            done = subprocess.run(
                [sys.executable, MEMORY_PROBE, what, str(rows)],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            of_sizes.append(int(done.stdout.splitlines()[-1]))
        shutil.rmtree(folder)
    for what, of_sizes in peaks.items():
        growth = (of_sizes[2] - of_sizes[1]) / 90_000
        print(what, of_sizes, f"{growth:.0f} bytes a row")
        assert growth < 300, (what, of_sizes)
