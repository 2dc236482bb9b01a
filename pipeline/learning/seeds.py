"""Seeding: the same seed on the same machine gives the same numbers."""

from __future__ import annotations

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch and, on CUDA, ask for deterministic kernels.

    Where CUDA has no deterministic kernel, torch warns. On the CPU the kernels in use are
    deterministic already, and asking for them costs seconds of imports.
    """
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)


def seed_process(seed: int, rank: int) -> None:
    """Seed torch for one of several processes, so that each of them draws its own dropout.

    Process 0 keeps the state that it has: a training in one process is not seeded twice.
    """
    if rank:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))
