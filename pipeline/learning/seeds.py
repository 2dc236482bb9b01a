"""Seeding: the same seed on the same machine gives the same numbers."""

from __future__ import annotations

import torch


def seed_everything(seed: int) -> None:
    """Seed torch and, on CUDA, ask for deterministic kernels.

    Where CUDA has no deterministic kernel, torch warns. On the CPU the kernels in use are
    deterministic already, and asking for them costs seconds of imports.
    """
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
