"""Kill a command at any moment, and look at what it leaves.

What a kill leaves is what the file system holds at that moment. So `moments` runs a command once,
and copies its folder before each operation on a file: that is every state that a kill can leave,
but for how much of a temporary file is written. `killed` kills a real process, in which figures are
saved empty.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from flows import Flow, unrendered

from pipeline import files

_OPERATIONS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync")

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["stages.train", "stages.evaluate", "stages.report", "stages.detector", "stages.prepare"]
)


def moments(flow: Flow, folder: Path, *arguments: str) -> list[Flow]:
    """Run a command that must succeed, and copy its folder before each operation on a file.

    Args:
        flow: where the command runs.
        folder: for the copies.
    """
    copies: list[Flow] = []
    copying = False

    def copy() -> None:
        nonlocal copying
        if not copying:
            copying = True
            copies.append(copied(flow, folder / str(len(copies))))
            copying = False

    def noticed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            copy()
            return operation(*inputs, **options)

        return call

    def noticed_open(path: Any, mode: str = "r", *inputs: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            copy()
        return opened(path, mode, *inputs, **options)

    opened = io.open
    with contextlib.ExitStack() as stack:
        for name in _OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, noticed(getattr(os, name))))
        for module in (io, builtins):
            stack.enter_context(mock.patch.object(module, "open", noticed_open))
        exchanged = noticed(files._exchanged)
        stack.enter_context(mock.patch.object(files, "_exchanged", exchanged))
        flow.ok(*arguments)
    return copies


def killed(flow: Flow, moment: float, *arguments: str) -> bool:
    """Run a command in a process that is killed after so many seconds.

    Returns:
        Whether it was still running then.
    """
    process = _processes.Process(target=_run, args=(flow.folder, arguments))
    process.start()
    process.join(moment)
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it ends now; the server has not said so yet
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def duration(flow: Flow, *arguments: str) -> float:
    """Seconds that a command takes in a process as those of `killed`."""
    warm = _processes.Process(target=int)  # the first one starts the server
    warm.start()
    warm.join()
    began = time.monotonic()
    assert not killed(flow, 600, *arguments)
    return time.monotonic() - began


def _run(folder: Path, arguments: tuple[str, ...]) -> None:
    with unrendered():
        outcome = Flow(folder).gmpipe(*arguments)
    assert outcome.code == 0, outcome.err


def copied(flow: Flow, folder: Path) -> Flow:
    return Flow(Path(shutil.copytree(flow.folder, folder, symlinks=True)))


def content(flow: Flow, path: str = ".") -> dict[str, bytes]:
    """Every file below a folder, but for locks and what `.state` holds."""
    return {
        name: stored
        for name, stored in flow.bytes(path).items()
        if not name.endswith(".lock") and not name.startswith(".state/")
    }


def leftovers(flow: Flow) -> list[str]:
    """Temporary files and folders, former folders, and states to resume from."""
    left = [path for suffix in ("tmp", "old") for path in flow.folder.rglob(f"*.{suffix}")]
    left += (flow / ".state").glob("*.pt")
    return [str(path.relative_to(flow.folder)) for path in left]


@contextlib.contextmanager
def exchanging(*, at_once: bool) -> Iterator[None]:
    """Let folders exchange their names at once or, as on some file systems, step by step."""
    refusing = mock.patch.object(files, "_renameat2", return_value=-1)
    with contextlib.nullcontext() if at_once else refusing:
        yield
