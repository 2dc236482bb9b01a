"""One training in several processes, as `torchrun` starts them.

Every process runs the same command on the same data and holds the same weights. Of each step's
images it takes a part, and the gradients are averaged. Process 0 alone reads and writes files of
the run. With one process nothing of torch.distributed is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pipeline.errors import GmpipeError
from pipeline.tensors import best_device

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among those of a training.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        on_machine: how many of them share this machine.
        device: what it computes on.
    """

    rank: int
    count: int
    on_machine: int
    device: torch.device

    def part(self, images: np.ndarray) -> tuple[np.ndarray, float]:
        """Which of a step's images are this process's, and their share of all of them.

        There are as many as in any other process, or one fewer. Where that is none, the first
        image stands in with a share of 0: every process must take part in every step.
        """
        own = np.array_split(images, self.count)[self.rank]
        return (own, len(own) / len(images)) if len(own) else (images[:1], 0.0)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network to call in training, whose backward pass averages gradients over all."""
        if self.count == 1:
            return network
        # Its buffers are statistics of the training split: every process has computed the same.
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over all processes; the same result in each."""
        if self.count == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return cast(list[float], summed.tolist())

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in all of them."""
        values = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """Process 0's value, in all of them."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, device=self.device)
        return values[0]


def alone() -> Processes:
    """A training in one process."""
    return Processes(rank=0, count=1, on_machine=1, device=best_device())


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that the environment tells of, until the block ends.

    With CUDA each takes the device of its number on the machine and talks over NCCL, without it
    over gloo. The variables are torchrun's (https://docs.pytorch.org/docs/stable/elastic/run.html).

    Raises:
        GmpipeError: some of the variables are set and others are not, or there are fewer devices
            than processes.
    """
    if "WORLD_SIZE" not in os.environ:
        yield alone()
        return
    start = "Start with `torchrun --no-python --nproc-per-node N gmpipe train`"
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise GmpipeError(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']}, but no "
            f"{', '.join(missing)}. {start}, which sets them all, or unset WORLD_SIZE."
        )
    rank, count, local, on_machine = (int(os.environ[name]) for name in _VARIABLES[:4])
    device = best_device()
    if device.type == "cuda":
        if on_machine > torch.cuda.device_count():
            raise GmpipeError(
                f"{on_machine} processes on a machine with {torch.cuda.device_count()} CUDA "
                f"devices; each needs one of its own. {start}, N at most their number."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, on_machine, device)
    finally:
        torch.distributed.destroy_process_group()
