"""The scorer: its device, its batches, and scores that are not finite.

`toys` describes the toy problem and its letters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import LABELS, N_TRAIN, VECTORS, D, M, Toy
from trainings import SETTINGS, known, settings, train, wild

from pipeline.heads.building import build_head
from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet
from pipeline.learning import prediction as prediction_module
from pipeline.learning.loop import Diverged
from pipeline.learning.prediction import NotFinite, Scorer, finite_output
from pipeline.learning.splits import split_validation
from pipeline.report.gallery import mean_label_nodes, region_scores

USES: dict[str, Callable[..., Any]] = {
    "predictions": Scorer.predict,
    "gallery": region_scores,
    "label nodes": mean_label_nodes,
}
"""What evaluation, validation and the page ask of a scorer, for a split."""


def scorer(toy: Toy, batch_size: int = 16) -> Scorer:
    """A scorer of an untrained network."""
    torch.manual_seed(0)
    network = build_head(HeadSizes(D, *VECTORS.vectors.shape, classes=9), SETTINGS.network)
    return Scorer(network, known(toy.train), LABELS, name="mine", batch_size=batch_size)


class ReachedError(Exception):
    """The network was called."""


@pytest.mark.parametrize("use", USES)
def test_everything_is_scored_on_the_best_device(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """`meta` stands for CUDA; without CUDA no memory can be pinned for it."""
    monkeypatch.setattr(prediction_module, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    ours = scorer(toy)

    def reached(network: Head, batch: Any, labels: LabelSet | torch.Tensor, *_: Any) -> None:
        of_labels = vars(labels).values() if isinstance(labels, LabelSet) else [labels]
        tensors = [*vars(batch).values(), *of_labels, *network.state_dict().values()]
        raise ReachedError({tensor.device.type for tensor in tensors if tensor is not None})

    for name in ("forward", "convolved"):  # the second gives the label nodes
        monkeypatch.setattr(type(ours.network), name, reached)
    with pytest.raises(ReachedError) as caught:
        USES[use](ours, toy.train)
    assert caught.value.args == ({"meta"},)


@pytest.mark.parametrize("batch_size", [1, 4, N_TRAIN, 100])
@pytest.mark.parametrize("use", USES)
def test_no_more_images_are_scored_at_once_than_the_batch_size(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, use: str, batch_size: int
) -> None:
    ours, sizes = scorer(toy, batch_size), list[int]()
    convolved = type(ours.network).convolved  # type: ignore[union-attr]

    def counted(network: Any, batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch.mask))
        return convolved(network, batch, *rest)

    monkeypatch.setattr(type(ours.network), "convolved", counted)
    USES[use](ours, toy.train)
    assert sum(sizes) == N_TRAIN
    assert max(sizes) == min(batch_size, N_TRAIN)


# Scores that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("image", [0, 15, 16, N_TRAIN - 1])
@pytest.mark.parametrize("of", ["image", "regions"])
@pytest.mark.parametrize("use", ["predictions", "gallery"])
def test_a_score_that_is_not_finite_names_run_image_and_label(
    toy: Toy, use: str, of: str, image: int, value: float
) -> None:
    """An image's own score, or that of one region, whichever wins; batches have 16 images."""
    ours, seen = scorer(toy), 0

    def broken(module: Any, inputs: Any, output: HeadOutput) -> HeadOutput:
        nonlocal seen
        if 0 <= image - seen < len(output.image):
            logits = getattr(output, of)[image - seen]
            (logits if of == "image" else logits[0])[1] = value
        seen += len(output.image)
        return output

    ours.network.register_forward_hook(broken)
    with pytest.raises(NotFinite, match=rf"mine\b.*'image-{image}'.*'{LABELS[1]}'.*finite"):
        USES[use](ours, toy.train)


@given(st.integers(0, 2), st.integers(0, M - 1), st.sampled_from([torch.nan, torch.inf]))
def test_padding_may_have_any_logit(image: int, region: int, value: float) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    logits = torch.zeros(3, M, 2)
    logits[image, region, 1] = value
    finite = finite_output(HeadOutput(torch.zeros(3, 2), logits), mask)
    assert finite.tolist() == [
        [True, not (n == image and bool(mask[image, region]))] for n in range(3)
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("use", USES)
def test_weights_that_are_not_finite_are_named(toy: Toy, use: str, value: float) -> None:
    ours, name = scorer(toy), "convolutions.1.label_node.second.bias"
    ours.network.state_dict()[name][0] = value
    with pytest.raises(NotFinite, match=rf"mine\b.*'image-0'.*'{LABELS[0]}'.*{name}"):
        USES[use](ours, toy.train)


def test_a_validation_that_is_not_finite_keeps_the_last_good_weights(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores of the third epoch's validation are broken."""
    kept, held_out = split_validation(toy.train, 0.4, seed=0)
    whole = train(
        toy, tmp_path / "a.pt", split=kept, validation=held_out, chosen=settings(epochs=2)
    )
    validations, finite = 0, finite_output

    def broken(output: HeadOutput, mask: torch.Tensor) -> torch.Tensor:
        nonlocal validations
        validations += 1
        if validations > 2 * -(-len(held_out) // 16):
            output.image[0, 2] = torch.nan
        return finite(output, mask)

    monkeypatch.setattr(prediction_module, "finite_output", broken)
    with pytest.raises(
        Diverged,
        match=rf"epoch 3\b.*'{held_out.image_ids[0]}'.*'{LABELS[2]}'.*train\.toy\.learning_rate",
    ) as caught:
        train(toy, tmp_path / "b.pt", split=kept, validation=held_out, name="mine")
    assert caught.value.history == whole.history
    assert caught.value.weights is not None
    for key, value in whole.network.state_dict().items():
        assert torch.equal(caught.value.weights[key], value)


@pytest.mark.parametrize("averaging", [None, 0.5])
def test_a_last_step_that_breaks_the_weights_is_noticed(
    toy: Toy, tmp_path: Path, averaging: float | None
) -> None:
    """One step an epoch: no later step meets what the only one made of the weights."""
    changes: dict[str, Any] = {"averaging": averaging} if averaging else {}
    chosen = wild(learning_rate=1e38, batch_size=N_TRAIN, epochs=1, **changes)
    with pytest.raises(Diverged, match=r"epoch 1\b.*finite.*train\.toy\.learning_rate") as caught:
        train(toy, tmp_path / "a.pt", chosen=chosen)
    assert caught.value.weights is None
