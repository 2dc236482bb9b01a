"""The only module that knows Dask: it runs tasks on this machine or on a cluster."""

from __future__ import annotations

import gc
import itertools
import signal
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import dask
import torch
from distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker

from pipeline.errors import InputError, MissingError
from pipeline.machine import cores

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

_RETRIES = 2  # of a task that raised; an error that would come again is returned, not raised
_TASKS_PER_WORKER = 3  # one at the detector, one writing, one decoding its first batches
_CONNECT_SECONDS = 10  # for a scheduler to answer
_JOIN_SECONDS = 60  # for the first worker of a cluster to join
_CONFIG = {
    # Half a minute of silence must not count as the death of a worker that decodes.
    "distributed.comm.timeouts.tcp": "300s",
    # Memory must not grow with the hours: the profiler keeps all that it saw, and each connection
    # its last messages, which are lists of images here.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.low-level-log-length": 10,
}


@contextmanager
def open_cluster(scheduler: str | None, resources: Mapping[str, float]) -> Iterator[Client]:
    """Open a client of the cluster at ``scheduler``, or of a new one on this machine.

    On this machine, each GPU gets a worker, or all cores get one if there is no GPU. A worker may
    use its number of threads for the detector and for decoding (`threads_of_worker`).

    Args:
        scheduler: address of a Dask scheduler; None for a cluster on this machine.
        resources: Dask's worker resources that a task needs.

    Raises:
        InputError: there is no scheduler at that address, it has no worker, or none of them has the
            ``resources``.
        MissingError: there are several GPUs but no dask-cuda.
    """
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(_CONFIG))
        if scheduler is None:
            client = stack.enter_context(Client(stack.enter_context(_local_cluster())))
        else:
            try:
                client = stack.enter_context(Client(scheduler, timeout=_CONNECT_SECONDS))
                client.wait_for_workers(1, timeout=_JOIN_SECONDS)
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                raise InputError(
                    f"--scheduler {scheduler}: no scheduler with a worker answered ({error}).",
                    f"Start them, e.g. with `dask scheduler` and `dask worker {scheduler}`, and "
                    "give the address that the scheduler prints.",
                ) from error
        _check_resources(client, resources)
        yield client


