"""Run gmpipe's commands as a user whom permissions hold for, which they don't for root.

`OtherUser` starts this file as a server. It imports what commands import and forks for each
command; the child gives up its rights and becomes the command. So a command costs no start of
torch, and works where other users can't reach the Python that root runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOBODY = 65534
"""The user and group that commands run as if the tests run as root."""

_SECONDS = 120
_PR_SET_DUMPABLE = 4  # linux/prctl.h: /proc/self of the child belongs to its user then
_UNSUITABLE = {"antigravity", "idlelib", "lib2to3", "pip", "test", "this", "tkinter", "turtledemo"}


class OtherUser:
    """A server of commands. Use it as a context manager."""

    def __enter__(self) -> OtherUser:
        self._scratch = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._scratch.cleanup()

    def gmpipe(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        closed: bool = False,
    ) -> tuple[int, str, str]:
        """Run a command in a folder; return its exit code, stdout and stderr.

        Args:
            folder: the current folder.
            arguments: of gmpipe.
            environment: variables to change.
            limits: of `resource`, as `{"FSIZE": 1000}`.
            closed: whether nobody reads the command's stdout.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = (Path(self._scratch.name) / name for name in ("out", "err"))
        request = {
            "folder": str(folder),
            "arguments": arguments,
            "environment": dict(environment or {}),
            "limits": dict(limits or {}),
            "closed": closed,
            "out": str(out),
            "err": str(err),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return code, out.read_text(errors="replace"), err.read_text(errors="replace")


def given(path: Path) -> None:
    """Give a folder and all in it to the user whom commands run as."""
    if os.geteuid() == 0:
        for each in (path, *path.rglob("*")):
            os.chown(each, NOBODY, NOBODY, follow_symlinks=False)


def unreachable() -> str:
    """Why no other user can run commands; empty if one can."""
    import torch

    if os.geteuid():
        return ""
    for path in map(Path, (torch.__file__, __file__)):
        for parent in path.parents:
            if not parent.stat().st_mode & 0o001:
                return f"other users can't reach {path}: {parent} is closed to them"
    return ""


# --- the server ----------------------------------------------------------------------------------


def _import_all() -> None:
    """Import what commands may import later, when they may not read root's Python any more."""
    for name in (*sorted(sys.stdlib_module_names), "encodings.idna"):
        if name.startswith("_") or name in _UNSUITABLE:
            continue
        with contextlib.suppress(Exception):
            module = importlib.import_module(name)
            for _, below, _ in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
                if not below.endswith("__main__") and below.split(".")[1] not in _UNSUITABLE:
                    with contextlib.suppress(Exception):
                        importlib.import_module(below)
    # Not matplotlib and all that imports it: it looks for its folders when it is imported.
    for name in ("torch", "torchvision", "sklearn.metrics", "distributed", "h5py", "onnx"):
        importlib.import_module(name)
    for name in (
        "clusters",
        "stages.cli.main",
        "stages.extract",
        "stages.train",
        "stages.detector",
    ):
        importlib.import_module(name)
    for name in ("commands.cache", "commands.runs.show", "prepare", "evaluate", "workers.cluster"):
        importlib.import_module(f"stages.{name}")


def _serve() -> None:
    """Read requests from stdin, and answer each with the exit code of its command."""
    _import_all()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_outcome(json.loads(line)))  # to end in the usual way takes seconds
        print(_code_of(pid), flush=True)


def _code_of(pid: int) -> int:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _outcome(request: dict[str, Any]) -> int:
    """Run the command in this process, and return its exit code."""
    try:
        _become(request)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 3
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _become(request: dict[str, Any]) -> None:
    """Be the command."""
    for descriptor, path in ((0, "/dev/null"), (1, request["out"]), (2, request["err"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the server's has read ahead
    if request["closed"]:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
    sys.argv = ["gmpipe", *request["arguments"]]
    with _workers(request["arguments"]):
        importlib.import_module("stages.cli.main").main()


def _workers(arguments: list[str]) -> contextlib.AbstractContextManager[Any]:
    """Dask's worker in this process for what extracts: python may be out of reach for others."""
    if not {"extract", "--repair"} & set(arguments):
        return contextlib.nullcontext()
    import clusters

    return clusters.worker_in_this_process()  # type: ignore[no-any-return]


if __name__ == "__main__":
    _serve()
