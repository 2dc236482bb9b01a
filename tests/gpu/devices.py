"""What is done on a device while it is watched, and a group of processes with one member."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Raise an error where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        # It is a prototype, which does not see all such operations.
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Communicate over NCCL or gloo with oneself, so that one GPU is enough."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = distributed.HashStore()
    distributed.init_process_group(backend, rank=0, world_size=1, store=store)
    try:
        yield
    finally:
        distributed.destroy_process_group()