def _local_cluster() -> Any:
    gpus = torch.cuda.device_count()
    options: dict[str, Any] = {
        "threads_per_worker": max(2, cores() // max(1, gpus)),
        # Any free port: without an address Dask's status page takes 8787, and a second command
        # warns that it is taken.
        "dashboard_address": "127.0.0.1:0",
        # Shards are of bounded size. Dask's limit would count the detector, and kill it.
        "memory_limit": 0,
        "preload": [__name__],  # for `dask_setup` and `dask_teardown`
    }
    if gpus <= 1:
        return LocalCluster(n_workers=1, processes=True, **options)
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingError(
            f"this machine has {gpus} GPUs, and dask-cuda, which gives each of them a worker, is "
            "not installed.",
            "Run `pip install -e '.[cuda]'` in the checkout, or choose one GPU with "
            "CUDA_VISIBLE_DEVICES=0.",
        ) from error
    return LocalCUDACluster(**options)


def dask_setup(worker: object) -> None:
    """Called by Dask in a worker that it starts on this machine.

    A terminal sends Ctrl-C to the workers as well. Only the command answers, and ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def dask_teardown(worker: object) -> None:
    """Called by Dask in such a worker before it ends.

    A process collects garbage once more when it ends. With all that torch has loaded, that took
    over 2 s on two busy cores, against 0.6 s if everything is frozen. After 4 s Dask kills the
    worker and warns.
    """
    gc.freeze()


def _check_resources(client: Client, resources: Mapping[str, float]) -> None:
    """Refuse a cluster without a worker that can take a task; Dask would wait for one forever."""
    workers: list[dict[str, float]] = client.run_on_scheduler(_resources_of_workers)
    for offer in workers:
        if all(offer.get(name, 0) >= need for name, need in resources.items()):
            return
    needed = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
    offered = sorted({str(offer or "none") for offer in workers})
    raise InputError(
        f"--resource: a shard's worker must have {needed}, and none has; the {len(workers)} "
        f"workers have {'; '.join(offered)}.",
        f'Start one with `dask worker ADDRESS --resources "{needed}"`, or ask for less.',
    )


def _resources_of_workers(dask_scheduler: Any) -> list[dict[str, float]]:
    """Runs in the scheduler, since a client's own view of it is cut to a few workers."""
    return [dict(worker.resources) for worker in dask_scheduler.workers.values()]


def on_every_worker(client: Client, function: Callable[..., str | None], *args: Any) -> None:
    """Call ``function`` on every worker. What it returns is what is wrong there.

    Raises:
        InputError: something is wrong; names the worker.
    """
    for address, problem in client.run(function, *args).items():
        if problem:
            raise InputError(f"worker {address}: {problem}")


def threads_of_worker() -> int:
    """Number of threads that Dask gave the worker in which this is called."""
    return int(get_worker().state.nthreads)


def report_progress(topic: str, message: Any) -> None:
    """Send a message from a task to the ``on_message`` of `run_tasks`."""
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
    """Run ``function`` on every task. Yield each task with its outcome as soon as it is done.

    Only a few tasks per worker are with the cluster at any time, so that millions of images need no
    memory here. A task that raises, or whose worker dies, is tried again.

    Args:
        client: of the cluster.
        function: runs a task; pickled by its name.
        tasks: in the order in which they begin.
        topic: of the messages of `report_progress`; also the prefix of the tasks' keys.
        resources: that a task's worker must have. It reserves only a part of them, so that several
            tasks share a worker.
        on_message: called with each message.

    Raises:
        InputError: a task killed its worker at each attempt.
        MissingError: the scheduler was lost.
    """
    client.subscribe_topic(topic, lambda event: on_message(event[1]))
    queue = _Queue(client, function, tasks, topic, resources)
    try:
        queue.fill()
        for future in queue.done:
            outcome = _result_of(future)
            task = queue.take(future)
            yield task, outcome
            queue.fill()
    finally:
        client.unsubscribe_topic(topic)


class _Queue(Generic[Task]):
    """The tasks that are with the cluster, a few per worker.

    Attributes:
        done: futures of finished tasks.
    """

    def __init__(
        self,
        client: Client,
        function: Callable[[Task], Any],
        tasks: Iterator[Task],
        topic: str,
        resources: Mapping[str, float],
    ) -> None:
        self.done = as_completed()
        self._client = client
        self._function = function
        self._tasks = tasks
        self._keys = (f"{topic}-{number}" for number in itertools.count())
        share = _TASKS_PER_WORKER + 1
        self._reserved = {name: amount / share for name, amount in resources.items()} or None
        self._given: dict[Any, Task] = {}  # by the future's key

    def fill(self) -> None:
        """Submit tasks until every worker has enough, or there are none left."""
        while len(self._given) < _TASKS_PER_WORKER * max(1, len(self._client.ncores())):
            task = next(self._tasks, None)
            if task is None:
                return
            future = self._client.submit(
                self._function,
                task,
                key=next(self._keys),
                pure=False,
                retries=_RETRIES,
                resources=self._reserved,
            )
            self._given[future.key] = task
            self.done.add(future)

    def take(self, future: Any) -> Task:
        """The task of a finished future, which is released."""
        task = self._given.pop(future.key)
        future.release()
        return task


def _result_of(future: Any) -> Any:
    """The result of a finished future; raises as `run_tasks`."""
    try:
        return future.result()
    except KilledWorker as error:
        raise InputError(
            f"a worker died at each attempt ({error}). Everything that was finished is kept.",
            "Look at its log and at the memory it had: a smaller `batch_size` needs less. Then run "
            "the same command again.",
        ) from error
    except CancelledError as error:
        raise MissingError(
            "the scheduler was lost. Everything that was finished is kept.",
            "Start the scheduler and its workers again, and run the same command again.",
        ) from error
