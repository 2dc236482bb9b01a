"""Workers and schedulers that die at any moment: tried again, or a clear error that comes soon."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from clusters import worker_in_this_process
from distributed import LocalCluster
from distributed.comm import CommClosedError
from flows import Flow, Outcome

from pipeline.errors import WorkerError
from stages.workers import cluster as module
from stages.workers.cluster import on_every_worker, open_cluster, run_tasks


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_JOIN_SECONDS", 3)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.2)


def run(client: Any, function: Callable[[int], Any], tasks: int = 20) -> int:
    """Run tasks; return how many were done."""
    return len(
        list(
            run_tasks(
                client,
                function,
                iter(range(tasks)),
                topic="deaths",
                resources={},
                on_message=lambda message: None,
            )
        )
    )


# With workers that are threads of this process ---------------------------------------------------


class OddError(Exception):
    """Can't be unpickled: it takes two arguments and passes on one."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def raises_odd(_: int) -> None:
    raise OddError(1, 2)


def exits(_: int) -> None:
    sys.exit(3)


def interrupts(_: int) -> None:
    raise KeyboardInterrupt


def fails(_: int) -> None:
    raise OSError("a disk that is gone")


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (raises_odd, "OddError"),
        (exits, r"SystemExit\(3\)"),
        (interrupts, "KeyboardInterrupt"),
        (fails, "a disk that is gone"),
    ],
)
def test_whatever_a_task_raises_is_an_error_of_the_worker(
    function: Callable[[int], Any], pattern: str
) -> None:
    with (
        worker_in_this_process(),
        open_cluster(None, {}) as client,
        pytest.raises(WorkerError, match=pattern),
    ):
        run(client, function, tasks=2)


def test_workers_that_all_leave_are_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_JOIN_SECONDS", 1)
    with worker_in_this_process() as cluster, open_cluster(None, {}) as client:
        threading.Timer(0.3, cluster.scale, [0]).start()
        with pytest.raises(WorkerError, match="1 s"):
            run(client, lambda _: time.sleep(0.1), tasks=1000)


def test_a_cluster_that_does_not_start_is_started_again() -> None:
    failure = RuntimeError("Nanny failed to start.")
    with worker_in_this_process() as cluster:
        again = [failure, failure, contextlib.nullcontext(cluster)]
        with (
            mock.patch.object(module, "_local_cluster", side_effect=again) as starts,
            open_cluster(None, {}) as client,
        ):
            assert run(client, abs) == 20
        assert starts.call_count == 3
        with (
            mock.patch.object(module, "_local_cluster", side_effect=failure),
            pytest.raises(WorkerError, match=r"3 attempts.*Nanny failed to start"),
            open_cluster(None, {}),
        ):
            pass


def test_workers_are_asked_again(tmp_path: Path) -> None:
    def lost(times: int) -> None:
        calls = len(list(tmp_path.iterdir()))
        (tmp_path / str(calls)).touch()
        if calls < times:
            raise CommClosedError("the worker is gone")

    with worker_in_this_process(), open_cluster(None, {}) as client:
        on_every_worker(client, lost, 2)
        with pytest.raises(WorkerError, match=r"3 attempts.*the worker is gone"):
            on_every_worker(client, lost, 99)
    assert len(list(tmp_path.iterdir())) == 6


# With processes ----------------------------------------------------------------------------------

DIES = """
import os, signal, sys, threading, time

def die():
    time.sleep(float(os.environ["DIES_AFTER"]))
    os.kill(os.getpid(), signal.SIGKILL)

if "spawn_main" in " ".join(sys.orig_argv):
    folder = os.environ["DEATHS"]
    if len(os.listdir(folder)) < int(os.environ["DIES"]):
        open(os.path.join(folder, str(os.getpid())), "w").close()
        if float(os.environ["DIES_AFTER"]):
            threading.Thread(target=die, daemon=True).start()
        else:
            die()
"""
"""`sitecustomize`, which Python imports first: kills a worker some seconds after it has started."""


def extract_with_deaths(flow: Flow, tmp_path: Path, deaths: int, after: float) -> Outcome:
    """Run `gmpipe extract` in processes of which the first workers are killed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "deaths").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(DIES)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {
        "PYTHONPATH": path,
        "DEATHS": str(tmp_path / "deaths"),
        "DIES": str(deaths),
        "DIES_AFTER": str(after),
    }
    shutil.rmtree(flow / "cache/tiny")
    return flow.installed("extract", env={**os.environ, **environment}, timeout=150)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 0.5, 1, 2, 3, 4])
def test_a_worker_that_dies_early_is_replaced(
    flow: Flow, made: Flow, tmp_path: Path, after: float
) -> None:
    done = extract_with_deaths(flow, tmp_path, 1, after)
    assert done.code == 0, done
    assert "Traceback" not in done.err
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


@pytest.mark.slow
def test_workers_that_always_die_are_an_error(flow: Flow, made: Flow, tmp_path: Path) -> None:
    done = extract_with_deaths(flow, tmp_path, 99, 0)
    assert done.refused("3 attempts.*run the same command again")
    flow.ok("extract")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


@contextlib.contextmanager
def dask_processes(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Any]]:
    """A scheduler and a worker in processes: the address, and both."""
    file = folder / "scheduler.json"
    at = ["--scheduler-file", str(file)]
    scheduler = [*at, "--port", "0", "--host", "127.0.0.1", "--no-dashboard"]
    worker = [*at, "--nthreads", "2", "--memory-limit", "0", "--no-dashboard"]
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{name}", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **paths},
        )
        for name, arguments in (("scheduler", scheduler), ("worker", worker))
    ]
    try:
        for _ in range(600):
            with contextlib.suppress(OSError, ValueError):
                address = json.loads(file.read_text())["address"]
                break
            time.sleep(0.1)
        yield address, *processes
    finally:
        for process in processes:
            process.terminate()  # a worker's nanny ends the worker
            process.wait()


def rest(*_: Any) -> None:
    time.sleep(2)


def rest_shortly(_: int) -> None:
    time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["scheduler", "worker"])
@pytest.mark.parametrize("moment", ["before", "asked", "working"])
def test_who_is_lost_is_an_error_in_bounded_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], who: str, moment: str
) -> None:
    def lose(client: Any, kill: Callable[[], None]) -> None:
        if moment == "before":
            kill()
        else:
            threading.Timer(1, kill).start()
        if moment != "working":
            on_every_worker(client, rest)
        run(client, rest_shortly, tasks=1000)

    with dask_processes(tmp_path) as (address, scheduler, worker), ExitStack() as stack:
        with mock.patch.object(module, "_JOIN_SECONDS", 60):
            client = stack.enter_context(open_cluster(address, {}))
        kill = scheduler.kill if who == "scheduler" else worker.terminate
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"lost|left"):
            lose(client, kill)
        assert time.monotonic() - began < 60
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_an_error() -> None:
    def die(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        mock.patch.object(module, "_JOIN_SECONDS", 60),
        open_cluster(None, {}) as client,
        pytest.raises(WorkerError, match="batch_size"),
    ):
        run(client, die, tasks=1)


@pytest.mark.slow
def test_a_result_that_can_not_be_sent_is_an_error() -> None:
    with (
        LocalCluster(n_workers=1, dashboard_address="127.0.0.1:0") as cluster,
        open_cluster(cluster.scheduler_address, {}) as client,
        pytest.raises(WorkerError, match="Unpicklable"),
    ):
        run(client, lambda _: Unpicklable(), tasks=2)
