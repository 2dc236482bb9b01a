"""One training in several processes, as `torchrun` starts them.

Every process runs the same command on the same data and holds the same weights. It takes a part of
each step's images, and the gradients are averaged. Only process 0 reads and writes files of the
run. With one process, torch.distributed is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.tensors import best_device

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        on_machine: number of processes that share this machine.
        device: that this process computes on.
    """

    rank: int
    count: int
    on_machine: int
    device: torch.device

    def part(self, images: np.ndarray) -> tuple[np.ndarray, float]:
        """Select this process's part of a step's images.

        Parts differ by at most one image. A process whose part would be empty gets the first image
        with a share of 0, because every process must take part in every step.

        Returns:
            Indices of the images, and their share of the step's images.
        """
        own = np.array_split(images, self.count)[self.rank]
        return (own, len(own) / len(images)) if len(own) else (images[:1], 0.0)

    def parallel(self, network: nn.Module) -> nn.Module:
        """Wrap a network so that its backward pass averages gradients over the processes."""
        if self.count == 1:
            return network
        # Its buffers are statistics of the training split, which every process computes alike.
        # torch 2.14 has renamed the argument, and warns of its former name.
        parallel = nn.parallel.DistributedDataParallel
        names = [*signature(parallel).parameters]
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return parallel(network, **options)

    def total(self, values: Tensor) -> list[float]:
        """Sum each value of a vector over all processes, with the same result in each."""
        summed = values.double()
        if self.count > 1:
            torch.distributed.all_reduce(summed)
        return cast(list[float], summed.tolist())

    def gathered(self, value: Any) -> list[Any]:
        """Collect every process's value by rank, in all of them."""
        values = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """Send process 0's value to all processes."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, device=self.device)
        return values[0]


def alone() -> Processes:
    """This process alone."""
    return Processes(rank=0, count=1, on_machine=1, device=best_device())


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that the environment describes, until the block ends.

    With CUDA, each process takes the device of its number on the machine and communicates over
    NCCL; without, over gloo. The variables are torchrun's
    (https://docs.pytorch.org/docs/stable/elastic/run.html).

    Raises:
        InputError: some of the variables are set and others are not, or a machine has fewer
            devices than processes.
    """
    if "WORLD_SIZE" not in os.environ:
        yield alone()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise InputError(
            f"The environment sets WORLD_SIZE={os.environ['WORLD_SIZE']}, but not "
            f"{', '.join(missing)}.",
            "Start with `torchrun`, which sets them all, or unset WORLD_SIZE.",
        )
    rank, count, local, on_machine = (int(os.environ[name]) for name in _VARIABLES[:4])
    device = best_device()
    if device.type == "cuda":
        devices = torch.cuda.device_count()
        if on_machine > devices:
            raise InputError(
                f"{on_machine} processes share a machine with {devices} CUDA devices, but each "
                "needs its own.",
                f"Start at most {devices} processes on it.",
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, on_machine, device)
    finally:
        torch.distributed.destroy_process_group()
