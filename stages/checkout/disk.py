"""Space on disks, and sizes as people read them."""

from __future__ import annotations

import shutil
from pathlib import Path


def place_of(folder: Path) -> Path:
    """The folder, links followed, or else the nearest one above it that is there."""
    whole = folder.resolve()
    return next(path for path in (whole, *whole.parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or would be made."""
    return shutil.disk_usage(place_of(folder)).free


def shown_bytes(count: float) -> str:
    """E.g. `1.23 MB`, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
