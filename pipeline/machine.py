"""What this process may use of the machine, and what the machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def is_intel(root: Path = Path("/")) -> bool:
    """Whether the processor is one of Intel's.

    Args:
        root: of the file system that contains /proc.
    """
    return "GenuineIntel" in (root / "proc/cpuinfo").read_text()


def sign_of_gpu(root: Path = Path("/")) -> str | None:
    """Say what shows that this machine has an NVIDIA GPU, whether or not torch can use it.

    Args:
        root: of the file system that contains /proc and /dev.

    Returns:
        the path of its device or its driver's entry, or what `nvidia-smi` calls it; None if nothing
        shows one.
    """
    device, cards = root / "dev/nvidia0", root / "proc/driver/nvidia/gpus"
    if device.exists():
        return str(device)
    if cards.is_dir() and any(cards.iterdir()):  # without a card, the driver's folder is empty
        return str(cards)
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        listed = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    named = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return f"`nvidia-smi`: {named[0]}" if named else None


def available_memory(root: Path = Path("/")) -> int:
    """Number of bytes of memory that this process may still allocate.

    This is the kernel's estimate without swapping (`MemAvailable` of proc_meminfo(5)), limited by
    every control group around the process (`memory.max` of cgroup v2, as `systemd` and Kubernetes
    set it, or `memory.limit_in_bytes` of v1, whose groups a container sees as its root). Page cache
    that a group could give back counts as free.

    Args:
        root: of the file system that contains /proc and /sys.
    """
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024  # the file says kB and means KiB
    for group, limit, used, idle in _memory_groups(root):
        bound = (group / limit).read_text().strip()
        if bound != "max":
            lines = (group / "memory.stat").read_text().splitlines()
            statistics = dict(line.split() for line in lines)
            taken = int((group / used).read_text()) - int(statistics[idle])
            available = min(available, max(0, int(bound) - taken))
    return available


def _memory_groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """The control groups around this process that have a limit.

    Returns:
        the folder of each, the names of its files with the limit and the use, and the name of the
        line in `memory.stat` with the idle cache.
    """
    groups_with_limit: list[tuple[Path, str, str, str]] = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = root / "sys/fs/cgroup" / controllers
            inner = folder / path.lstrip("/")
            names = ("memory.max", "memory.current", "inactive_file")
            if controllers:
                names = (
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                )
            # The root of v2 has no limit. In a container the path may be the host's.
            groups = [inner, *inner.parents]
            groups_with_limit += [
                (group, *names)
                for group in groups
                if group.is_relative_to(folder) and (group / names[0]).is_file()
            ]
    return groups_with_limit
