"""Progress on stderr: bars in a terminal, plain lines elsewhere, nothing under `--quiet`."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from stages.console.messages import is_quiet

_SECONDS = {True: 0.2, False: 30}
"""Time between two updates: in a terminal (True) and elsewhere (False)."""


def shows_bars() -> bool:
    """Whether progress is shown as bars."""
    return sys.stderr.isatty() and not is_quiet()


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """Make a tqdm bar with the rate and the time left.

    If stderr is not a terminal, it writes a line at the start, one every 30 s and one at the end.
    """
    is_terminal = sys.stderr.isatty()
    if not is_terminal:
        options |= {"file": _Lines(), "ncols": 0, "miniters": 1}
    if is_quiet():
        options["disable"] = True  # only then: otherwise TQDM_DISABLE decides
    return tqdm(iterable, mininterval=_SECONDS[is_terminal], **options)


class _Lines:
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
