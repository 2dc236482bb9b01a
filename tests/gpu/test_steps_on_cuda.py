"""A whole step of the loop never waits for the device, nor for other processes.

The tests without the mark `cuda` try the same on the CPU, with looks at the losses as rare as on a
GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from devices import process_group, refusing_to_wait
from torch import Tensor
from toys import Toy
from trainings import SETTINGS, settings, tiny, train

from pipeline.errors import InputError
from pipeline.heads.pooling.max_pool import MaxPool
from pipeline.learning import loop
from pipeline.learning.distributed import Processes, joined_processes
from pipeline.learning.loop import Training, TrainingLoop
from pipeline.learning.steps import Gradients

CPU = torch.device("cpu")
EPOCHS = SETTINGS.epochs


@contextmanager
def rare_looks() -> Iterator[mock.MagicMock]:
    """Look at the losses as seldom on a CPU as on a GPU; yields what counts the looks."""
    look = TrainingLoop._look
    with (
        mock.patch.dict(loop._LOOK_EVERY, cpu=loop._LOOK_EVERY["cuda"]),
        mock.patch.object(TrainingLoop, "_look", autospec=True, side_effect=look) as looks,
    ):
        yield looks


def trained_as_first_of_two(toy: Toy, state_file: Path, device: torch.device) -> Training:
    """Train on half of each step's images, as the first of two processes of which one is there."""
    half = Processes(rank=0, count=2, on_machine=1, device=device)
    chosen = settings(network=tiny("full"), batch_size=4)
    with process_group(device):
        return train(toy, state_file, chosen=chosen, processes=half)


def test_steps_of_several_processes_exchange_nothing_but_gradients(
    toy: Toy, tmp_path: Path
) -> None:
    """Only the look at the end of an epoch sums the losses over the processes."""
    total = Processes.total
    with (
        rare_looks() as looks,
        mock.patch.object(Processes, "total", autospec=True, side_effect=total) as sums,
        mock.patch.object(Processes, "gathered", side_effect=AssertionError),
    ):
        training = trained_as_first_of_two(toy, tmp_path / "state.pt", CPU)
    assert len(training.history) == EPOCHS
    assert looks.call_count == sums.call_count == EPOCHS


def test_how_often_the_losses_are_looked_at_changes_nothing(toy: Toy, tmp_path: Path) -> None:
    often = train(toy, tmp_path / "a.pt")
    with rare_looks():
        seldom = train(toy, tmp_path / "b.pt")
    assert often.history == seldom.history


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of four on its machine, without a GPU: what torch is asked for."""
    variables = {"RANK": 6, "WORLD_SIZE": 8, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}
    for name, value in {**variables, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=4) as devices,
        mock.patch("torch.cuda.set_device") as chosen,
        mock.patch("torch.distributed.init_process_group") as joined,
        mock.patch("torch.distributed.destroy_process_group"),
    ):
        with joined_processes() as processes:
            assert processes == Processes(6, 8, 4, torch.device("cuda", 2))
        assert (chosen.mock_calls, joined.mock_calls) == (
            [mock.call(torch.device("cuda", 2))],
            [mock.call("nccl")],
        )
        devices.return_value = 3
        with pytest.raises(InputError, match=r"\b4 processes.*\b3 CUDA"), joined_processes():
            pass


@pytest.mark.cuda
def test_training_over_nccl_reaches_the_losses_of_gloo(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    expected = trained_as_first_of_two(toy, tmp_path / "a.pt", CPU)
    found = trained_as_first_of_two(toy, tmp_path / "b.pt", device)
    np.testing.assert_allclose(
        [row["train_loss"] for row in found.history],
        [row["train_loss"] for row in expected.history],
        rtol=1e-3,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_of_the_loop_never_waits(
    toy: Toy, tmp_path: Path, device: torch.device, optimizer: str, averaging: float
) -> None:
    """From the second epoch on, when the step is recorded and the optimiser has its state."""
    step, taken = TrainingLoop._step, []

    def watched(self: TrainingLoop, *inputs: Any) -> None:
        if self.position.history:
            with refusing_to_wait(device):
                step(self, *inputs)
            taken.append(inputs)
        else:
            step(self, *inputs)

    chosen = settings(optimizer=optimizer, learning_rate=0.002, averaging=averaging)
    processes = Processes(rank=0, count=1, on_machine=1, device=device)
    with mock.patch.object(TrainingLoop, "_step", watched), rare_looks():
        train(toy, tmp_path / "state.pt", chosen=chosen, processes=processes)
    assert len(taken) == (EPOCHS - 1) * -(-len(toy.train) // chosen.batch_size)


@pytest.mark.cuda
def test_a_step_that_can_not_be_recorded_is_refused(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("nothing is recorded on a CPU")
    forward = MaxPool.forward

    def waiting(self: MaxPool, *inputs: Tensor) -> Any:
        output = forward(self, *inputs)
        assert output.image.sum().item() is not None
        return output

    processes = Processes(rank=0, count=1, on_machine=1, device=device)
    options: dict[str, Any] = {"chosen": settings(network=tiny("max-pool")), "processes": processes}
    with mock.patch.object(MaxPool, "forward", waiting):
        with pytest.raises(InputError, match=r"max_pool\.py.*`recordable = False`"):
            train(toy, tmp_path / "a.pt", **options)
        # After that error, and told that the step can't be recorded, it trains.
        with mock.patch.object(Gradients, "_can_record", return_value=False):
            assert train(toy, tmp_path / "b.pt", **options).history
