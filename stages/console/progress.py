"""Progress on stderr: bars in a terminal, plain lines elsewhere, nothing under `--quiet`."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from stages.console.messages import is_quiet

_SECONDS = {True: 0.2, False: 30}
"""Between two looks of a bar, in a terminal and elsewhere."""


def shows_bars() -> bool:
    """Whether somebody watches."""
    return sys.stderr.isatty() and not is_quiet()


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """tqdm with rate and time left.

    Where stderr is no terminal it writes a line at the start, one every 30 s and one at the end.
    """
    watched = sys.stderr.isatty()
    if not watched:
        options |= {"file": _Lines(), "ncols": 0, "miniters": 1}
    if is_quiet():
        options["disable"] = True  # left out otherwise, for TQDM_DISABLE to count
    return tqdm(iterable, mininterval=_SECONDS[watched], **options)


class _Lines:
    """Takes what tqdm writes to draw over its last state, and writes each new state as a line."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        """Without the control characters and blanks that would remove the last state."""
        state = text.strip()
        if state and state != self._last:
            print(state, file=sys.stderr, flush=True)
            self._last = state

    def flush(self) -> None:
        """Every line is."""
