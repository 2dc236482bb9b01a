"""Seeding: the same seed on the same machine gives the same numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def seeded(seed: int, *, deterministic: bool = True) -> Iterator[None]:
    """Seed torch, and ask for deterministic kernels, within the block.

    Afterwards the random states, the choice of kernels and the environment are as they were
    before.

    cuBLAS reads its variable when a process first multiplies matrices on CUDA. A process that has
    done so before the block, without the variable, gets torch's warning. Where CUDA has no
    deterministic kernel, torch warns and uses another one; docs/experiments.md says where. If the
    process already asks torch for an error instead, it gets the error.

    Args:
        seed: of the CPU's and CUDA's generators.
        deterministic: whether to ask for such kernels; if not, what the process asks for is kept.
    """
    cudnn, kernels = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    mode, benchmark = torch.get_deterministic_debug_mode(), cudnn.benchmark
    filled, workspace = kernels.fill_uninitialized_memory, os.environ.get(_CUBLAS)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            if deterministic:
                os.environ.setdefault(_CUBLAS, ":4096:8")
                _set_mode(max(mode, 1))
                cudnn.benchmark = False
            kernels.fill_uninitialized_memory = False  # slow, and nothing reads such memory
            torch.manual_seed(seed)
            yield
        finally:
            cudnn.benchmark = benchmark
            kernels.fill_uninitialized_memory = filled
            _set_mode(mode)
            if workspace is None:
                os.environ.pop(_CUBLAS, None)


def _set_mode(mode: int) -> None:
    """Choose kernels: 0 any, 1 deterministic or a warning, 2 deterministic or an error."""
    if torch.cuda.is_available():  # also asks torch's compiler, whose import takes a second
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)


def seed_process(seed: int, rank: int) -> None:
    """Seed torch for one of several processes, so that each of them draws its own dropout.

    Process 0 keeps the state that it has: a training in one process is not seeded twice.
    """
    if rank:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))
