"""The one place that knows Dask: shards as tasks, on this machine or on a cluster."""

from __future__ import annotations

import gc
import signal
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import dask
import torch
from distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker

from pipeline.errors import GmpipeError
from pipeline.machine import cores

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

_RETRIES = 2  # of a task that raised; an error that would come again is returned, not raised
_TASKS_PER_WORKER = 3  # one at the detector, one writing, one decoding its first batches
_JOIN_SECONDS = 60  # for the first worker of a cluster to be there
_CONFIG = {
    # Half a minute of silence must not count as the death of a worker that decodes.
    "distributed.comm.timeouts.tcp": "300s",
    # Memory must not grow with the hours: the profiler keeps all it saw, and each connection its
    # last messages, which here are lists of images.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.low-level-log-length": 10,
}


@contextmanager
def open_cluster(scheduler: str | None, resources: Mapping[str, float]) -> Iterator[Client]:
    """A client of the cluster at ``scheduler``, or of one on this machine.

    On this machine: a worker for each GPU, or one for all cores where there is none. A worker's
    number of threads is what it may use for the detector and for decoding (`threads_of_worker`).

    Raises:
        GmpipeError: there is no scheduler at that address, it has no worker, or none of them has
            the ``resources`` that a task needs; or there are several GPUs and no dask-cuda.
    """
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(_CONFIG))
        if scheduler is None:
            client = stack.enter_context(Client(stack.enter_context(_local_cluster())))
        else:
            try:
                client = stack.enter_context(Client(scheduler, timeout=10))
                client.wait_for_workers(1, timeout=_JOIN_SECONDS)
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                raise GmpipeError(
                    f"--scheduler {scheduler}: no scheduler with a worker answered ({error}). "
                    f"Start them, e.g. with `dask scheduler` and `dask worker {scheduler}`, and "
                    "give the address that the scheduler prints."
                ) from error
        _check_resources(client, resources)
        yield client


def _local_cluster() -> Any:
    gpus = torch.cuda.device_count()
    options: dict[str, Any] = {
        "threads_per_worker": max(2, cores() // max(1, gpus)),
        # Any free port: without an address Dask's status page takes 8787, and warns where a second
        # command runs.
        "dashboard_address": "127.0.0.1:0",
        # Shards are of bounded size; Dask's limit would count the detector and kill it.
        "memory_limit": 0,
        "preload": [__name__],  # for `dask_setup` and `dask_teardown`
    }
    if gpus <= 1:
        return LocalCluster(n_workers=1, processes=True, **options)
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise GmpipeError(
            f"{gpus} GPUs are here, and dask-cuda, which gives each a worker, is not installed. "
            "Run `pip install -e '.[cuda]'` in the checkout, or choose one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        ) from error
    return LocalCUDACluster(**options)


def dask_setup(worker: object) -> None:
    """Dask calls this in a worker that it starts on this machine.

    A terminal sends Ctrl-C to the workers as well: the command alone answers, and ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def dask_teardown(worker: object) -> None:
    """Dask calls this in such a worker before it ends.

    A process collects garbage once more at its very end. With all that torch has loaded that took
    over 2 s on two busy cores, against 0.6 s when nothing is looked at; after 4 s Dask kills the
    worker, and warns.
    """
    gc.freeze()


def _check_resources(client: Client, resources: Mapping[str, float]) -> None:
    """Dask would wait forever for a worker that can take a task."""
    workers: list[dict[str, float]] = client.run_on_scheduler(_resources_of_workers)
    for offer in workers:
        if all(offer.get(name, 0) >= need for name, need in resources.items()):
            return
    needed = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
    offered = sorted({str(offer or "none") for offer in workers})
    raise GmpipeError(
        f"--resource: a shard's worker must have {needed}, and none has; the {len(workers)} "
        f"workers have {'; '.join(offered)}. Start one with `dask worker ADDRESS --resources "
        f'"{needed}"`, or ask for less.'
    )


def _resources_of_workers(dask_scheduler: Any) -> list[dict[str, float]]:
    """Runs in the scheduler: a client's own view of it is cut to a few workers."""
    return [dict(worker.resources) for worker in dask_scheduler.workers.values()]


def on_every_worker(client: Client, function: Callable[..., str | None], *args: Any) -> None:
    """Call ``function`` on every worker; what it returns is what is wrong there.

    Raises:
        GmpipeError: something is; names the worker.
    """
    for address, problem in client.run(function, *args).items():
        if problem:
            raise GmpipeError(f"worker {address}: {problem}")


def threads_of_worker() -> int:
    """Threads that Dask gave the worker in which this is called."""
    return int(get_worker().state.nthreads)


def tell(topic: str, message: Any) -> None:
    """From within a task: a message for `run_tasks`' ``on_message``."""
    get_worker().log_event(topic, message)


def run_tasks(
    client: Client,
    function: Callable[[Task], Outcome],
    tasks: Iterator[Task],
    *,
    topic: str,
    resources: Mapping[str, float],
    on_message: Callable[[Any], None],
) -> Iterator[tuple[Task, Outcome]]:
    """Run ``function`` on every task; yield what is done, as it is done.

    A task goes to a worker that has ``resources`` and reserves a part of them only: several tasks
    share a worker.

    Only a few tasks a worker are with the cluster at any time, so that millions of images need no
    memory here. A task that raises, or whose worker dies, is tried again; if its worker dies each
    time, that is an error.

    Raises:
        GmpipeError: a task killed its worker several times, or the scheduler was lost.
    """
    reserved = {name: amount / (_TASKS_PER_WORKER + 1) for name, amount in resources.items()}
    client.subscribe_topic(topic, lambda event: on_message(event[1]))
    waiting = as_completed()
    given: dict[Any, Task] = {}

    def give() -> None:
        workers = len(client.ncores())
        while len(given) < _TASKS_PER_WORKER * max(1, workers):
            task = next(tasks, None)
            if task is None:
                return
            future = client.submit(
                function,
                task,
                key=f"{topic}-{next(numbers)}",
                pure=False,
                retries=_RETRIES,
                resources=reserved or None,
            )
            given[future.key] = task
            waiting.add(future)

    numbers = iter(range(1 << 62))
    give()
    try:
        for future in waiting:
            task = given.pop(future.key)
            try:
                outcome = future.result()
            except KilledWorker as error:
                raise GmpipeError(
                    f"a worker died at each attempt ({error}). Look at its log and at the memory "
                    "it had; a smaller `batch_size` needs less. What was finished stays: run the "
                    "same command again."
                ) from error
            except CancelledError as error:
                raise GmpipeError(
                    "the scheduler was lost. What was finished stays: start the scheduler and its "
                    "workers again, and run the same command again."
                ) from error
            future.release()
            yield task, outcome
            give()
    finally:
        client.unsubscribe_topic(topic)
