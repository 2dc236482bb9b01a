"""Extractions without worker processes, which take seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from distributed import LocalCluster

from pipeline.machine import cores


@contextmanager
def worker_in_this_process(**options: Any) -> Iterator[LocalCluster]:
    """Let commands in this process extract on a Dask worker that is a thread of it.

    Args:
        options: of `LocalCluster`.
    """
    defaults = {
        "n_workers": 1,
        "threads_per_worker": max(2, cores()),  # as a worker in a process of its own
        "processes": False,
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": 0,
    }
    with (
        LocalCluster(**(defaults | options)) as cluster,
        mock.patch("stages.workers.cluster._local_cluster", return_value=nullcontext(cluster)),
    ):
        yield cluster
