"""Expect an error for the user: its kind, and what its message must name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import GmpipeError


@contextmanager
def refused(kind: type[GmpipeError], *parts: str) -> Iterator[None]:
    """Expect that the block raises an error of exactly this kind.

    Args:
        kind: the subclass of `GmpipeError`.
        parts: the file names, keys, values, image ids and commands that the message must have.
            Its wording is free.
    """
    with pytest.raises(GmpipeError) as caught:
        yield
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    lacking = [part for part in parts if part not in message]
    assert not lacking, f"{lacking} not in: {message}"
    assert not message.endswith(" "), message
