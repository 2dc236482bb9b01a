"""The asymmetric, the focal and HCP's squared loss, against plain loops over their equations.

The weighted loss: `test_losses`. Letters: B images, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Toy
from trainings import settings, train

from pipeline.heads.contract import HeadOutput
from pipeline.heads.layers import softmax_squared_loss
from pipeline.heads.sequences.symbols import sequence_loss
from pipeline.learning.losses import (
    asymmetric_loss,
    compute_loss,
    focal_loss,
    matching_loss,
)
from pipeline.settings import (
    AsymmetricLoss,
    FocalLoss,
    Loss,
    MaxPoolSettings,
    OwnLoss,
    SoftmaxSquaredLoss,
    TrainSettings,
    WeightedLoss,
)

few = hypothesis_settings(max_examples=40)
ASYMMETRIC = AsymmetricLoss(name="asymmetric")
FOCAL = FocalLoss(name="focal")
SQUARED = SoftmaxSquaredLoss(name="softmax-squared")
LOSSES: list[Loss] = [
    WeightedLoss(beta=0.4),
    ASYMMETRIC,
    AsymmetricLoss(name="asymmetric", negative_gamma=0.5, positive_gamma=100, clip=1e-30),
    AsymmetricLoss(name="asymmetric", negative_gamma=100, positive_gamma=0.5, clip=0),
    FOCAL,
    FocalLoss(name="focal", gamma=0.5, alpha=0.25),
    FocalLoss(name="focal", gamma=100),
    SQUARED,
]
GAMMAS = (0.0, 0.5, 1.0, 2.0, 4.0)


@dataclass
class Case:
    """Logits (B, C), and truth (B, C) with -1 for ignored labels."""

    logits: list[list[float]]
    truth: list[list[int]]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        logits = torch.tensor(self.logits, dtype=torch.float64, requires_grad=True)
        return logits, torch.tensor(self.truth)

    def check(
        self,
        of_label: Callable[[float, int], tuple[float, float]],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Compare a loss with one that gives the loss and the gradient of a logit and its y."""
        self.compare(
            [
                [of_label(x, y) if y >= 0 else (0.0, 0.0) for x, y in zip(*row, strict=True)]
                for row in zip(self.logits, self.truth, strict=True)
            ],
            loss,
        )

    def compare(
        self,
        expected: Iterable[list[tuple[float, float]]],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Compare a loss with the loss and the gradient of each logit."""
        logits, truth = self.tensors
        found = loss(logits, truth)
        (gradient,) = torch.autograd.grad(found, [logits])
        rows, images = list(expected), len(self.logits)
        total = sum(value for row in rows for value, _ in row) / images
        assert found.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
        for row, of_image in zip(rows, gradient.tolist(), strict=True):
            assert of_image == pytest.approx([slope / images for _, slope in row], abs=1e-10)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    images, labels = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def table(value: st.SearchStrategy[Any]) -> Any:
        row = st.lists(value, min_size=labels, max_size=labels)
        return draw(st.lists(row, min_size=images, max_size=images))

    return Case(table(st.floats(-20, 20)), table(st.sampled_from([-1, 0, 1])))


# Against the equations ---------------------------------------------------------------------------


@few
@given(cases(), st.sampled_from(GAMMAS), st.sampled_from(GAMMAS), st.sampled_from([0, 0.05, 0.3]))
def test_the_asymmetric_loss_is_that_of_the_paper(
    case: Case, negative: float, positive: float, clip: float
) -> None:
    """Its weights are constants of the gradient."""

    def of_label(x: float, y: int) -> tuple[float, float]:
        p, rest = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
        if y == 1:
            return -(rest**positive) * math.log(p), -(rest**positive) * rest
        shifted = max(p - clip, 0.0)
        weight = shifted**negative
        if not shifted:
            return 0.0, 0.0
        left = rest + clip  # 1 - (p - clip)
        return -weight * math.log(left), weight * p * rest / left

    chosen = AsymmetricLoss(
        name="asymmetric", negative_gamma=negative, positive_gamma=positive, clip=clip
    )
    case.check(of_label, lambda logits, truth: asymmetric_loss(logits, truth, chosen))


@few
@given(cases(), st.sampled_from(GAMMAS), st.sampled_from([None, 0.25, 0.9]))
def test_the_focal_loss_is_that_of_the_paper(case: Case, gamma: float, alpha: float | None) -> None:
    def of_label(x: float, y: int) -> tuple[float, float]:
        sign = 1 if y else -1
        right, wrong = 1 / (1 + math.exp(-sign * x)), 1 / (1 + math.exp(sign * x))
        weight = 1.0 if alpha is None else alpha if y else 1 - alpha
        slope = wrong**gamma * (gamma * right * math.log(right) - wrong)  # the paper's appendix
        return -weight * wrong**gamma * math.log(right), sign * weight * slope

    chosen = FocalLoss(name="focal", gamma=gamma, alpha=alpha)
    case.check(of_label, lambda logits, truth: focal_loss(logits, truth, chosen))


@few
@given(cases())
def test_the_squared_loss_compares_softmax_and_normalised_labels(case: Case) -> None:
    def of_image(row: list[float], labels: list[int]) -> list[tuple[float, float]]:
        if 1 not in labels:
            return [(0.0, 0.0)] * len(row)
        weights = [math.exp(x) if y >= 0 else 0.0 for x, y in zip(row, labels, strict=True)]
        p = [weight / sum(weights) for weight in weights]
        error = [
            share - (y == 1) / labels.count(1) if y >= 0 else 0.0
            for share, y in zip(p, labels, strict=True)
        ]
        mean = sum(one * share for one, share in zip(error, p, strict=True))
        return [(one**2, 2 * share * (one - mean)) for one, share in zip(error, p, strict=True)]

    case.compare(map(of_image, case.logits, case.truth), softmax_squared_loss)


@few
@given(cases())
def test_without_focusing_and_shift_both_are_the_cross_entropy(case: Case) -> None:
    logits, truth = case.tensors
    entropy = matching_loss(logits, truth, torch.zeros(logits.shape[1]), 0.0).item()
    plain = AsymmetricLoss(name="asymmetric", negative_gamma=0, positive_gamma=0, clip=0)
    assert asymmetric_loss(logits, truth, plain).item() == pytest.approx(entropy)
    assert focal_loss(logits, truth, FocalLoss(name="focal", gamma=0)).item() == pytest.approx(
        entropy
    )


def test_the_defaults_are_those_of_the_authors() -> None:
    assert (ASYMMETRIC.negative_gamma, ASYMMETRIC.positive_gamma, ASYMMETRIC.clip) == (4, 1, 0.05)
    assert (FOCAL.gamma, FOCAL.alpha) == (2, None)


# Of every loss -----------------------------------------------------------------------------------


def loss_of(logits: Tensor, truth: Tensor, loss: Loss) -> Tensor:
    ratio = torch.linspace(0.1, 0.9, truth.shape[1])
    return compute_loss(HeadOutput(logits), truth, ratio, loss)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@few
@given(case=cases(), other=st.floats(-200, 200))
def test_ignored_labels_carry_no_loss(loss: Loss, case: Case, other: float) -> None:
    logits, truth = case.tensors
    found = loss_of(logits, truth, loss)
    (gradient,) = torch.autograd.grad(found, [logits])
    assert not gradient[truth < 0].any()
    assert loss_of(logits.masked_fill(truth < 0, other), truth, loss) == found
    ratio = torch.linspace(0.1, 0.9, truth.shape[1])
    alone = 0.0  # the loss of each image without its ignored labels
    for row, marks in zip(logits, truth, strict=True):
        kept = marks >= 0
        of_image = HeadOutput(row[None, kept])
        alone += compute_loss(of_image, marks[None, kept], ratio[kept], loss).item()
    assert found.item() == pytest.approx(alone / len(logits), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_extreme_logits_have_a_finite_loss_and_gradient(loss: Loss) -> None:
    values = [200.0, -200.0, 0.0]
    logits = torch.tensor([[x, other] for x in values for other in values] * 9)
    marks = [[y, other] for y in (1, 0, -1) for other in (1, 0, -1)]
    truth = torch.tensor(marks).repeat_interleave(9, dim=0)
    logits.requires_grad_()
    found = loss_of(logits, truth, loss)
    (gradient,) = torch.autograd.grad(found, [logits])
    assert found.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_loss_of_half_precision_is_computed_in_float32(loss: Loss) -> None:
    logits = torch.tensor([[3.1, -2.7, 0.4], [0.2, 1.9, -4.3]], dtype=torch.bfloat16)
    truth = torch.tensor([[1, 0, 0], [0, 1, -1]])
    found = loss_of(logits, truth, loss)
    assert found.dtype == torch.float32
    assert found == loss_of(logits.float(), truth, loss)


def test_images_without_a_positive_label_count_in_the_mean_of_the_squared_loss() -> None:
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.0]], requires_grad=True)
    both = softmax_squared_loss(logits, torch.tensor([[1, 0], [0, -1]]))
    alone = softmax_squared_loss(logits[:1], torch.tensor([[1, 0]]))
    assert both.item() == pytest.approx(alone.item() / 2)
    none = softmax_squared_loss(logits, torch.tensor([[0, 0], [-1, -1]]))
    assert none == 0
    (gradient,) = torch.autograd.grad(none, [logits])
    assert not gradient.any()


def test_losses_of_heads_are_computed_in_float32_too() -> None:
    logits = torch.tensor([[3.1, -2.7, 0.4], [0.2, 1.9, -4.3]], dtype=torch.bfloat16)
    truth = torch.tensor([[1, 0], [0, 1]])
    targets = torch.tensor([[0, 2], [1, -1]])
    steps = torch.stack([logits, -logits], dim=1)
    for found, expected in (
        (
            softmax_squared_loss(logits[:, :2], truth),
            softmax_squared_loss(logits[:, :2].float(), truth),
        ),
        (sequence_loss(steps, targets, truth), sequence_loss(steps.float(), targets, truth)),
    ):
        assert found.dtype == torch.float32
        assert found == expected


def test_a_heads_own_loss_is_taken_as_it_is() -> None:
    own = torch.tensor(2.5, dtype=torch.bfloat16)
    output = HeadOutput(torch.zeros(2, 3), loss=own)
    found = compute_loss(output, torch.zeros(2, 3), torch.zeros(3), OwnLoss(name="own"))
    assert (found.item(), found.dtype) == (2.5, torch.float32)


@pytest.mark.parametrize("loss", [*LOSSES[:2], FOCAL, SQUARED], ids=lambda loss: loss.name)
def test_every_loss_trains(toy: Toy, tmp_path: Path, loss: Loss) -> None:
    """A training minimises the loss that its settings name."""
    network = MaxPoolSettings(hidden_size=8)
    chosen = settings(network=network, loss=loss, epochs=6, optimizer="adamw", step_epochs=6)
    trained = train(toy, tmp_path / "state.pt", chosen=chosen)
    losses = [row["train_loss"] for row in trained.history]
    assert losses[-1] < 0.8 * losses[0]
    assert nn.utils.parameters_to_vector(trained.network.parameters()).isfinite().all()


@pytest.mark.parametrize("loss", ["weighted", "asymmetric", "focal", "softmax-squared"])
def test_scores_of_the_squared_loss_only_rank(loss: str) -> None:
    chosen = TrainSettings.model_validate({"loss": {"name": loss}})
    assert chosen.ranks
    assert chosen.decides == (loss != "softmax-squared")


@pytest.mark.parametrize("can", [True, False])
def test_what_scores_mean_is_up_to_the_head_as_well(can: bool) -> None:
    class Other(MaxPoolSettings):
        decides = can
        ranks = not can

    chosen = TrainSettings().model_copy(update={"network": Other()})
    assert (chosen.decides, chosen.ranks) == (can, not can)
