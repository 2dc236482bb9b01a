"""Same seed, same machine: same numbers."""

from __future__ import annotations

import torch


def seed_everything(seed: int) -> None:
    """Seed torch and ask for deterministic kernels (a warning where CUDA has none)."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
