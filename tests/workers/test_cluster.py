"""Dask runs the tasks: a few at a time, again if they fail, and only on workers that can do them.

The workers are threads of this process; test_processes.py has those in which the process matters.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from clusters import worker_in_this_process
from distributed import LocalCluster
from flows import Flow

from pipeline.errors import InputError
from pipeline.machine import cores
from pipeline.shards.reader import RegionCache
from pipeline.shards.shard import whole_shards
from stages.workers import cluster as module
from stages.workers import tasks
from stages.workers.cluster import open_cluster, report_progress, run_tasks
from stages.workers.tasks import ExtractionJob


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers of one thread that offer a GPU each."""
    with worker_in_this_process(
        n_workers=2, threads_per_worker=1, resources={"GPU": 1}
    ) as local_cluster:
        yield local_cluster


# Tasks -------------------------------------------------------------------------------------------


def test_a_task_that_fails_is_tried_again(cluster: LocalCluster, tmp_path: Path) -> None:
    def fail_once(marker: Path) -> str:
        if not marker.exists():
            marker.touch()
            raise OSError("a disk that was gone for a moment")
        return "done"

    with open_cluster(None, {}) as client:
        done = list(
            run_tasks(
                client,
                fail_once,
                iter([tmp_path / "marker"]),
                topic="again",
                resources={},
                on_message=lambda message: None,
            )
        )
    assert done == [(tmp_path / "marker", "done")]


def test_few_tasks_are_with_the_cluster_at_a_time(cluster: LocalCluster) -> None:
    given = 0

    def numbers() -> Iterator[int]:
        nonlocal given
        for number in range(40):
            given += 1
            yield number

    def work(number: int) -> int:
        report_progress("few", number)
        return number * number

    messages: list[int] = []
    outcomes = {}
    with open_cluster(None, {"GPU": 1}) as client:
        for number, outcome in run_tasks(
            client,
            work,
            numbers(),
            topic="few",
            resources={"GPU": 1},
            on_message=messages.append,
        ):
            outcomes[number] = outcome
            assert given <= len(outcomes) + 2 * module._TASKS_PER_WORKER
    assert outcomes == {number: number * number for number in range(40)}
    assert set(messages) <= set(range(40))


def test_a_worker_freezes_its_garbage_when_it_ends() -> None:
    """A last collection takes seconds with torch, and Dask kills a worker that takes 4 s."""
    before = gc.get_freeze_count()
    try:
        module.dask_teardown(None)
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


# Extraction --------------------------------------------------------------------------------------


def test_an_existing_cluster_gives_the_same_cache(
    cluster: LocalCluster, flow: Flow, made: Flow
) -> None:
    shutil.rmtree(flow / "cache/tiny")
    address = cluster.scheduler_address
    wrong = flow.gmpipe("extract", "--scheduler", address, "--resource", "GPU=2")
    assert wrong.refused(r"--resource.*GPU=2.*2 workers.*'GPU': 1")
    assert whole_shards(flow / "cache/tiny") == []
    said = flow.ok("extract", "--scheduler", address, "--resource", "GPU=1")
    assert "60 rows, 60 of them extracted now" in said
    # On one thread per worker, so that sums are rounded in another order.
    caches = [RegionCache.open(one / "cache/tiny") for one in (flow, made)]
    rows, expected = (cache.gather(range(len(cache))) for cache in caches)
    assert rows.image_id.tolist() == expected.image_id.tolist()
    np.testing.assert_allclose(rows.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_allclose(rows.features, expected.features, atol=2e-3)


def test_the_detector_uses_the_threads_of_its_worker(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    with worker_in_this_process():
        flow.ok("extract")
        with open_cluster(None, {}) as client:
            threads = client.submit(torch.get_num_threads, pure=False).result()
    assert threads == max(2, cores())


def test_a_scheduler_that_does_not_answer_is_named(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    with mock.patch.object(module, "_CONNECT_SECONDS", 0.5):
        assert flow.gmpipe("extract", "--scheduler", "tcp://127.0.0.1:9").refused(
            r"--scheduler tcp://127\.0\.0\.1:9.*dask worker"
        )
    usage = flow.gmpipe("extract", "--resource", "GPU")
    assert usage.code == 2
    assert "NAME=AMOUNT" in usage.err


def a_job(flow: Flow, **changes: object) -> ExtractionJob:
    """A job as far as a worker checks it before it loads the detector."""
    job = ExtractionJob.__new__(ExtractionJob)
    sound = {
        "folder": flow / "cache/tiny",
        "root": flow / "data/tiny",
        "detector": flow / "data/tiny/detector",
        "turn": "another",
        "versions": {},
    }
    for name, value in (sound | changes).items():
        object.__setattr__(job, name, value)
    return job


def test_a_worker_that_sees_other_files_is_named(cluster: LocalCluster, flow: Flow) -> None:
    """As on a cluster without a shared file system: the cache is another folder there."""
    job = a_job(flow)
    assert str(job.folder) in (tasks.problem_of_worker(job) or "")
    with open_cluster(None, {}) as client, pytest.raises(InputError, match=f"inproc.*{job.folder}"):
        module.on_every_worker(client, tasks.problem_of_worker, job)


def test_a_worker_with_other_versions_is_named(flow: Flow) -> None:
    job = a_job(flow, versions={"h5py": "0.1"})
    assert "h5py" in (tasks.problem_of_worker(job) or "")


def test_a_worker_that_may_not_read_is_named(flow: Flow) -> None:
    turn = (flow / "cache/.tiny.workers.lock").read_text()
    assert tasks.problem_of_worker(a_job(flow, turn=turn)) is None
    job = a_job(flow, turn=turn, root=flow / "data/none")
    assert str(job.root) in (tasks.problem_of_worker(job) or "")
