"""Every head computes on CUDA what it computes on the CPU: scores, attribution, loss, gradients."""

from __future__ import annotations

import pytest
import torch
from devices import refusing_to_wait
from tiny import (
    assert_same,
    head_settings,
    make_batch,
    make_head,
    make_label_set,
    make_truth,
    outputs_alike,
)
from torch import Tensor

from pipeline.heads.contract import Head, HeadOutput
from pipeline.learning.losses import compute_loss
from pipeline.settings import OwnLoss, TrainSettings, WeightedLoss, variant_changes, variant_names

pytestmark = pytest.mark.cuda

ALL = tuple(name for name in variant_names() if not name.endswith("-published"))
TOLERANCE = 1e-4  # of the largest number that is compared
LOSSES = ("weighted", "asymmetric", "focal", "softmax-squared")


def scored(head: Head, device: torch.device, truth: Tensor | None = None) -> HeadOutput:
    """What a head, moved to a device, says about a batch in float32."""
    batch = make_batch(4, dtype=torch.float32).to(device, torch.float32)
    labels = make_label_set(dtype=torch.float32).to(device)
    return head.to(device)(batch, labels, None if truth is None else truth.to(device))


def on_cpu(output: HeadOutput) -> HeadOutput:
    return HeadOutput(*(None if part is None else part.detach().cpu() for part in output))


def learned(head: Head, device: torch.device, settings: TrainSettings) -> dict[str, Tensor]:
    """The loss of a batch on a device, by the name `loss`, and its gradients."""
    truth = make_truth(4)
    output = scored(head.train(), device, truth)
    ratio = make_label_set(dtype=torch.float32).ratio.to(device)
    loss = compute_loss(output, truth.to(device), ratio, settings.loss)
    loss.backward()
    gradients = {name: one.grad.cpu() for name, one in head.named_parameters()}
    return {"loss": loss.detach().cpu(), **gradients}


@pytest.mark.parametrize("variant", ALL)
def test_scores_are_the_cpus(variant: str, device: torch.device) -> None:
    cpu = torch.device("cpu")
    expected = scored(make_head(variant, dtype=torch.float32), cpu)
    found = scored(make_head(variant, dtype=torch.float32), device)
    assert found.image.device.type == device.type
    outputs_alike(on_cpu(found), on_cpu(expected), TOLERANCE)
    assert torch.equal(found.winners().cpu(), expected.winners())


@pytest.mark.parametrize("variant", ALL)
def test_losses_and_gradients_are_the_cpus(variant: str, device: torch.device) -> None:
    settings = TrainSettings.model_validate(variant_changes(variant))
    expected, found = (
        learned(make_head(variant, dtype=torch.float32), one, settings)
        for one in (torch.device("cpu"), device)
    )
    assert found.keys() == expected.keys()
    # Gradients that cancel out are as wrong as the parts that do.
    least = 1e-2 * max(one.abs().max() for one in expected.values())
    for name, of_cpu in expected.items():
        difference = (found[name] - of_cpu).abs().max()
        assert difference <= TOLERANCE * max(of_cpu.abs().max(), least), name


# The loss of PLA aligns its targets on the CPU.
@pytest.mark.parametrize("variant", [one for one in ALL if one != "pla"])
def test_a_step_never_waits_for_the_device(variant: str, device: torch.device) -> None:
    head = make_head(variant, dtype=torch.float32).train().to(device)
    batch = make_batch(4, dtype=torch.float32).to(device, torch.float32)
    labels, truth = make_label_set(dtype=torch.float32).to(device), make_truth(4).to(device)
    settings = TrainSettings.model_validate(variant_changes(variant))

    def step() -> None:
        output = head(batch, labels, truth)
        compute_loss(output, truth, labels.ratio, settings.loss).backward()

    step()  # may prepare what the next steps share
    with refusing_to_wait(device):
        step()
        with torch.no_grad():
            head.eval()(batch, labels).winners()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_cpus(name: str, device: torch.device) -> None:
    settings = TrainSettings.model_validate({"loss": {"name": name}})
    assert not isinstance(settings.loss, OwnLoss)
    expected, found = (
        learned(make_head("full", dtype=torch.float32), one, settings)["loss"]
        for one in (torch.device("cpu"), device)
    )
    assert_same(found, expected, TOLERANCE)


# A head with a loss of its own decides step by step, and a step decided otherwise changes the rest.
@pytest.mark.parametrize("variant", [one for one in ALL if not head_settings(one).own_loss])
def test_scores_in_bfloat16_are_near_those_in_float32(variant: str, device: torch.device) -> None:
    expected = scored(make_head(variant, dtype=torch.float32), device)
    with torch.autocast(device.type, torch.bfloat16):
        found = scored(make_head(variant, dtype=torch.float32), device)
    assert_same(found.image.float().cpu(), expected.image.cpu(), 0.2)
    ratio = make_label_set(dtype=torch.float32).ratio.to(device)
    compute_loss(found, make_truth(4).to(device), ratio, WeightedLoss()).backward()
