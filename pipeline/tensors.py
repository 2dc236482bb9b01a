"""Tensors in files of their own, and the device to compute on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from pipeline.files import replacing


def save_tensors(path: Path, content: Any) -> None:
    """``torch.save``, whole or not at all; the same content gives the same bytes.

    Through memory: given a path, torch.save writes the path's (temporary) name into the file, and
    it hides a full disk behind a RuntimeError.
    """
    stream = io.BytesIO()
    torch.save(content, stream)
    with replacing(path) as temporary:
        temporary.write_bytes(stream.getbuffer())


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
