"""Expect an error for the user: its kind, and what its message must name. States that are odd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

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


GONE = object()


def change_state(path: Path, keys: str, value: Any) -> None:
    """Change a field of a state to resume from; its checksums are correct afterwards.

    Args:
        path: of the file.
        keys: of the field, with slashes between them; FIRST is the first tensor of the model.
        value: the new one, a function of the old one, or `GONE`.
    """
    content = torch.load(path, weights_only=True)
    keys = keys.replace("FIRST", next(iter(content["model"])))
    *parents, last = (int(key) if key.isdigit() else key for key in keys.split("/"))
    block: Any = content
    for key in parents:
        block = block[key]
    if value is GONE:
        del block[last]
    else:
        block[last] = value(block[last]) if callable(value) else value
    torch.save(content, path)


def mostly_slow(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test: every eighth case is quick, and `make test-slow` runs the others."""
    return [
        pytest.param(*case, marks=() if number % 8 == 0 else pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
