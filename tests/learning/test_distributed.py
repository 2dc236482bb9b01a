"""Several processes train one network.

The slow tests start real ones with torchrun, on the CPU. `toys` describes the toy problem: 42
training images.
"""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import BIN, ROOT, Flow, Outcome
from torch import nn
from toys import KILLED_AT, N_TRAIN, VECTORS, D, Toy, copied, make_checkout
from trainings import known

from pipeline.errors import InputError
from pipeline.heads.building import build_head
from pipeline.heads.contract import HeadSizes
from pipeline.learning.batches import Feed
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.distributed import Processes, joined_processes
from pipeline.learning.loop import TrainingLoop
from pipeline.learning.splits import SplitData
from pipeline.settings import GmMlicSettings, TrainSettings, WeightedLoss

CPU = torch.device("cpu")


def torchrun(flow: Flow, count: int, *command: str) -> Outcome:
    """Run a command in ``count`` processes that communicate."""
    done = subprocess.run(
        [BIN / "torchrun", "--standalone", "--no-python", f"--nproc-per-node={count}", *command],
        cwd=flow.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def history(flow: Flow) -> dict[str, list[float]]:
    """Each column of the run's history."""
    with (flow / "runs/toy/full-s0/history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 32])
def test_the_parts_of_a_step_are_even_and_whole(count: int, images: int) -> None:
    step = np.random.default_rng(0).permutation(100)[:images]
    parts = [Processes(rank, count, count, CPU).part(step) for rank in range(count)]
    assert sum(share for _, share in parts) == pytest.approx(1)
    real = [own for own, share in parts if share]
    np.testing.assert_array_equal(np.concatenate(real), step)
    sizes = [len(own) if share else 0 for own, share in parts]
    assert max(sizes) - min(sizes) <= 1
    for own, share in parts:
        assert share == (len(own) / images if share else 0)
        if not share:  # it takes part, for nothing
            assert own.tolist() == [step[0]]


class OneOfMany(Processes):
    """One of several processes, without the others: it gets only its own values back."""

    def parallel(self, network: nn.Module) -> nn.Module:
        return network

    def total(self, values: list[float]) -> list[float]:
        return values


def gradients(split: SplitData, folder: Path, processes: Processes) -> list[torch.Tensor]:
    """The gradients of a step that takes all images of a split."""
    torch.manual_seed(0)
    chosen = TrainSettings(
        network=GmMlicSettings(latent_size=8, neighbors=2),
        batch_size=math.ceil(len(split) / processes.count),
        loss=WeightedLoss(beta=0.4),
        clip_norm=1e9,
    )
    loop = TrainingLoop(
        build_head(HeadSizes(D, *VECTORS.vectors.shape, classes=9), chosen.network),
        known(split),
        Feed(split, CPU),
        chosen,
        seed=0,
        processes=processes,
        name="the network",
        state_file=folder / "state.pt",
        save_every=math.inf,
    )
    loop.run_epoch()
    return [p.grad for p in loop.network.parameters() if p.grad is not None]


@pytest.mark.parametrize("images", [1, 5, N_TRAIN])
@pytest.mark.parametrize("count", [2, 3])
def test_averaged_gradients_of_processes_are_those_of_one(
    toy: Toy, tmp_path: Path, count: int, images: int
) -> None:
    split = toy.train.take(np.arange(images))
    expected = gradients(split, tmp_path, Processes(0, 1, 1, CPU))
    parts = [
        gradients(split, tmp_path, OneOfMany(rank, count, count, CPU)) for rank in range(count)
    ]
    for whole, *own in zip(expected, *parts, strict=True):
        torch.testing.assert_close(torch.stack(own).mean(0), whole, rtol=1e-4, atol=1e-6)


def test_a_parallel_network_comes_without_warnings(tmp_path: Path) -> None:
    """Warnings fail tests."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = Processes(0, 2, 2, CPU).parallel(nn.BatchNorm1d(3))
        parallel(torch.ones(2, 3)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "repeat_threshold"),
    # 33 images train: in steps of 14, 14 and 5, of which the processes take 3 and 2, or in steps
    # of 16, 16 and 1, which only one of them takes.
    [(14, 0.0), (16, 1.0)],
)
def test_two_processes_make_the_steps_of_one_with_twice_the_batch(
    tmp_path: Path, batch_size: int, repeat_threshold: float
) -> None:
    """They agree to a relative 1e-5, because the sums of a step are rounded in another order."""
    same = {"validation": 9 / 42, "loss": {"beta": 0.4}, "repeat_threshold": repeat_threshold}
    one, two = (
        make_checkout(tmp_path / name, batch_size=size, **same)
        for name, size in (("one", batch_size), ("two", batch_size // 2))
    )
    one.ok("train")
    done = torchrun(two, 2, str(BIN / "gmpipe"), "train")
    assert done.code == 0, done.err
    assert len(re.findall("full-s0: 4 epochs", done.out)) == 1
    expected, histories = history(one), history(two)
    assert list(histories) == list(expected)
    for column in expected:
        np.testing.assert_allclose(histories[column], expected[column], rtol=1e-5, err_msg=column)
    states = [load_checkpoint(flow / "runs/toy/full-s0/checkpoint.pt").state for flow in (one, two)]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
    assert list((two / ".state").glob("*.*")) == []
    assert (two / ".state/times/toy.csv").read_text().count("train,full-s0,") == 1


@pytest.mark.slow
def test_killed_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, which each process draws itself; an epoch of 40 images has 3 steps."""
    network = {"latent_size": 8, "neighbors": 2, "dropout": 0.2}
    changes = {"network": network, "batch_size": 8, "epochs": 2, "training_share": 40 / 42}
    whole = make_checkout(tmp_path / "whole", **changes)
    flow = copied(whole, tmp_path)
    assert torchrun(whole, 2, str(BIN / "gmpipe"), "train").code == 0
    for step, where, done in ((2, "step", (0, 2)), (2, "saving", (1, 0))):
        killed = torchrun(flow, 2, sys.executable, "-c", KILLED_AT, str(step), where)
        assert killed.code != 0
        assert "SIGKILL" in killed.err
        [state] = [path for path in (flow / ".state").iterdir() if path.suffix == ".pt"]
        position = torch.load(state, weights_only=True)["position"]
        assert (len(position["history"]), position["steps"]) == done
    assert flow.gmpipe("train").refused(r"\b2 processes.*\b1\b.*Start 2\b")
    finished = torchrun(flow, 2, str(BIN / "gmpipe"), "train")
    assert finished.code == 0, finished.err
    assert flow.bytes("runs") == whole.bytes("runs")
    assert load_checkpoint(flow / "runs/toy/full-s0/checkpoint.pt").trained_images == 40


@pytest.mark.slow
def test_processes_that_diverge_say_so_once(tmp_path: Path) -> None:
    flow = make_checkout(tmp_path / "flow", learning_rate=1e20, clip_norm=1e30)
    done = torchrun(flow, 2, str(BIN / "gmpipe"), "train")
    assert done.code != 0
    assert len(re.findall(r"Error: .*\bfull, seed 0\b.* step 2\b", done.err)) == 1


@pytest.mark.parametrize("missing", ["RANK", "MASTER_PORT"])
def test_half_an_environment_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing)
    with (
        pytest.raises(InputError, match=rf"WORLD_SIZE=1\b.* {missing}\. .*torchrun"),
        joined_processes(),
    ):
        pass
