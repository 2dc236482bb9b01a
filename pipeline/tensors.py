"""Files of tensors, the states from which a killed fit or training resumes, and the device.

A state is a dict of tensors and plain values that `save_tensors` wrote.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DamagedError
from pipeline.files import read_bytes, replacing

_DELETE = "Delete it and run the same command again, which then starts from the beginning."


def save_tensors(path: Path, content: Any) -> None:
    """Write what ``torch.save`` does, whole or not at all; the same content gives the same bytes.

    It goes through memory. Given a path, torch.save writes the path's (temporary) name into the
    file, and hides a full disk behind a RuntimeError.
    """
    stream = io.BytesIO()
    torch.save(content, stream)
    with replacing(path) as temporary:
        temporary.write_bytes(stream.getbuffer())


def load_tensors(path: Path) -> tuple[Any, str]:
    """Read what `save_tensors` wrote, without running code from it.

    Torch reads a file whose bits have changed without a word. The file is a zip, so the checksums
    of its members are compared first.

    Returns:
        the content, on the CPU, and the hex sha256 of the file.

    Raises:
        DamagedError: the file is no such file, or was changed.
        InputError, OSError: as `read_bytes`.
    """
    stored = read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as members:
            if (changed := members.testzip()) is not None:
                raise ValueError(f"its member {changed} has another checksum")
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        reason = str(error).split("\n", 1)[0][:200]
        raise DamagedError(
            f"{path} can't be loaded by torch ({type(error).__name__}: {reason})."
        ) from error
    return content, hashlib.sha256(stored).hexdigest()


def learning_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """Collect the state of a learner, for `restore_learning`. Its tensors are not copied."""
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
    """Bring a learner to the state that `learning_state` collected.

    Args:
        state: read from the file ``origin``.
        origin: for the error.
        model, optimizer, schedule: the learner, changed in place.

    Raises:
        DamagedError: the state is that of a different learner.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise foreign_state(origin, error) from error


def foreign_state(origin: Path, error: Exception) -> DamagedError:
    """Make the error for a state in ``origin`` that does not fit."""
    return DamagedError(f"{origin} was left by another version of the code: {error!r}.", _DELETE)


def random_state() -> list[torch.Tensor]:
    """Read the state of the generators that this process uses: the CPU's and its CUDA device's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def restore_random(states: list[torch.Tensor]) -> None:
    """Continue the random numbers of the process whose `random_state` this is."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def load_state(path: Path) -> dict[str, Any]:
    """Read the state that a killed fit or training left.

    Raises:
        DamagedError: the file was changed, or holds something else.
    """
    try:
        state, _ = load_tensors(path)
    except DamagedError as error:
        error.remedy = _DELETE
        raise
    if not isinstance(state, dict):
        raise DamagedError(
            f"{path} is not a state to resume from: expected a dict, not a {type(state).__name__}.",
            _DELETE,
        )
    return state


def best_device() -> torch.device:
    """Choose CUDA if there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold a number that is nan or infinite."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
