"""Several gmpipe commands at a time, each in a process of its own with one thread."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any

from stages.console.messages import echo, is_quiet, is_verbose, note
from stages.console.progress import (
    AS_MESSAGES,
    State,
    progress_bar,
    read_message,
    say_resumed,
    shows_bars,
)

Command = Sequence[str]
"""The arguments of a gmpipe command, e.g. `("train", "--dataset", "demo")`."""

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", AS_MESSAGES: "1"}
_POLL_SECONDS = 0.05
_NOTE, _ERROR = "Note: ", "Error: "


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        output: what its commands printed on stdout.
        problem: why a command failed; empty if none did.
    """

    output: str
    problem: str = ""


def run_jobs(
    jobs: Mapping[str, Sequence[Command]], at_once: int, until: float = math.inf
) -> Iterator[tuple[str, Outcome]]:
    """Run jobs in processes; yield the name and the outcome of each as it ends.

    The processes say as much as this one does (`--quiet`, `--verbose`). They end when the generator
    is closed, and with the thread that runs it, even if this process is killed.

    Args:
        jobs: by name, commands that run one after the other; the first one that fails ends the job.
        at_once: how many jobs run at the same time.
        until: the time, on `time.monotonic`'s clock, from which no further job is begun.
    """
    waiting = deque(jobs.items())
    started: list[_Job] = []
    running: list[_Job] = []
    with closing(_Shown(len(jobs))) as shown:
        try:
            while waiting or running:
                if time.monotonic() >= until:
                    waiting.clear()
                while waiting and len(running) < at_once:
                    started.append(_Job(*waiting.popleft()))
                    running.append(started[-1])
                time.sleep(_POLL_SECONDS)
                ended = [job for job in running if job.has_ended()]
                running = [job for job in running if job not in ended]
                shown.update(started, running)
                for job in ended:
                    yield job.name, job.outcome()
        finally:  # above all after Ctrl-C
            for job in running:
                job.kill()


class _Shown:
    """The progress of the jobs: a bar of all, in which a running job counts by its part done.

    In a terminal, each running job has a bar of its own as well. Elsewhere, the lines name them.
    """

    def __init__(self, jobs: int) -> None:
        # Not smoothed: what was done since the start tells best how long the rest takes.
        self._all = progress_bar(total=jobs, desc="runs", unit="run", smoothing=0)
        self._bars: dict[_Job, tuple[str, Any]] = {}

    def update(self, started: Sequence[_Job], running: Sequence[_Job]) -> None:
        """Show the states of the jobs; those that were started and don't run have ended."""
        ended = len(started) - len(running)
        part = sum(job.done for job in running)
        self._all.n = ended + part if part else ended
        self._all.initial = sum(job.done_before for job in started)
        states = {job: job.state for job in running if job.state is not None}
        if shows_bars():
            for job in [job for job in self._bars if job not in states]:
                self._bars.pop(job)[1].close()
            for job, state in states.items():
                self._draw(job, state)
        else:
            self._all.set_postfix_str("; ".join(map(str, states.values())), refresh=False)
        self._all.update(0)

    def _draw(self, job: _Job, state: State) -> None:
        desc, bar = self._bars.get(job, ("", None))
        if bar is None or desc != state.desc:
            if bar is not None:
                bar.close()
            bar = progress_bar(total=state.total, desc=state.desc, unit=state.unit, leave=False)
            self._bars[job] = state.desc, bar
        if bar.initial != state.resumed:
            bar.start_at(state.resumed)
        bar.set_postfix_str(state.note, refresh=False)
        bar.update(state.done - bar.n)

    def close(self) -> None:
        """End all bars."""
        for _, bar in self._bars.values():
            bar.close()
        self._all.close()


class _Job:
    """A job in progress: the process of its current command, and the commands after that.

    Attributes:
        name: of the job.
        state: of its current command; None before it has any.
        done: the part of the job that is done. Each command is an equal part.
        done_before: the part that had been done before, by commands that were resumed.
    """

    def __init__(self, name: str, commands: Sequence[Command]) -> None:
        self.name = name
        self.state: State | None = None
        self.done = self.done_before = 0.0
        self._part = 1 / len(commands)
        self._ended = 0  # commands
        self._commands = deque(commands)
        # Closed by `outcome` or `kill`. Files, unlike pipes, need nobody who reads them meanwhile.
        self._output = TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._messages = TemporaryFile()  # noqa: SIM115
        self._read = 0  # bytes of the messages
        self._said: list[str] = []  # lines of the messages, without progress and notes
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
        self._listen(to_the_end=code is not None)
        if code == 0 and self._commands:
            self._process = self._start()
            self._ended += 1
            self.state, self.done = None, self._ended * self._part
            return False
        return code is not None

    def _listen(self, *, to_the_end: bool) -> None:
        """Take what the process has written since the last call: states, notes and the rest."""
        # The position of the file is the process's, since both share it.
        size = os.fstat(self._messages.fileno()).st_size
        text = os.pread(self._messages.fileno(), size - self._read, self._read)
        if not to_the_end:
            text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.decode(errors="replace").splitlines():
            state = read_message(line)
            if state is not None:
                self._take(state)
            elif line.startswith(_NOTE) and not any(said.startswith(_ERROR) for said in self._said):
                note(line.removeprefix(_NOTE))  # once, although every process says it
            else:
                self._said.append(line)

    def _take(self, state: State) -> None:
        if state.resumed and (self.state is None or state.resumed != self.state.resumed):
            say_resumed(state.desc, state.unit, state.resumed, state.total)
        self.state = state
        if state.total:
            self.done = (self._ended + state.done / state.total) * self._part
            self.done_before = max(self.done_before, state.resumed / state.total * self._part)

    def outcome(self) -> Outcome:
        """The outcome of a job that has ended; messages other than its error are passed on."""
        with self._output, self._messages:
            self._output.seek(0)
            output = self._output.read().rstrip()
        code = self._process.returncode
        messages = "\n".join(self._said).rstrip()
        messages, *errors = re.split(rf"^{_ERROR}", messages, maxsplit=1, flags=re.MULTILINE)
        if messages := messages.rstrip():
            echo(messages, err=True)
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
