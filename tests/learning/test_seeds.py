"""Training and fitting ask for deterministic kernels, and leave the process as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, TINY, S, draw_scenes
from toys import Toy
from trainings import settings, train, wild

from pipeline.learning.loop import Diverged
from pipeline.regions.fitting import fit_detector
from pipeline.settings import FitSettings

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def chosen() -> dict[str, Any]:
    """What a process asks of torch's kernels."""
    return {
        "mode": torch.get_deterministic_debug_mode(),
        "benchmark": torch.backends.cudnn.benchmark,
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "cublas": os.environ.get(CUBLAS),
    }


BEFORE = {
    "torch's defaults": {"mode": 0, "benchmark": False, "filled": True, "cublas": None},
    "others": {"mode": 2, "benchmark": True, "filled": False, "cublas": ":16:8"},
}
DURING = {
    "torch's defaults": {"mode": 1, "benchmark": False, "filled": False, "cublas": ":4096:8"},
    # A stricter mode and another workspace, which is deterministic too, are kept.
    "others": {"mode": 2, "benchmark": False, "filled": False, "cublas": ":16:8"},
}


@pytest.fixture(params=BEFORE)
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Choose something before the test, and go back to torch's defaults after it."""
    values = BEFORE[request.param]
    monkeypatch.delenv(CUBLAS, raising=False)
    if values["cublas"]:
        monkeypatch.setenv(CUBLAS, values["cublas"])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", values["benchmark"])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", values["filled"])
    torch.set_deterministic_debug_mode(values["mode"])
    yield request.param
    torch.set_deterministic_debug_mode(0)


def check(before: str, work: Callable[[Callable[..., None]], None]) -> None:
    """Check the choices in ``work``, which calls a function, and after it."""
    seen = []
    torch.manual_seed(123)
    state = torch.get_rng_state()
    work(lambda *_: seen.append(chosen()))
    assert seen
    assert all(values == DURING[before] for values in seen)
    assert chosen() == BEFORE[before]
    assert torch.equal(torch.get_rng_state(), state)


def test_training(toy: Toy, tmp_path: Path, before: str) -> None:
    check(
        before,
        lambda call: train(toy, tmp_path / "a.pt", on_epoch=call, chosen=settings(epochs=2)),
    )


def test_a_training_that_fails(
    toy: Toy, tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(call: Callable[..., None]) -> None:
        diverged = "pipeline.learning.loop.TrainingLoop.diverged"
        error = Diverged("", "", None, [])
        monkeypatch.setattr(diverged, lambda *_: call() or error)
        with pytest.raises(Diverged):
            train(toy, tmp_path / "a.pt", chosen=wild())

    check(before, work)


def test_fitting(tmp_path: Path, before: str) -> None:
    scenes = draw_scenes(tmp_path)
    fit = FitSettings(size=S, steps=2, batch_size=1, sampled_proposals=16, seed=3)
    check(
        before,
        lambda call: fit_detector(
            scenes.annotated, CLASSES, TINY, fit, state_file=tmp_path / "a.pt", on_step=call
        ),
    )


def test_a_fit_on_a_gpu_asks_for_no_deterministic_kernels(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here, so it ends where the model would go to one."""
    seen = []

    def moved(model: torch.nn.Module, device: torch.device) -> None:
        seen.append(chosen())
        raise Moved

    monkeypatch.setattr("pipeline.regions.fitting.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    fit = FitSettings(size=S, steps=2, batch_size=1, sampled_proposals=16)
    with pytest.raises(Moved):
        fit_detector([], CLASSES, TINY, fit, state_file=tmp_path / "a.pt")
    assert seen == [{**BEFORE[before], "filled": False}]
    assert chosen() == BEFORE[before]


class Moved(Exception):
    """Raised where a model would be moved to a GPU."""
