"""Add the command that fixes an error of the library.

The library names no command, since it does not know how it is run. A stage knows, and adds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import GmpipeError


@contextmanager
def advising(remedy: str, *kinds: type[GmpipeError]) -> Iterator[None]:
    """Replace the remedy of errors of some kinds that are raised in the block.

    Args:
        remedy: what to run, as a whole sentence.
        kinds: subclasses of `GmpipeError`. Name only kinds of problems that the remedy fixes.
    """
    try:
        yield
    except kinds as error:
        error.remedy = remedy
        raise
