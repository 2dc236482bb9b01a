"""Progress on stderr: bars in a terminal, plain lines elsewhere, nothing under `--quiet`.

A command that another one has started (`stages.workers.jobs`) writes messages instead, from which
that one makes its own progress.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

from pipeline.formats.text import counted
from stages.console.messages import is_quiet, say

AS_MESSAGES = "GMPIPE_PROGRESS_AS_MESSAGES"
"""A variable of the environment: if it is set, progress is written as messages."""

_BEAT_SECONDS = 1.0
"""Time between two looks at a bar that is not updated, so that its clock goes on."""
_BAR_SECONDS, _LINE_SECONDS, _MESSAGE_SECONDS = 0.2, 30, 1
"""Time between two updates: of a bar, between two lines, and between two messages."""
_PHASE_DELAY = 1.0
"""Seconds after which a phase is shown; most phases are over before."""
_MESSAGE = "gmpipe progress: "


def shows_bars() -> bool:
    """Whether progress is shown as bars."""
    return sys.stderr.isatty() and not is_quiet()


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """Make a tqdm bar with the rate and the time left.

    If stderr is not a terminal, it writes a line at the start, one every 30 s and one at the end.
    With a ``delay``, it is not shown before so many seconds have passed.

    Call `resume` of it if a part of the work had been done before.
    """
    kind: type[_Bar] = _Bar if sys.stderr.isatty() else _Lines
    if os.environ.get(AS_MESSAGES):
        kind = _Messages
    if is_quiet():
        options["disable"] = True  # only then: otherwise TQDM_DISABLE decides
    return kind(iterable, **options)


@contextmanager
def progress_phase(
    desc: str, total: int | None = None, unit: str = ""
) -> Iterator[Callable[[int], object]]:
    """Show a part of a command's work that may take long.

    Args:
        desc: its name.
        total: number of things that it consists of; None if that is not known.
        unit: what such a thing is; empty if nothing is counted, and only the time is shown.

    Yields:
        a function to call with the number of things that were just done.
    """
    options = {"unit": unit} if unit else {"bar_format": "{desc}: {elapsed}"}
    with progress_bar(total=total, desc=desc, delay=_PHASE_DELAY, **options) as bar:
        yield bar.update


@dataclass(frozen=True)
class State:
    """How far another command is.

    Attributes:
        desc, unit: what it does, and what it counts.
        done, total: how many of them are done, and of how many; None if that is not known.
        resumed: how many had been done before.
        note: what else a bar would show, such as the loss.
    """

    desc: str
    unit: str
    done: int
    total: int | None
    resumed: int
    note: str

    def __str__(self) -> str:
        if self.total is None and not self.done:
            return self.desc
        done = counted(self.done, self.unit)
        if self.total is not None:
            done = f"{self.done}/{counted(self.total, self.unit)}"
        return f"{self.desc} {done}{', ' if self.note else ''}{self.note}"


def read_message(line: str) -> State | None:
    """Read a line of a command that writes its progress as messages; None for any other line."""
    if not line.startswith(_MESSAGE):
        return None
    return State(**json.loads(line.removeprefix(_MESSAGE)))


def say_resumed(desc: str, unit: str, done: int, total: int | None) -> None:
    """Say that a part of some work had been done before."""
    if done == total:
        say(f"{desc}: all {counted(done, unit)} had been done before")
    else:
        say(f"{desc}: resumed at {unit} {done:,}{'' if total is None else f' of {total:,}'}")


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar in a terminal, which goes on every second even if nothing is counted.

    An inner bar disappears at its end, since `leave` is None.
    """

    seconds: float = _BAR_SECONDS
    monitor_interval = 0  # tqdm's own thread, which only looks for bars that are updated too rarely

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self._what = options.get("desc", ""), options.get("unit", "it")
        self._ended = Event()
        self.delay: float
        own = {"mininterval": self.seconds, "miniters": 0, "leave": None}
        super().__init__(iterable, **{**own, **options})
        if not self.disable:
            Thread(target=self._go_on, daemon=True).start()

    def _go_on(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with self._lock:
                if not self.disable and self._time() >= self.start_t + self.delay:
                    self.delay = 0.0  # it is shown now, so it must be shown at its end
                    self.refresh(nolock=True)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What is shown: of a part of a thing two decimals, though the rate is that of all.

        Without a total it is only the number of things, in words; of bytes, tqdm's own.
        """
        values: dict[str, Any] = super().format_dict
        if self.total is None and not (self.unit_scale or values["bar_format"]):
            number = counted(self.n, self.unit)
            values["bar_format"] = f"{{desc}}: {number} [{{elapsed}}{{postfix}}]"
        if isinstance(self.n, float) and values["elapsed"]:
            values["rate"] = (self.n - self.initial) / values["elapsed"]
            values["n"] = round(self.n, 2)
        return values

    def resume(self, done: int) -> None:
        """Say that so many had been done before. The rate and the time left count from here."""
        if done:
            self.say_resumed(done)
            self.start_at(done)

    def start_at(self, done: int) -> None:
        """Let the rate and the time left count from here, with so many done before."""
        self.initial = self.n = self.last_print_n = done
        if not self.disable:
            self.last_print_t = self.start_t = self._time()

    def say_resumed(self, done: int) -> None:
        """Say that so many had been done before."""
        say_resumed(*self._what, done, self.total)

    def close(self) -> None:
        """Show the last state, and end."""
        if hasattr(self, "_ended"):
            self._ended.set()
        super().close()


class _Lines(_Bar):
    """A bar as plain lines: the first state, one every 30 s, and the last one."""

    seconds = _LINE_SECONDS

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self._shown: float | None = None
        options |= {"file": _Stream(), "ncols": 0, "leave": True}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the state, unless another one was written less than 30 s ago."""
        now = self._time()
        # A bar that is being closed is disabled.
        if self.disable or self._shown is None or now - self._shown >= _LINE_SECONDS:
            self._shown = now
            super().display(msg, pos)

    def moveto(self, n: int) -> None:
        """Do nothing: the lines of an outer and an inner bar follow each other."""


class _Messages(_Bar):
    """A bar as messages for the command that has started this one."""

    seconds = _MESSAGE_SECONDS

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self._last = ""
        options |= {"file": _Stream(), "leave": True}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the state if it is a new one."""
        desc, unit = self._what
        state = State(desc, unit, self.n, self.total, self.initial, self.postfix or "")
        message = _MESSAGE + json.dumps(asdict(state))
        if message != self._last:
            print(message, file=sys.stderr, flush=True)
            self._last = message

    def say_resumed(self, done: int) -> None:
        """Leave it to the other command, which reads it in the next message."""


class _Stream:
    """A stream for tqdm that writes each new state as a line instead of over the last one."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        """Write a state without the control characters and spaces that erase the last one."""
        state = text.strip()
        if state and state != self._last:
            print(state, file=sys.stderr, flush=True)
            self._last = state

    def flush(self) -> None:
        """Do nothing: every line is flushed when it is written."""
