"""Many runs: which of them are there already, and making the others, several at a time.

A run beside others has one thread, a run alone has them all. The number of threads changes how
sums are rounded, and with it a run's last digits; everything else is the same.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from pipeline.errors import GmpipeError
from pipeline.files import naming_a_full_disk
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import check_regions
from pipeline.machine import cores
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import fingerprint
from stages.checkout.layout import CHECKPOINT_FILE, METRICS_FILE
from stages.checkout.plans import RunPlan, open_inputs
from stages.console.messages import level, say, speaking
from stages.console.progress import progress_bar
from stages.evaluate import evaluate
from stages.train import train

_log = logging.getLogger(__name__)

Stage = Literal["train", "evaluate"]

_CONTEXT = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork

_CHILD = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",  # one bar over all runs is enough
}
"""Environment of a process that makes a run beside others."""


def make_runs(runs: Sequence[RunPlan], jobs: int | None) -> None:
    """Train and evaluate the runs that are not there yet, and print a line on each.

    Of a run that was trained and not evaluated, only the evaluation is missing.

    Args:
        runs: what is wanted.
        jobs: how many at a time; None for one a core, or one at all on a GPU.

    Raises:
        GmpipeError: some failed; the others were made.
    """
    missing = [(run, stages) for run, stages in zip(runs, _missing(runs), strict=True) if stages]
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else cores()
    problems = {}
    if min(jobs, len(missing)) > 1:
        outcomes = _side_by_side(missing, jobs)
    else:
        outcomes = ((run, *_attempt(run, stages)) for run, stages in missing)
    for run, line, problem in outcomes:
        if problem:
            problems[run.folder] = problem
        else:
            say(line)
    if problems:
        listed = "\n".join(f"{folder}: {problem}" for folder, problem in problems.items())
        raise GmpipeError(
            f"{len(problems)} of {len(missing)} runs failed.\n{listed}\nThe others are finished "
            "and stay: mend this, and run the same command again."
        )


def _missing(runs: Sequence[RunPlan]) -> list[list[Stage]]:
    """What of each run is not there, with its settings and on the cache there is.

    Raises:
        GmpipeError: what runs read is missing, or holds fewer regions than one asks for.
    """
    inputs: dict[str, tuple[RegionCache, str, str]] = {}
    found: list[list[Stage]] = []
    for run in runs:
        key = run.settings.label_vectors
        if key not in inputs:
            manifest, cache, vectors = open_inputs(run.dataset, run.settings)
            inputs[key] = cache, manifest.labels_sha256, vectors.sha256
        cache, labels, vectors_sha256 = inputs[key]
        check_regions(cache, run.dataset, run.settings.regions)  # not after hours of other runs
        if not _is_trained(run, cache.fingerprint, labels, vectors_sha256):
            found.append(["train", "evaluate"])
        elif not _is_evaluated(run, cache.fingerprint, labels):
            found.append(["evaluate"])
        else:
            found.append([])
    return found


def _is_trained(run: RunPlan, cache: str, labels: str, vectors: str) -> bool:
    try:
        checkpoint = load_checkpoint(run.folder / CHECKPOINT_FILE)
    except GmpipeError:
        return False
    return (
        checkpoint.settings == run.settings
        and fingerprint(checkpoint.recipe) == cache
        and checkpoint.labels_sha256 == labels
        and checkpoint.label_vectors_sha256 == vectors
    )


def _is_evaluated(run: RunPlan, cache: str, labels: str) -> bool:
    try:
        metrics = json.loads((run.folder / METRICS_FILE).read_text())
        return (metrics["fingerprint"], metrics["labels_sha256"]) == (cache, labels)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _attempt(run: RunPlan, stages: Sequence[Stage]) -> tuple[str, str]:
    """Make what a run lacks: (what to print, "") or ("", what is wrong)."""
    make: dict[Stage, Callable[[RunPlan], str | None]] = {"train": train, "evaluate": evaluate}
    try:
        with naming_a_full_disk():
            return "\n".join(str(make[stage](run)) for stage in stages), ""
    except GmpipeError as error:
        _log.info("%s failed", run.folder, exc_info=True)
        return "", str(error)


def _side_by_side(
    runs: Sequence[tuple[RunPlan, Sequence[Stage]]], jobs: int
) -> Iterator[tuple[RunPlan, str, str]]:
    """Make runs in ``jobs`` processes; yield each as it ends.

    A process that is killed takes no run with it but its own: another one goes on with the rest.
    """
    waiting = list(reversed(runs))
    workers: dict[Any, Any] = {}  # our end of the pipe -> process
    making: dict[Any, RunPlan] = {}
    with progress_bar(total=len(runs), desc="runs", unit="run") as bar:
        try:
            while waiting or making:
                while waiting and len(making) < jobs:
                    idle = next((ours for ours in workers if ours not in making), None)
                    connection = _start_worker(workers) if idle is None else idle
                    making[connection], stages = waiting.pop()
                    connection.send((making[connection], stages))
                done: list[Any] = wait(list(making))
                for connection in done:
                    run = making.pop(connection)
                    try:
                        line, problem = connection.recv()
                    except (EOFError, ConnectionResetError):
                        line, problem = "", _how_it_ended(workers.pop(connection))
                    bar.update()
                    bar.clear()
                    yield run, line, problem
            for connection, process in workers.items():
                with suppress(BrokenPipeError):  # an idle process that somebody killed
                    connection.send(None)
                process.join()
        finally:  # Ctrl-C, above all
            for process in workers.values():
                process.kill()  # a run goes on from where it was when it is made again
                process.join()


def _start_worker(workers: dict[Any, Any]) -> Any:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_work, args=(theirs, level()), daemon=True)
    with _environment(_CHILD):
        process.start()
    theirs.close()  # or its end would never be seen here
    workers[ours] = process
    return ours


def _how_it_ended(process: Any) -> str:
    process.join()
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return f"its process was killed ({name}); if memory ran out, use a smaller --jobs."
    return f"its process ended with code {process.exitcode}; see what it printed above."


def _work(connection: Connection, loud: int) -> None:
    """A process that makes the runs it is sent, one after the other; ``loud`` as its parent."""
    # A terminal sends Ctrl-C to every process: the command alone answers, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with speaking(loud):
        while (wanted := connection.recv()) is not None:
            connection.send(_attempt(*wanted))


def _end_with_parent() -> None:
    """Of a command that is killed nothing stays behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
