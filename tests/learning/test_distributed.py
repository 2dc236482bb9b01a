"""Several processes train one network: real ones, started by torchrun on the CPU.

`toys` describes the toy problem: 42 training images.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import BIN, ROOT, Flow, Outcome
from toys import KILLED_AT, copied, make_checkout

from pipeline.errors import GmpipeError
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.distributed import Processes, processes

CPU = torch.device("cpu")


def torchrun(flow: Flow, count: int, *command: str) -> Outcome:
    """A command in ``count`` processes that talk to each other."""
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


@pytest.mark.parametrize(
    "batch_size",
    # 33 images train: steps of 14, 14 and 5, of which the processes have 3 and 2, or of 16, 16
    # and 1, which only one has.
    [pytest.param(14, marks=pytest.mark.slow), 16],
)
def test_two_processes_make_the_steps_of_one_with_twice_the_batch(
    tmp_path: Path, batch_size: int
) -> None:
    """To a relative 1e-5: the sums of a step are rounded in another order."""
    one, two = (
        make_checkout(tmp_path / name, batch_size=size, validation=9 / 42, beta=0.4)
        for name, size in (("one", batch_size), ("two", batch_size // 2))
    )
    one.ok("train")
    done = torchrun(two, 2, str(BIN / "gmpipe"), "train")
    assert done.code == 0, done.err
    assert len(re.findall("full-s0: 4 epochs", done.out)) == 1
    expected, found = history(one), history(two)
    assert list(found) == list(expected)
    for column in expected:
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5, err_msg=column)
    states = [load_checkpoint(flow / "runs/toy/full-s0/checkpoint.pt").state for flow in (one, two)]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
    assert list((two / ".state").glob("*.*")) == []
    assert (two / ".state/times/toy.csv").read_text().count("train,full-s0,") == 1


@pytest.mark.slow
def test_killed_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, of which each process has its own; 3 steps are an epoch."""
    network = {"latent_size": 8, "neighbors": 2, "dropout": 0.2}
    whole = make_checkout(tmp_path / "whole", network=network, batch_size=8, epochs=2)
    flow = copied(whole, tmp_path)
    assert torchrun(whole, 2, str(BIN / "gmpipe"), "train").code == 0
    for step, where, done in ((2, "step", (0, 2)), (2, "saving", (1, 0))):
        killed = torchrun(flow, 2, sys.executable, "-c", KILLED_AT, str(step), where)
        assert killed.code != 0
        assert "SIGKILL" in killed.err
        [state] = [path for path in (flow / ".state").iterdir() if path.suffix == ".pt"]
        position = torch.load(state, weights_only=True)["position"]
        assert (len(position["history"]), position["steps"]) == done
    assert flow.gmpipe("train").refused("in 2 processes, this one has 1.*Start as many as before")
    finished = torchrun(flow, 2, str(BIN / "gmpipe"), "train")
    assert finished.code == 0, finished.err
    assert flow.bytes("runs") == whole.bytes("runs")


@pytest.mark.slow
def test_processes_that_diverge_say_so_once(tmp_path: Path) -> None:
    flow = make_checkout(tmp_path / "flow", learning_rate=1e20, clip_norm=1e30)
    done = torchrun(flow, 2, str(BIN / "gmpipe"), "train")
    assert done.code != 0
    assert done.err.count("Error: training of full, seed 0, diverged in step 2") == 1


@pytest.mark.parametrize("missing", ["RANK", "MASTER_PORT"])
def test_half_an_environment_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing)
    with (
        pytest.raises(GmpipeError, match=rf"WORLD_SIZE=1, but no {missing}\. Start with `torchrun"),
        processes(),
    ):
        pass
