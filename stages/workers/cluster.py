"""The only module that knows Dask: it runs tasks on this machine or on a cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import dask
import torch
from distributed import Client, KilledWorker, LocalCluster, get_worker
from distributed.client import ClosedClientError

from pipeline.errors import GmpipeError, InputError, MissingError, WorkerError, briefly
from pipeline.machine import cores
from stages.console.messages import is_verbose, note

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

_RETRIES = 2  # of a task that raised; an error that would come again is returned, not raised
_TASKS_PER_WORKER = 3  # one at the detector, one writing, one decoding its first batches
_CONNECT_SECONDS = 10  # for a scheduler to answer
_JOIN_SECONDS = 60  # for the first worker of a cluster to join, or for one to come back
_POLL_SECONDS = 2  # between two looks at the workers while no task ends
_ATTEMPTS = 3  # to start workers, and to ask them
# What Dask raises if a worker or the scheduler is gone; its client then lacks methods.
_LOST = (
    OSError,
    RuntimeError,
    AttributeError,
    ClosedClientError,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
)
_SILENT = logging.CRITICAL + 1
_KEPT = "Everything that was finished is kept."
_LOOK = (
    "Look at the workers' messages and at the memory they had: a smaller `batch_size` needs less. "
    "Then run the same command again."
)
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
        WorkerError: the workers of this machine do not start, or the scheduler was lost.
        MissingError: there are several GPUs but no dask-cuda.
    """
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(_CONFIG))
        stack.enter_context(_silenced())
        client = _started(stack) if scheduler is None else _connected(stack, scheduler)
        with _naming_loss():
            _check_resources(client, resources)
        yield client


