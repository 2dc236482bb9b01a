"""Files of label vectors: npz, GloVe's text, and zips of it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_npz(path: Path, **vectors: Any) -> str:
    """An npz with one entry per keyword; its path as the setting `label_vectors`."""
    np.savez(path, labels=np.array(list(vectors)), vectors=np.array(list(vectors.values())))
    return str(path)


def glove_line(word: str, values: Sequence[float]) -> bytes:
    """A line as GloVe's program writes it."""
    return " ".join([word, *(f"{value:.5g}" for value in values)]).encode() + b"\n"


def write_glove(path: Path, vectors: Mapping[str, Sequence[float]]) -> str:
    """A text with one line per word; its path as the setting `label_vectors`."""
    path.write_bytes(b"".join(glove_line(*entry) for entry in vectors.items()))
    return str(path)


def zip_glove(path: Path, members: Mapping[str, bytes], compression: int = 8) -> str:
    """A zip with these files; its path as the setting `label_vectors`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return str(path)


SMALL = {"the": [0.1, 0.2, 0.3], "sun": [1, -2, 3e-5], "traffic": [4, 5, 6], "light": [6, 5, -4]}
"""A GloVe file of four words, for `write_glove`."""
