"""Tensors in files, what a killed fit or training resumes from, and the device to compute on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import GmpipeError
from pipeline.files import replacing

_ANEW = "Delete it, and run the same command again, which then begins anew."


def save_tensors(path: Path, content: Any) -> None:
    """``torch.save``, whole or not at all; the same content gives the same bytes.

    Through memory: given a path, torch.save writes the path's (temporary) name into the file, and
    it hides a full disk behind a RuntimeError.
    """
    stream = io.BytesIO()
    torch.save(content, stream)
    with replacing(path) as temporary:
        temporary.write_bytes(stream.getbuffer())


def learning_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """What a learner has become, for `restore_learning`. Its tensors are the learner's own."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }


def restore_learning(
    state: dict[str, Any],
    origin: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Make a learner what it was when `learning_state` was asked.

    Raises:
        GmpipeError: ``state``, from the file ``origin``, is another learner's.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise foreign_state(origin, error) from error


def foreign_state(origin: Path, error: Exception) -> GmpipeError:
    """The error that says that the state in ``origin`` does not fit."""
    return GmpipeError(f"{origin} was left by another version of the code: {error!r}. {_ANEW}")


def random_state() -> list[torch.Tensor]:
    """Of torch's generators that this process draws from: the CPU's and its CUDA device's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def restore_random(states: list[torch.Tensor]) -> None:
    """Draw on as the process did whose `random_state` it was."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def load_state(path: Path) -> dict[str, Any]:
    """Read what a killed fit or training left with `save_tensors`.

    Raises:
        GmpipeError: the file can't be read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        raise GmpipeError(
            f"{path} is not what a killed run leaves to resume from: torch can't load it "
            f"({type(error).__name__}). {_ANEW}"
        ) from error
    if not isinstance(state, dict):
        raise GmpipeError(
            f"{path} is not what a killed run leaves to resume from: it holds a "
            f"{type(state).__name__}, expected a dict. {_ANEW}"
        )
    return state


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
