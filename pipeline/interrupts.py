"""Ctrl-C in the middle of a long loop, which saves what is done before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed, and what was done is saved.

    Attributes:
        steps: number of steps that are done and saved.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.steps = steps


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait until the loop in this block asks for it; a second one interrupts at once.

    Only the main thread can do so, and only where Ctrl-C raises `KeyboardInterrupt`, as it does
    unless a program says otherwise. Elsewhere nothing changes.

    Yields:
        a function that says whether Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: it was pressed, but the loop ended without asking for it.
    """
    default = signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not default:
        yield lambda: False
        return
    pressed = False

    def defer(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, default)

    signal.signal(signal.SIGINT, defer)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed:
        raise KeyboardInterrupt
