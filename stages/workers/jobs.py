"""Several gmpipe commands at a time, each in a process of its own with one thread."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile

import click

from stages.console.messages import is_quiet, is_verbose, note
from stages.console.progress import progress_bar

Command = Sequence[str]
"""The arguments of a gmpipe command, e.g. `("train", "--dataset", "demo")`."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",  # one bar over all jobs is enough
}
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        output: what its commands printed on stdout.
        problem: why a command failed; empty if none did.
    """

    output: str
    problem: str = ""


def run_jobs(jobs: Mapping[str, Sequence[Command]], at_once: int) -> Iterator[tuple[str, Outcome]]:
    """Run jobs in processes; yield the name and the outcome of each as it ends.

    The processes say as much as this one does (`--quiet`, `--verbose`). They end when the generator
    is closed, and with the thread that runs it, even if this process is killed.

    Args:
        jobs: by name, commands that run one after the other; the first one that fails ends the job.
        at_once: how many jobs run at the same time.
    """
    waiting = deque(jobs.items())
    running: list[_Job] = []
    with progress_bar(total=len(jobs), desc="runs", unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(_Job(*waiting.popleft()))
                time.sleep(_POLL_SECONDS)
                for job in [job for job in running if job.has_ended()]:
                    running.remove(job)
                    bar.update()
                    bar.clear()
                    yield job.name, job.outcome()
        finally:  # above all after Ctrl-C
            for job in running:
                job.kill()


class _Job:
    """A job in progress: the process of its current command, and the commands after that."""

    def __init__(self, name: str, commands: Sequence[Command]) -> None:
        self.name = name
        self._commands = deque(commands)
        # Closed by `outcome` or `kill`. Files, unlike pipes, need nobody who reads them meanwhile.
        self._output = TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._messages = TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        level = ["--quiet"] * is_quiet() + ["--verbose"] * is_verbose()
        child = [sys.executable, "-P", "-m", "stages.workers.child", str(os.getpid())]
        return subprocess.Popen(
            [*child, *level, *self._commands.popleft()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._messages,
            env={**os.environ, **_ENVIRONMENT},
            process_group=0,  # a terminal sends Ctrl-C to the parent alone, which kills this one
        )

    def has_ended(self) -> bool:
        """Whether the job has ended; starts its next command if the current one has succeeded."""
        code = self._process.poll()
        if code == 0 and self._commands:
            self._process = self._start()
            return False
        return code is not None

    def outcome(self) -> Outcome:
        """The outcome of a job that has ended; messages other than its error are passed on."""
        with self._output, self._messages:
            self._output.seek(0)
            self._messages.seek(0)
            output, messages = self._output.read().rstrip(), self._messages.read().rstrip()
        code = self._process.returncode
        messages, *errors = re.split(r"^Error: ", messages, maxsplit=1, flags=re.MULTILINE)
        for line in messages.splitlines():
            if line.startswith("Note: "):
                note(line.removeprefix("Note: "))  # once, although every process says it
            else:
                click.echo(line, err=True)
        if code == 0:
            return Outcome(output)
        problems = errors if code > 0 and errors else [*errors, _how_it_ended(code)]
        return Outcome(output, " ".join(problems))

    def kill(self) -> None:
        """End the job; a command that is run again continues where it was."""
        with self._output, self._messages:
            self._process.kill()
            self._process.wait()


def _how_it_ended(code: int) -> str:
    """The reason that is left if a process ended without an error message."""
    if code >= 0:
        return f"Its process ended with exit code {code}; see its messages above."
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    reason = f"Its process was killed by {name}."
    if -code == signal.SIGKILL:
        reason += " If memory ran out, use a smaller --jobs."
    return reason
