"""Training on CUDA: the CPU's losses, wherever the regions are kept, and a resume after a kill.

`toys` describes the toy problem.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fakes import without_cuda
from flows import Flow
from toys import LABELS, Killed, Toy, make_checkout
from trainings import SETTINGS, known, settings, tiny, train

from pipeline.learning import batches
from pipeline.learning.distributed import Processes
from pipeline.learning.loop import Diverged, Training
from pipeline.learning.prediction import Scorer
from pipeline.learning.steps import Gradients
from pipeline.settings import TrainSettings

pytestmark = pytest.mark.cuda

CPU = torch.device("cpu")
WITHOUT_DROPOUT = settings(network=tiny("full"))


def trained(
    toy: Toy, path: Path, device: torch.device, chosen: TrainSettings, save_every: float = 30.0
) -> Training:
    processes = Processes(rank=0, count=1, on_machine=1, device=device)
    return train(toy, path, chosen=chosen, processes=processes, save_every=save_every)


def numbers(training: Training, column: str) -> np.ndarray:
    """A column of the history."""
    return np.array([row[column] for row in training.history])


def assert_alike(one: Training, other: Training, tolerance: float) -> None:
    """Compare the histories and the final weights of two trainings."""
    assert one.epoch == other.epoch
    for column in ("train_loss", "gradient_norm", "learning_rate"):
        found, expected = numbers(one, column), numbers(other, column)
        np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=column)
    for name, weights in other.network.state_dict().items():
        found = one.network.state_dict()[name].cpu().double()
        torch.testing.assert_close(
            found, weights.cpu().double(), rtol=0, atol=tolerance * float(weights.abs().max() + 1)
        )


@pytest.mark.parametrize(
    "variant", ["full", "without-matching-edges", "max-pool", "ml-gcn-regions"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_reaches_the_cpus_losses(
    toy: Toy, tmp_path: Path, device: torch.device, variant: str, optimizer: str
) -> None:
    rate = {"sgd": 0.02, "adamw": 0.002}[optimizer]
    chosen = settings(network=tiny(variant), optimizer=optimizer, learning_rate=rate)
    expected = trained(toy, tmp_path / "a.pt", CPU, chosen)
    found = trained(toy, tmp_path / "b.pt", device, chosen)
    assert_alike(found, expected, 1e-3)


def test_a_training_with_an_average_and_a_validation_reaches_the_cpus(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    chosen = settings(network=tiny("full"), averaging=0.5, schedule="cosine", warm_up=0.2)
    expected = trained(toy, tmp_path / "a.pt", CPU, chosen)
    assert_alike(trained(toy, tmp_path / "b.pt", device, chosen), expected, 1e-3)


def test_a_training_in_bfloat16_reaches_nearly_the_same_loss(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    expected = trained(toy, tmp_path / "a.pt", CPU, WITHOUT_DROPOUT)
    half = WITHOUT_DROPOUT.model_copy(update={"precision": "bfloat16"})
    found = trained(toy, tmp_path / "b.pt", device, half)
    of_cpu = numbers(expected, "train_loss")
    np.testing.assert_allclose(numbers(found, "train_loss"), of_cpu, rtol=0.05)


def test_where_the_regions_are_kept_changes_nothing(
    toy: Toy, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, or gathered from the shards and moved batch by batch."""
    on_device = trained(toy, tmp_path / "a.pt", device, WITHOUT_DROPOUT)
    monkeypatch.setattr(batches, "_LARGEST_SHARE", 0.0)
    moved = trained(toy, tmp_path / "b.pt", device, WITHOUT_DROPOUT)
    assert_alike(moved, on_device, 1e-4)


def test_a_recorded_step_gives_the_numbers_of_its_kernels_one_by_one(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    """With dropout; the last batch of an epoch is smaller, and is never replayed."""
    record = Gradients._record
    with mock.patch.object(Gradients, "_record", autospec=True, side_effect=record) as recording:
        recorded = trained(toy, tmp_path / "a.pt", device, SETTINGS)
    assert recording.call_count == (device.type == "cuda")
    with mock.patch.object(Gradients, "_can_record", return_value=False):
        launched = trained(toy, tmp_path / "b.pt", device, SETTINGS)
    assert_alike(recorded, launched, 1e-5)


def test_a_killed_training_ends_as_an_undisturbed_one(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    """With dropout, so that the device's random numbers must go on as well."""
    undisturbed = trained(toy, tmp_path / "a.pt", device, SETTINGS)
    compute, steps = Gradients.compute, count(1)

    def killed_in_the_sixth(*inputs: Any) -> Any:
        if next(steps) == 6:
            raise Killed
        return compute(*inputs)

    with mock.patch.object(Gradients, "compute", killed_in_the_sixth), pytest.raises(Killed):
        trained(toy, tmp_path / "b.pt", device, SETTINGS, save_every=0)
    torch.manual_seed(99)
    assert (tmp_path / "b.pt").exists()
    # Sums on CUDA may be added in another order each time.
    assert_alike(trained(toy, tmp_path / "b.pt", device, SETTINGS), undisturbed, 1e-3)


def test_a_training_that_diverges_says_where(
    toy: Toy, tmp_path: Path, device: torch.device
) -> None:
    wild = settings(learning_rate=1e20, clip_norm=1e30)
    with pytest.raises(Diverged, match=r"epoch 1"):
        trained(toy, tmp_path / "a.pt", device, wild)


def test_predictions_are_the_cpus(toy: Toy, tmp_path: Path, device: torch.device) -> None:
    network = trained(toy, tmp_path / "a.pt", CPU, WITHOUT_DROPOUT).network
    options = {"name": "the run", "batch_size": 16}
    labels = known(toy.train)
    expected = Scorer(network, labels, LABELS, device=CPU, **options).predict(toy.train)
    found = Scorer(network, labels, LABELS, device=device, **options).predict(toy.train)
    scale = np.abs(expected.logits).max()
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4 * scale)
    assert (found.regions == expected.regions).mean() > 0.98


def test_an_evaluation_and_its_metrics_are_the_cpus(tmp_path: Path, device: torch.device) -> None:
    """`gmpipe evaluate`, which chooses its device itself, of one and the same checkpoint."""
    checkout = make_checkout(tmp_path / "cpu")
    with without_cuda():
        checkout.ok("train")
    other = Flow(Path(shutil.copytree(checkout.folder, tmp_path / "device")))
    other.ok("evaluate")
    with without_cuda():
        checkout.ok("evaluate")
    found, expected = (
        json.loads((flow / "runs/toy/full-s0/metrics.json").read_text())
        for flow in (other, checkout)
    )
    assert found["mAP"] == pytest.approx(expected["mAP"], abs=0.1)  # percent


def test_a_training_by_command_uses_the_device(tmp_path: Path, device: torch.device) -> None:
    """`gmpipe train`, which chooses its device itself, reaches the loss of the CPU."""
    histories = []
    for name, where in (("device", nullcontext()), ("cpu", without_cuda())):
        flow = make_checkout(tmp_path / name)
        with where:
            flow.ok("train")
        rows = (flow / "runs/toy/full-s0/history.csv").read_text().splitlines()[1:]
        histories.append([float(row.split(",")[2]) for row in rows])
    np.testing.assert_allclose(*histories, rtol=1e-3)
