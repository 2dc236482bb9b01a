"""A training that fails says where, and leaves no thread behind.

`toys` describes the toy problem.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Toy, make_toy
from trainings import settings, tiny, train, wild

from pipeline.errors import GmpipeError
from pipeline.heads.building import build_head
from pipeline.heads.contract import Head
from pipeline.learning import batches as batches_module
from pipeline.learning import loop
from pipeline.learning.loop import Diverged
from pipeline.learning.losses import compute_loss


def batch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_the_thread_ends_with_a_loop_that_fails(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "available_memory", lambda: 0)
    with pytest.raises(Diverged) as caught:
        train(toy, tmp_path / "a.pt", chosen=wild())
    # The error keeps the frames of the loop alive.
    assert caught.tb is not None
    assert batch_threads() == []


def test_a_damaged_row_stops_the_training_with_its_name(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "available_memory", lambda: 0)
    copy = make_toy(tmp_path / "toy")
    path = tmp_path / "toy/regions-00001.h5"  # view 1
    content = bytearray(path.read_bytes())
    feature = copy.cache.gather(copy.cache.lookup(["image-5"], 1)).features[0, 0].tobytes()
    content[content.index(feature)] ^= 1
    path.write_bytes(content)
    damaged = replace(copy, cache=type(copy.cache).open(tmp_path / "toy"))
    with pytest.raises(GmpipeError, match=r"regions-00001\.h5.*row 5 .*'image-5', view 1"):
        train(damaged, tmp_path / "a.pt")
    assert batch_threads() == []


def test_a_training_that_diverges_says_where(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(
        Diverged,
        match=r"\bmine\b.* step 2 .*epoch 1.*[\w.]+.* \((nan|inf)\).*"
        r"train\.toy\.learning_rate.* train\.toy\.clip_norm",
    ) as caught:
        train(toy, tmp_path / "a.pt", chosen=wild(), name="mine")
    assert caught.value.weights is None
    assert caught.value.history == []


def test_a_first_step_that_diverges_is_no_matter_of_the_learning_rate(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*inputs: Any) -> torch.Tensor:
        return compute_loss(*inputs) * torch.nan

    monkeypatch.setattr("pipeline.learning.steps.compute_loss", loss)
    with pytest.raises(Diverged, match=r"step 1 .*nan") as caught:
        train(toy, tmp_path / "a.pt", chosen=settings(network=tiny("max-pool")))
    assert "pipeline/heads/pooling/max_pool.py" in caught.value.remedy
    assert "train.toy" not in caught.value.remedy


def test_a_step_that_diverges_between_two_looks_is_named(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(1, 100))

    def broken(*inputs: Any) -> torch.Tensor:
        return compute_loss(*inputs) * (float("nan") if next(steps) == 11 else 1.0)

    monkeypatch.setattr("pipeline.learning.steps.compute_loss", broken)
    monkeypatch.setitem(loop._LOOK_EVERY, "cpu", 4)
    with pytest.raises(Diverged, match=r"step 11 \(epoch 2\)") as caught:
        train(toy, tmp_path / "a.pt", chosen=settings(batch_size=5))  # 9 steps an epoch
    assert [row["epoch"] for row in caught.value.history] == [1]
    # The gradients of a step before the last one are gone.
    assert "largest gradient" not in str(caught.value)


def test_the_parameter_with_the_largest_gradient_is_named(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient is made infinite in step 5, the second of the second epoch."""
    steps = 0

    def loss(*inputs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return compute_loss(*inputs)

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([1]), torch.inf) if steps == 5 else gradient

    def hooked(*arguments: Any) -> Head:
        network = build_head(*arguments)
        dict(network.named_parameters())["first.bias"].register_hook(hook)
        return network

    monkeypatch.setattr("pipeline.learning.steps.compute_loss", loss)
    monkeypatch.setattr("pipeline.learning.training.build_head", hooked)
    maxed = settings(network=tiny("max-pool"))
    whole = train(toy, tmp_path / "whole.pt", chosen=maxed.model_copy(update={"epochs": 1}))
    steps = 0
    with pytest.raises(
        Diverged,
        match=r"step 5 .*epoch 2.*\d\.\d+.* gradient norm inf.*\bfirst\.bias\b.*inf",
    ) as caught:
        train(toy, tmp_path / "a.pt", chosen=maxed)
    assert caught.value.history == whole.history
    assert caught.value.weights is not None
    for key, value in whole.network.state_dict().items():
        assert torch.equal(caught.value.weights[key], value)
