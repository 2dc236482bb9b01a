"""Errors that a user can fix, and whose message is all that the user sees.

Naming: a subclass says what kind of problem it is, so that a caller can catch one kind without
hiding the others. Anything that is not a `GmpipeError` is a bug, and is shown with its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 4000  # characters of a problem: a list of labels, or an id of megabytes, may be in it


def _cut(text: str) -> str:
    """Leave out the middle of a text that is longer than `LONGEST`."""
    if len(text) <= LONGEST:
        return text
    start, end = LONGEST // 2, LONGEST // 4
    left_out = len(text) - start - end
    return f"{text[:start]} [... {left_out} characters are left out ...] {text[-end:]}"


def briefly(error: BaseException) -> str:
    """The type of another program's error and its text, in one line of at most some 300 letters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


class GmpipeError(Exception):
    """A problem that the user can fix, and how to fix it.

    `str(error)` is the problem followed by the remedy. The command line prints it without a
    traceback.

    Attributes:
        problem: what is wrong, where (file, row, image id, key), what was found and what was
            expected, in whole sentences. Of more than `LONGEST` characters, the middle is left out.
        remedy: the next step, in whole sentences; empty where the caller knows it better. Only
            `stages/` names commands, so it replaces the remedy where a command is the answer.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        problem = _cut(problem)
        super().__init__(problem, remedy)  # both, so that the error can be pickled
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        separator = "" if self.problem.endswith("\n") else " "  # after a list, a line of its own
        return f"{self.problem}{separator}{self.remedy}".rstrip()


class MissingError(GmpipeError):
    """A file, folder, row, package or result that is needed does not exist yet."""


class DamagedError(GmpipeError):
    """A file that gmpipe wrote can't be read, is incomplete, or breaks its format."""


class MismatchError(GmpipeError):
    """A cache, detector or run was made from other settings or inputs than those expected."""


class BusyError(GmpipeError):
    """Another process is writing to the same place."""


class WorkerError(GmpipeError):
    """Processes or machines that work for a command died or can't be reached."""


class InputError(GmpipeError):
    """Something that the user brings is wrong: a data set's files, a setting, an argument."""


class AccessError(GmpipeError):
    """The operating system refuses to read or write something; gmpipe's files may be sound."""


class NoSpaceError(AccessError):
    """The disk, or the user's share of it, is full."""


class Stopped(GmpipeError):
    """The user pressed Ctrl-C. The problem says what is kept, the remedy how to continue."""


@contextmanager
def advising(remedy: str, *kinds: type[GmpipeError]) -> Iterator[None]:
    """Replace the remedy of errors of some kinds that are raised in the block.

    Code that reads a file does not know what the file is for, and the library does not know which
    command makes it. The caller, who knows, adds that.

    Args:
        remedy: the next step, in whole sentences.
        kinds: subclasses of `GmpipeError`. Name only kinds of problems that the remedy fixes.
    """
    try:
        yield
    except kinds as error:
        error.remedy = remedy
        raise


@contextmanager
def naming(dataset: str) -> Iterator[None]:
    """Put a data set's name where errors that are raised in the block say ``<dataset>``.

    Code that reads a file or a setting does not know which data set it is for.
    """
    try:
        yield
    except GmpipeError as error:
        error.problem = error.problem.replace("<dataset>", dataset)
        error.remedy = error.remedy.replace("<dataset>", dataset)
        raise
