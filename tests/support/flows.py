"""Run gmpipe's commands in a folder of their own, on a data set that takes seconds."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from ruamel.yaml import YAML

from stages.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
ALL_CASES = "GMPIPE_ALL_CASES" in os.environ
"""Whether slow tests try all that they could, which takes more than an hour, or a sample of it."""
BIN = Path(sys.executable).parent
STAGES = ("prepare", "detector", "extract")
VARIANTS = ("full", "max-pool")

PARAMS: dict[str, Any] = {
    "datasets": ["tiny"],
    "variants": list(VARIANTS),
    "seeds": [0],
    "prepare": {"tiny": {"source": "scenes", "train": 24, "test": 12, "size": 64, "seed": 0}},
    "detector": {
        "tiny": {
            "source": "fit",
            "architecture": {
                "width_per_group": 1,
                "fpn_channels": 4,
                "feature_size": 8,
                "anchor_sizes": [8, 16, 32, 64, 128],
                "proposals": 20,
                "norm": "batch",
            },
            "fit": {"size": 64, "steps": 3, "batch_size": 2, "sampled_proposals": 8},
        }
    },
    "extract": {"tiny": {"size": 64, "regions": 4, "views": 2, "rows_per_shard": 10}},
    "train": {
        "tiny": {"network": {"latent_size": 8, "neighbors": 2}, "epochs": 2, "batch_size": 8}
    },
}


def write_params(folder: Path, **changes: Any) -> None:
    """Write params.yaml: the tiny one with changes, whose keys have `__` for the dot."""
    with (folder / "params.yaml").open("w") as stream:
        raw = json.loads(json.dumps(PARAMS))
        for key, value in changes.items():
            *path, last = key.split("__")
            block = raw
            for part in path:
                block = block[part]
            block[last] = value
        YAML().dump(raw, stream)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def refused(self, pattern: str) -> bool:
        """Check that the command failed with a message that matches, and with no traceback."""
        assert self.code == 1, self
        assert "Traceback" not in self.err, self.err
        message = self.err[self.err.index("Error: ") :]
        assert re.search(pattern, message, re.DOTALL), message
        return True


@dataclass(frozen=True)
class Flow:
    """A folder that gmpipe runs in."""

    folder: Path

    def __truediv__(self, path: str) -> Path:
        return self.folder / path

    def gmpipe(self, *arguments: str) -> Outcome:
        """Run `gmpipe ARGUMENTS` in this process."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["gmpipe", *arguments]),
        ):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        return Outcome(code, out.getvalue(), err.getvalue())

    def ok(self, *arguments: str) -> str:
        """Run a command that must succeed, in this process; return what it printed."""
        outcome = self.gmpipe(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    def installed(self, *arguments: str, **options: Any) -> Outcome:
        """Run the installed script `gmpipe` in a process of its own."""
        done = subprocess.run(
            [BIN / "gmpipe", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def params(self, **changes: Any) -> None:
        """Write params.yaml in this folder, as `write_params`."""
        write_params(self.folder, **changes)

    def bytes(self, path: str) -> dict[str, bytes]:
        """Read every file below a folder, or one file."""
        top = self.folder / path
        files = [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in sorted(files)}

    def metrics(self, run: str = "full-s0") -> Any:
        return json.loads((self.folder / "runs/tiny" / run / "metrics.json").read_text())


def run_all(flow: Flow) -> None:
    """Run all stages, in this process."""
    for stage in STAGES:
        flow.ok(stage)
    for variant in VARIANTS:
        flow.ok("train", "--variant", variant)
        flow.ok("evaluate", "--variant", variant)
    flow.ok("report")


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow over ``size`` bytes: writing more fails as on a full disk.

    Python ignores the signal that would come with it.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def unrendered() -> Iterator[None]:
    """Let commands in this process save figures empty.

    To render those of a page takes longer than all else that `gmpipe report` does.
    """
    contents = {"svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "png": b""}

    def save(_: Any, path: Path, *, format: str, **options: Any) -> None:
        path.write_bytes(contents[format])

    with mock.patch("matplotlib.figure.Figure.savefig", save):
        yield


@contextlib.contextmanager
def being_written(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder as another process does, but from this one."""
    with (folder.parent / f".{folder.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def started_commands(pid: int | None = None) -> list[psutil.Process]:
    """The gmpipe commands that a process has started in processes of their own."""
    commands = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "stages.cli" in child.cmdline():
                commands.append(child)
    return commands


def script(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in its own process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
