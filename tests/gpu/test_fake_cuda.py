"""On an accelerator no step waits for the host, mixes devices, or grows with the batch.

Computed on fake tensors, without a GPU (`fakes`).
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from builders import S, tiny_model
from fakes import FakeCuda, Operations, counted, gradients
from tiny import (
    C,
    attribution_of,
    make_batch,
    make_head,
    make_label_set,
    make_truth,
)
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from benchmarks.networks.sides import Size, make_inputs, our_side
from pipeline.heads.contract import HeadOutput
from pipeline.heads.matching.network import GmMlic
from pipeline.inference.explain import _without_all, _without_each
from pipeline.learning.losses import compute_loss
from pipeline.learning.prediction import finite_output, shown_attribution
from pipeline.regions.detection import convolve, prepare_for_extraction
from pipeline.settings import TrainSettings, WeightedLoss, variant_changes, variant_names
from pipeline.settings.heads import HEADS

ALL = tuple(name for name in variant_names() if not name.endswith("-published"))
QUICK = {entry.variants[0] for entry in HEADS.values()} | {"without-matching-edges"}
VARIANTS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL]
MOST_OPERATIONS = 350
"""Of a forward pass with the loss, at COCO's size."""


@pytest.fixture(scope="module")
def device() -> FakeCuda:
    """One for all tests, since it remembers the shapes that operations return."""
    return FakeCuda(FakeTensorMode())


def test_what_fake_tensors_show(device: FakeCuda) -> None:
    matrix = device.tensor(torch.ones(3, 3))
    with device.mode:
        assert (matrix @ matrix).device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            matrix.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            matrix[matrix > 0]
        with pytest.raises(RuntimeError, match=r"cuda:0 and cpu"):
            matrix + torch.ones(3, 3)


@pytest.mark.parametrize("variant", ["full", "stateless-matching-edges", "ssgrl", "rma-style"])
def test_gradients_are_those_of_torch(variant: str) -> None:
    """In numbers, on the CPU: what `gradients` counts is what torch computes."""
    head = make_head(variant).train()
    batch, labels, truth = make_batch(4), make_label_set(), make_truth(4)
    settings = TrainSettings.model_validate(variant_changes(variant))

    def loss() -> torch.Tensor:
        return compute_loss(head(batch, labels, truth), truth, labels.ratio, settings.loss)

    found = gradients(loss())
    loss().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[parameter], parameter.grad, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scoring_stays_on_the_device(variant: str, device: FakeCuda) -> None:
    head = device.network(make_head(variant, dtype=torch.float32))
    batch = device.batch(make_batch(4, dtype=torch.float32))
    labels = device.labels(make_label_set(dtype=torch.float32))
    with device.mode, torch.inference_mode():
        head(batch, labels)  # may prepare what the next batches share
        with Operations() as operations:
            output = head(batch, labels)
        assert operations.waits == []
        results = [output.image, output.winners(), finite_output(output, batch.mask)]
        shown = shown_attribution(head, output)
    for result in results:
        assert (result.device.type, result.shape) == ("cuda", (4, C))
    assert (shown is None) == (attribution_of(variant) is None)


# The loss of PLA aligns its targets on the CPU.
@pytest.mark.parametrize("variant", [one for one in VARIANTS if one.values[0] != "pla"])
def test_a_training_step_stays_on_the_device(variant: str, device: FakeCuda) -> None:
    head = device.network(make_head(variant, dtype=torch.float32).train())
    batch = device.batch(make_batch(4, dtype=torch.float32))
    labels = device.labels(make_label_set(dtype=torch.float32))
    truth = device.tensor(make_truth(4))
    settings = TrainSettings.model_validate(variant_changes(variant))

    def step() -> torch.Tensor:
        return compute_loss(head(batch, labels, truth), truth, labels.ratio, settings.loss)

    with device.mode:
        step()  # may prepare what the next steps share
    forward, backward = counted(device, head, step)
    assert forward.waits + backward.waits == []


@pytest.mark.parametrize("name", ["weighted", "asymmetric", "focal", "softmax-squared"])
def test_a_loss_stays_on_the_device(name: str, device: FakeCuda) -> None:
    loss = TrainSettings.model_validate({"loss": {"name": name}}).loss
    logits = device.tensor(torch.zeros(4, C))
    truth, ratio = device.tensor(make_truth(4)), device.tensor(torch.full((C,), 0.2))
    with device.mode, Operations() as operations:
        assert compute_loss(HeadOutput(logits), truth, ratio, loss).device.type == "cuda"
    assert operations.waits == []


def test_an_explanation_stays_on_the_device(device: FakeCuda) -> None:
    head = device.network(make_head("full", dtype=torch.float32))
    assert isinstance(head, GmMlic)
    batch = device.batch(make_batch(1, dtype=torch.float32))
    labels = device.labels(make_label_set(dtype=torch.float32))
    with device.mode, torch.inference_mode():
        for part in ("label_graph", "instance_graph"):
            assert head(batch, labels, **{part: False}).image.device.type == "cuda"
        regions = batch.mask.shape[1]
        assert head(_without_each(batch, regions), labels).image.shape == (regions, C)
        assert head(_without_all(batch), labels).image.shape == (1, C)


def test_convolutions_of_a_detector_stay_on_the_device(device: FakeCuda) -> None:
    """The part of a detection that depends on no data, so that it is only queued."""
    model = device.network(tiny_model())
    views = device.tensor(torch.zeros(4, 3, S, S))
    with device.mode:
        # Fake tensors can't be copied in that way.
        with mock.patch("copy.deepcopy", lambda model: model):
            prepared = prepare_for_extraction(model)
        with Operations() as operations:
            convolved = convolve(prepared, views)
    assert operations.waits == []
    made = [*convolved.maps.values(), *convolved.logits, *convolved.codes]
    assert {(one.device.type, one.dtype, len(one)) for one in made} == {("cuda", torch.float32, 4)}


def operations_at_cocos_size(device: FakeCuda, images: int) -> tuple[int, int, str]:
    """Count the operations of the forward pass with the loss, and of the backward pass.

    Returns:
        both, and a description.
    """
    size = Size(images, instances=35, labels=80)
    real = make_inputs(size)
    sizing = Size(1, instances=35, labels=80)
    head = device.network(our_side(sizing, make_inputs(sizing)).network.train())
    batch, labels = device.batch(real.batch), device.labels(real.labels)
    truth = device.tensor(real.truth)

    def step() -> torch.Tensor:
        return compute_loss(head(batch, labels, truth), truth, labels.ratio, WeightedLoss())

    forward, backward = counted(device, head, step)
    shown = (forward.by_name + backward.by_name).most_common(12)
    about = f"{images} images: {forward.total} forward and {backward.total} backward, {shown}"
    return forward.total, backward.total, about


def test_operations_of_a_step_do_not_grow_with_the_batch(device: FakeCuda) -> None:
    one, back_of_one, about_one = operations_at_cocos_size(device, 1)
    many, back_of_many, about_many = operations_at_cocos_size(device, 32)
    about = f"{about_one}; {about_many}"
    assert many <= 1.1 * one, about
    assert many <= MOST_OPERATIONS, about
    assert back_of_many <= 1.1 * back_of_one, about