def _started(stack: ExitStack) -> Client:
    """Start a cluster on this machine, which ends with ``stack``.

    Raises:
        WorkerError: its workers did not start at several attempts.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        with ExitStack() as own:
            try:
                client: Client = _closed_with(own, Client(_closed_with(own, _local_cluster())))
                client.wait_for_workers(1, timeout=_JOIN_SECONDS)
            except _LOST as error:
                if not attempts_left:
                    raise WorkerError(
                        f"the workers of this machine did not start at {_ATTEMPTS} attempts "
                        f"({briefly(error)}). {_KEPT}",
                        "Look at the memory and at the limits of processes and open files "
                        "(`ulimit -a`), and run the same command again.",
                    ) from error
                _say_again(f"the workers of this machine did not start ({briefly(error)})")
            else:
                stack.push(own.pop_all())
                return client
    raise AssertionError


def _connected(stack: ExitStack, scheduler: str) -> Client:
    """Connect to a scheduler that has a worker; raises as `open_cluster`."""
    try:
        client: Client = _closed_with(stack, Client(scheduler, timeout=_CONNECT_SECONDS))
        client.wait_for_workers(1, timeout=_JOIN_SECONDS)
    except (*_LOST, ValueError) as error:
        raise InputError(
            f"--scheduler {scheduler}: no scheduler with a worker answered ({briefly(error)}).",
            f"Start them, e.g. with `dask scheduler` and `dask worker {scheduler}`, and "
            "give the address that the scheduler prints.",
        ) from error
    return client


def _closed_with(stack: ExitStack, opened: Any) -> Any:
    """Enter a client or a cluster, and leave it with ``stack``, whether or not it can be closed."""
    value = opened.__enter__()

    def close(*error: Any) -> None:
        with suppress(*_LOST):  # the tasks are done, or their error is on its way
            opened.__exit__(*error)

    stack.push(close)
    return value


def _say_again(problem: str) -> None:
    note(f"{problem}; trying again.")


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep Dask from telling of what is lost, with tracebacks; `--verbose` lets it."""
    names = [] if is_verbose() else [*logging.root.manager.loggerDict]
    loggers = [logging.getLogger(name) for name in names if name.startswith("distributed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(_SILENT)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _naming_loss() -> Iterator[None]:
    """Raise the `WorkerError` of a scheduler that is lost in the block."""
    try:
        yield
    except _LOST as error:
        raise _loss(error) from error


def _loss(error: BaseException) -> WorkerError:
    return WorkerError(
        f"the scheduler was lost ({briefly(error)}). {_KEPT}",
        "Start the scheduler and its workers again, and run the same command again.",
    )


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
        # Dask tells of a lost worker with a traceback, and then starts another one.
        "silence_logs": logging.WARNING if is_verbose() else _SILENT,
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
    if any(_offers(offer, resources) for offer in workers):
        return
    needed = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
    offered = sorted({str(offer or "none") for offer in workers})
    raise InputError(
        f"--resource: a shard's worker must have {needed}, and none has; the {len(workers)} "
        f"workers have {'; '.join(offered)}.",
        f'Start one with `dask worker ADDRESS --resources "{needed}"`, or ask for less.',
    )


def _offers(offer: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    """Whether a worker that offers some resources has those that a task needs."""
    return all(offer.get(name, 0) >= need for name, need in resources.items())


def _resources_of_workers(dask_scheduler: Any) -> list[dict[str, float]]:
    """Runs in the scheduler, since a client's own view of it is cut to a few workers."""
    return [dict(worker.resources) for worker in dask_scheduler.workers.values()]


def on_every_worker(client: Client, function: Callable[..., str | None], *args: Any) -> None:
    """Call ``function`` on every worker. What it returns is what is wrong there.

    Raises:
        InputError: something is wrong; names the worker.
        WorkerError: workers died at each of several attempts, or none is left.
    """
    for address, problem in _answers(client, function, *args).items():
        if problem:
            raise InputError(f"worker {address}: {problem}")


def _answers(client: Client, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What ``function`` returns on each worker, at least one; raises as `on_every_worker`."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            client.wait_for_workers(1, timeout=_JOIN_SECONDS)
            if answers := client.run(function, *args):
                return dict(answers)
            lost: BaseException = MissingError("no worker is left")
        except _LOST as error:
            lost = error
        if client.status != "running":
            raise _loss(lost) from lost
        if attempts_left:
            _say_again(f"a worker was lost ({briefly(lost)})")
            time.sleep(_POLL_SECONDS)
    raise WorkerError(
        f"the workers were lost at {_ATTEMPTS} attempts ({briefly(lost)}). {_KEPT}", _LOOK
    ) from lost


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
        WorkerError: a task failed or killed its worker at each attempt, no worker is left, or the
            scheduler was lost.
    """
    queue = _Queue(client, function, tasks, topic, resources)
    with _naming_loss():
        client.subscribe_topic(topic, lambda event: on_message(event[1]))
    try:
        queue.fill()
        while queue.given:
            future = queue.next_done()
            outcome = _result_of(future)
            yield queue.take(future), outcome
            queue.fill()
    finally:
        with suppress(*_LOST):
            client.unsubscribe_topic(topic)


def _run_task(function: Callable[[Any], Any], task: Any) -> Any:
    """Runs in a worker. Dask never finishes a task that raises one of these."""
    try:
        return function(task)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the task ended with {error!r}") from error


class _Queue(Generic[Task]):
    """The tasks that are with the cluster, a few per worker.

    Attributes:
        given: these tasks, by their futures' keys.
    """

    def __init__(
        self,
        client: Client,
        function: Callable[[Task], Any],
        tasks: Iterator[Task],
        topic: str,
        resources: Mapping[str, float],
    ) -> None:
        self.given: dict[Any, Task] = {}
        self._done: SimpleQueue[Any] = SimpleQueue()  # futures
        self._client = client
        self._function = function
        self._tasks = tasks
        self._keys = (f"{topic}-{number}" for number in itertools.count())
        share = _TASKS_PER_WORKER + 1
        self._reserved = {name: amount / share for name, amount in resources.items()} or None
        self._resources = resources

    def fill(self) -> None:
        """Submit tasks until every worker has enough, or there are none left."""
        with _naming_loss():
            workers = len(self._client.ncores())
        while len(self.given) < _TASKS_PER_WORKER * max(1, workers):
            task = next(self._tasks, None)
            if task is None:
                return
            with _naming_loss():
                future = self._client.submit(
                    _run_task,
                    self._function,
                    task,
                    key=next(self._keys),
                    pure=False,
                    retries=_RETRIES,
                    resources=self._reserved,
                )
            self.given[future.key] = task
            future.add_done_callback(self._done.put)

    def next_done(self) -> Any:
        """Wait for the next finished future.

        Raises:
            WorkerError: no worker that can take a task is left, and none comes back.
        """
        alone_since: float | None = None
        while True:
            try:
                return self._done.get(timeout=_POLL_SECONDS)
            except Empty:
                with _naming_loss():
                    workers: Any = self._client.run_on_scheduler(_resources_of_workers)
            if any(_offers(offer, self._resources) for offer in workers):
                alone_since = None
                continue
            now = time.monotonic()
            alone_since = alone_since or now
            if now - alone_since > _JOIN_SECONDS:
                raise WorkerError(
                    f"no worker is left, and none has come back for {_JOIN_SECONDS:g} s. {_KEPT}",
                    _LOOK,
                )

    def take(self, future: Any) -> Task:
        """The task of a finished future, which is released."""
        task = self.given.pop(future.key)
        future.release()
        return task


def _result_of(future: Any) -> Any:
    """The result of a finished future; raises as `run_tasks`."""
    try:
        return future.result()
    except KilledWorker as error:
        raise WorkerError(
            f"a worker died at each attempt ({briefly(error)}). {_KEPT}", _LOOK
        ) from error
    except concurrent.futures.CancelledError as error:
        raise _loss(error) from error
    except GmpipeError:
        raise
    except Exception as error:  # whatever a task raises, or can't be sent
        raise WorkerError(
            f"a worker failed at each of {_RETRIES + 1} attempts: {type(error).__name__}: "
            f"{briefly(error)}. {_KEPT}",
            "`--verbose` shows where. Solve this, and run the same command again.",
        ) from error
