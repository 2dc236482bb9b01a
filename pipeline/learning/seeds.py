"""Same seed, same machine: same numbers."""

from __future__ import annotations

import torch


def seed_everything(seed: int) -> None:
    """Seed torch and, on CUDA, ask for deterministic kernels (a warning where there is none).

    On the CPU the kernels in use are deterministic already, and asking costs seconds of imports.
    """
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
