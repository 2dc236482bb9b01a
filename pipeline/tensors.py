"""Files of tensors, the states from which a killed fit or training resumes, and the device.

A state is a dict of tensors and plain values that `save_tensors` wrote.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.errors import DamagedError, advising, briefly
from pipeline.files import read_bytes, replacing

_ZIP = b"PK\x03\x04"
"""What torch recognises a zip by."""

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
    of its members are compared first, see `tensors_in`.

    Returns:
        the content, on the CPU, and the hex sha256 of the file.

    Raises:
        DamagedError: the file is no such file, or was changed.
        InputError, OSError: as `read_bytes`.
    """
    stored = read_bytes(path)
    try:
        if not stored.startswith(_ZIP):
            raise ValueError("it is no zip")
        content = tensors_in(stored)
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        raise DamagedError(f"{path} can't be loaded by torch ({briefly(error)}).") from error
    return content, hashlib.sha256(stored).hexdigest()


def tensors_in(stored: bytes) -> Any:
    """Load a file of ``torch.save`` on the CPU, without running code from it.

    The files of torch before 1.6 are no zips, and have no checksums.

    Raises:
        Exception: it is no such file, or is a zip that was changed.
    """
    stream = io.BytesIO(stored)
    if stored.startswith(_ZIP):
        stream = _intact_zip(stream)
    try:
        with warnings.catch_warnings():
            # Such files are refused, and the error says what they are.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            warnings.filterwarnings("ignore", ".*looks like a TorchScript archive", UserWarning)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's text advises to load the file in the way that runs its code.
        reason = " ".join(str(error).partition("WeightsUnpickler error:")[2].split())
        reason = reason.partition(" Check the documentation")[0].partition(". Please use")[0]
        raise pickle.UnpicklingError(reason or "it holds no tensors") from None


def _intact_zip(stored: io.BytesIO) -> io.BytesIO:
    """Copy the members of a zip, whose checksums are compared, to a new one.

    Torch would trust the sizes in a zip's list of members too, which no checksum covers, and would
    return memory that nobody has written.

    Raises:
        Exception: a member was changed, or occurs twice.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(stored) as members, zipfile.ZipFile(copy, "w") as intact:
        for member in members.infolist():
            if member.filename in intact.NameToInfo:
                raise ValueError(f"its member {member.filename} occurs twice")
            intact.writestr(member.filename, members.read(member))
    copy.seek(0)
    return copy


class Schedule(Protocol):
    """A schedule of the learning rate: one of torch's, or one like them."""

    def step(self) -> None:
        """Go on to the next rate."""

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, and what it was made with."""


def learning_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule
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
    schedule: Schedule,
    *,
    steps: int,
) -> None:
    """Bring a new learner to the state that `learning_state` collected.

    Args:
        state: read from the file ``origin``.
        origin: for the error.
        model, optimizer, schedule: the learner, changed in place.
        steps: that the optimizer and the schedule must have made.

    Raises:
        DamagedError: the state is that of a different learner, or of another time.
    """
    try:
        check_alike(state["model"], model.state_dict(), "model")
        with warnings.catch_warnings():
            # The optimizer makes no steps here.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(steps):
                schedule.step()
        check_equal(state["schedule"], schedule.state_dict(), "schedule")
        _check_optimizer(state["optimizer"], optimizer, steps)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except ODD_STATE as error:
        raise foreign_state(origin, error) from error


ODD_STATE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What reading an odd field of a state raises."""


def check_alike(found: Any, expected: Any, name: str) -> None:
    """Check that a dict has the names of another one, with tensors like its tensors.

    Args:
        found: of a state.
        expected: name -> tensor.
        name: of the dict, for the error.

    Raises:
        TypeError, ValueError: names are missing or unknown, or a tensor has another shape or dtype,
            or is not finite.
    """
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise ValueError(f"`{name}` has other names of tensors")
    for key, tensor in found.items():
        like = expected[key]
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}.{key}` is {type(tensor).__name__}, expected a tensor")
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype) or not tensor.isfinite().all():
            raise ValueError(
                f"`{name}.{key}` has {tuple(tensor.shape)} {tensor.dtype}, expected finite numbers "
                f"in {tuple(like.shape)} {like.dtype}"
            )


def check_equal(found: Any, expected: Any, name: str) -> None:
    """Check a field whose value is known.

    Raises:
        ValueError: it has another value or type.
    """
    if type(found) is not type(expected) or found != expected:
        raise ValueError(f"`{name}` is {found!r}, expected {expected!r}")


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Check the state of an optimizer whose groups are as they must be after ``steps`` steps."""
    for own, one in zip(optimizer.param_groups, found["param_groups"], strict=True):
        one["fused"] = own.get("fused")  # as its device asks for; a resume may be on another one
    check_equal(found["param_groups"], optimizer.state_dict()["param_groups"], "param_groups")
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    adam = isinstance(optimizer, torch.optim.AdamW)
    if adam:
        names = ["step", "exp_avg", "exp_avg_sq"]
    else:
        names = ["momentum_buffer"] if optimizer.defaults["momentum"] else []
    known = range(len(parameters)) if steps and names else ()
    check_equal(sorted(found["state"]), list(known), "optimizer.state")
    for number in known:
        like = parameters[number]
        expected = {name: torch.zeros(()) if name == "step" else like for name in names}
        check_alike(found["state"][number], expected, f"optimizer.state.{number}")
        if adam:
            check_equal(found["state"][number]["step"].item(), float(steps), "step")


def foreign_state(origin: Path, error: Exception) -> DamagedError:
    """Make the error for a state in ``origin`` that does not fit."""
    return DamagedError(
        f"{origin} was left by another version of the code, or was changed ({briefly(error)}).",
        _DELETE,
    )


def random_state() -> list[torch.Tensor]:
    """Read the state of the generators that this process uses: the CPU's and its CUDA device's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def restore_random(states: list[torch.Tensor], origin: Path) -> None:
    """Continue the random numbers of the process whose `random_state` this is.

    Raises:
        DamagedError: it is no such state; names the file ``origin``.
    """
    try:
        torch.set_rng_state(states[0])
        if torch.cuda.is_available() and len(states) > 1:
            torch.cuda.set_rng_state(states[1])
    except ODD_STATE as error:
        raise foreign_state(origin, error) from error


def load_state(path: Path) -> dict[str, Any]:
    """Read the state that a killed fit or training left.

    Raises:
        DamagedError: the file was changed, or holds something else.
    """
    with advising(_DELETE, DamagedError):
        state, _ = load_tensors(path)
    if not isinstance(state, dict):
        raise DamagedError(
            f"{path} is not a state to resume from: expected a dict, not a {type(state).__name__}.",
            _DELETE,
        )
    return state


def best_device() -> torch.device:
    """Choose CUDA if there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32.

    These are CUDA devices with such units, and x86 processors with AVX512-BF16, which all
    processors with AMX's bfloat16 have too. Elsewhere torch computes in bfloat16 as well, but
    slowly.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch 2.6 has no public function for it. The products are oneDNN's (mkldnn).
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Let float32 products of matrices, and convolutions, be rounded to TF32 or not in the block.

    torch's own choice is to round in convolutions. Only accelerators have TF32.

    Args:
        precision: they are rounded if it is `tf32`.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    former = cudnn.allow_tf32, products.allow_tf32
    try:
        cudnn.allow_tf32 = products.allow_tf32 = precision == "tf32"
        yield
    finally:
        cudnn.allow_tf32, products.allow_tf32 = former


def non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold a number that is nan or infinite."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
