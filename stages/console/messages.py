"""What a command says besides the results that were asked for, and how much of it.

Modules log to a logger of their own name (`logging.getLogger(__name__)`): INFO is a line of
`--verbose`, a warning is seen unless `--quiet`. Results and errors are always seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

QUIET, NORMAL, VERBOSE = logging.ERROR, logging.WARNING, logging.INFO
"""How much is said, as levels of the loggers."""

_LOGGERS = [logging.getLogger(name) for name in ("stages", "pipeline")]


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class _Formatter(logging.Formatter):
    """Warnings as sentences; all else with its time and origin."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            return f"Note: {record.getMessage()}"
        return super().format(record)


@contextmanager
def speaking(level: int = NORMAL) -> Iterator[None]:
    """While a command runs: log to stderr, and leave logging as it was."""
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
    """Say as much as `QUIET`, `NORMAL` or `VERBOSE` ask for."""
    for logger in _LOGGERS:
        logger.setLevel(level)


def level() -> int:
    """How much is said: for a process that is to say as much as this one."""
    return _LOGGERS[0].getEffectiveLevel()


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return level() >= QUIET


def is_verbose() -> bool:
    """Whether everything is wanted."""
    return level() <= VERBOSE


def say(line: str) -> None:
    """A line on stdout about what was done, or where it went; not where it must be quiet."""
    if not is_quiet():
        click.echo(line)


def note(line: str) -> None:
    """A line on stderr that a user should know of; not where it must be quiet."""
    logging.getLogger(__name__).warning(line)
