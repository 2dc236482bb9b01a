"""What a command prints besides the requested results, and how much of it.

Modules log with `logging.getLogger(__name__)`. INFO is printed under `--verbose`, and a warning
unless `--quiet` is given. Results and errors are always printed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import click

from pipeline.errors import Stopped
from pipeline.formats.text import printable_lines
from pipeline.interrupts import Interrupted

QUIET, NORMAL, VERBOSE = logging.ERROR, logging.WARNING, logging.INFO
"""How much is printed, as levels of the loggers."""

_LOGGERS = [logging.getLogger(name) for name in ("stages", "pipeline")]


class _Handler(logging.Handler):
    """Prints each warning once, although several processes of a command may have the same."""

    def __init__(self) -> None:
        super().__init__()
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            if text in self._warnings:
                return
            self._warnings.add(text)
        echo(text, err=True)


class _Formatter(logging.Formatter):
    """Format warnings as sentences, and everything else with its time and origin."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            return f"Note: {record.getMessage()}"
        return super().format(record)


@contextmanager
def speaking(level: int = NORMAL) -> Iterator[None]:
    """Log to stderr while a command runs, and restore logging afterwards."""
    handler = _Handler()
    handler.setFormatter(_Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    before = [logger.level for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.addHandler(handler)
    set_level(level)
    try:
        yield
    finally:
        for logger, former in zip(_LOGGERS, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(former)


def set_level(level: int) -> None:
    """Print as much as `QUIET`, `NORMAL` or `VERBOSE` ask for."""
    for logger in _LOGGERS:
        logger.setLevel(level)


def level() -> int:
    """Return how much is printed, for a process that is to print as much as this one."""
    return _LOGGERS[0].getEffectiveLevel()


def is_quiet() -> bool:
    """Whether only results and errors are printed."""
    return level() >= QUIET


def is_verbose() -> bool:
    """Whether everything is printed."""
    return level() <= VERBOSE


def say(line: str) -> None:
    """Print a line on stdout about what was done and where it was written, unless quiet."""
    if not is_quiet():
        echo(line)


def note(line: str) -> None:
    """Print a line on stderr that the user should know about, unless quiet."""
    logging.getLogger(__name__).warning(line)


def echo(text: str, *, err: bool = False) -> None:
    """Print a text on stdout or stderr. Bars make room for it."""
    # Without its import, which takes a third of the time of `gmpipe --help`, there are no bars.
    progress = sys.modules.get("tqdm")
    with progress.tqdm.external_write_mode(sys.stderr) if progress else nullcontext():
        click.echo(printable_lines(text), err=err)


def stopped(interrupted: Interrupted, total: int) -> Stopped:
    """The error that says where a training or fit of ``total`` steps continues after Ctrl-C."""
    return Stopped(
        f"stopped at step {interrupted.steps} of {total}, which is saved.",
        "Run the same command again to continue there.",
    )
