"""Free space on disks, and sizes in readable units."""

from __future__ import annotations

import shutil
from pathlib import Path


def existing_part(folder: Path) -> Path:
    """Return the folder with links followed, or its nearest parent that exists."""
    resolved = folder.resolve()
    return next(path for path in (resolved, *resolved.parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk where a folder is, or would be created."""
    return shutil.disk_usage(existing_part(folder)).free


def shown_bytes(count: float) -> str:
    """Format a number of bytes in powers of 1000, e.g. `1.23 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
