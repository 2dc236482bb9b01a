"""Which command fixes an error that the library raised.

The library names no command, since it does not know how it is run. A stage knows, and adds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import GmpipeError


@contextmanager
def advising(remedy: str, *kinds: type[GmpipeError]) -> Iterator[None]:
    """Give the errors of some kinds that are raised in the block this remedy instead of their own.

    Args:
        remedy: what to run, as a whole sentence.
        kinds: subclasses of `GmpipeError`; at least one, so that no remedy is given for a problem
            that it does not fix.
    """
    try:
        yield
    except kinds as error:
        error.remedy = remedy
        raise
