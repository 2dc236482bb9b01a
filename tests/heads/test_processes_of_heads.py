"""Every head in two processes, whose averaged gradients are those of one on all images.

torch's DistributedDataParallel hands on what a head takes and returns, and refuses a second step if
a parameter had no part in the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flows import BIN, ROOT
from tiny import make_batch, make_head, make_label_set, make_truth

from pipeline.learning.distributed import Processes
from pipeline.learning.losses import compute_loss
from pipeline.settings import WeightedLoss, variant_names

ALL = tuple(name for name in variant_names() if not name.endswith("-published"))


def compare() -> None:
    """Run in each of two processes: compare the gradients of every head's second step."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    processes = Processes(rank, 2, 2, torch.device("cpu"))
    batch, labels, truth = make_batch(6), make_label_set(), make_truth(6)
    own = slice(0, 3) if rank == 0 else slice(3, 6)
    for variant in ALL:
        head, alone = make_head(variant), make_head(variant)
        parallel = processes.parallel(head)
        for _ in range(2):
            head.zero_grad()
            output = parallel(batch.each(lambda x: x[own]), labels, truth[own])
            compute_loss(output, truth[own], labels.ratio, WeightedLoss()).backward()
        compute_loss(alone(batch, labels, truth), truth, labels.ratio, WeightedLoss()).backward()
        for one, other in zip(head.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        if rank == 0:
            print(variant)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_every_head() -> None:
    paths = [str(ROOT), *(path for path in sys.path if Path(path).is_relative_to(ROOT))]
    done = subprocess.run(
        [BIN / "torchrun", "--standalone", "--nproc-per-node=2", __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(ALL)


if __name__ == "__main__":
    compare()
