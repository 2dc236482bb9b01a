"""Devices that are not there, and the lack of one that is.

Fake tensors have a shape and a device, and no numbers. Those on a fake CUDA device need no GPU.
With them, an operation on tensors of two devices raises an error, and so does one that needs the
numbers (`.item()`, `nonzero`, a mask as an index), for which the host would wait for the device.
`Operations` also finds the copies for which it would wait.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.heads.contract import Head, LabelSet, RegionBatch

_CUDA = torch.device("cuda")


@contextmanager
def without_cuda() -> Iterator[None]:
    """Let everything that chooses a device choose the CPU."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        yield


@dataclass(frozen=True)
class FakeCuda:
    """A fake CUDA device: `mode` is the context to compute on it in."""

    mode: FakeTensorMode

    def tensor(self, real: Tensor) -> Tensor:
        """A fake copy on the device."""
        fake = self.mode.from_tensor(real)
        with self.mode:
            return fake.to(_CUDA)

    def batch(self, real: RegionBatch) -> RegionBatch:
        return real.each(self.tensor)

    def labels(self, real: LabelSet) -> LabelSet:
        conditional = None if real.conditional is None else self.tensor(real.conditional)
        return LabelSet(self.tensor(real.vectors), self.tensor(real.ratio), conditional)

    def network(self, real: nn.Module) -> Any:
        """Move a network, in place, as `Module.to` would. What is no buffer stays behind."""
        for module in real.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        self.tensor(parameter.detach()), requires_grad=parameter.requires_grad
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.tensor(buffer)
        return real


_LAUNCHING_NOTHING = {
    "_unsafe_view",
    "detach",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "promote_types",
    "result_type",
}


class Operations(TorchDispatchMode):
    """Counts the operations in its block, but for views and what only describes or reserves memory.

    On a GPU each of them is one kernel, and a few are more.

    Attributes:
        by_name: how often each was called.
        waits: a line for each copy from one device to another that is not asynchronous. A tensor
            that is made of Python's numbers is such a copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.waits: list[str] = []

    @property
    def total(self) -> int:
        return self.by_name.total()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _LAUNCHING_NOTHING:
            self.by_name[name] += 1
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and not (kwargs or {}).get("non_blocking"):
            devices = [one.device.type for one in (*args, result) if isinstance(one, Tensor)]
            if len(set(devices)) > 1:
                caller = next(
                    frame
                    for frame in reversed(traceback.extract_stack())
                    if "/pipeline/" in frame.filename
                )
                self.waits.append(f"{caller.filename}:{caller.lineno}: {caller.line}")
        return result


def gradients(loss: Tensor) -> dict[Tensor, Tensor]:
    """Do what ``loss.backward()`` does, and return the gradient of every leaf.

    Torch's own engine asks the driver for the device of each tensor, which a fake one does not
    have. `test_fake_cuda.py` compares this one with it.
    """
    assert loss.grad_fn is not None
    found: dict[Tensor, Tensor] = {}
    waiting: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in _from_the_loss(loss.grad_fn):
        own = waiting.pop(node, None)
        if own is None:
            continue
        if hasattr(node, "variable"):
            found[node.variable] = own[0]
            continue
        for (reader, place), gradient in _passed_on(node, own):
            expected = reader._input_metadata[place]
            if gradient.shape != expected.shape:  # it was broadcast
                gradient = gradient.sum_to_size(expected.shape)
            gradient = gradient.to(expected.dtype)
            of_reader = waiting.setdefault(reader, {})
            before = of_reader.get(place)
            of_reader[place] = gradient if before is None else before + gradient
    return found


def _passed_on(node: Any, own: Mapping[int, Tensor]) -> Iterator[tuple[tuple[Any, int], Tensor]]:
    """Yield where a node passes which gradient on, given those of its outputs."""
    given = [own.get(place) for place in range(len(node._input_metadata))]
    edges = node.next_functions
    if isinstance(node, BackwardCFunction):  # of a torch.autograd.Function
        shapes = [about.shape for about in node._input_metadata]
        like = next(iter(own.values()))
        # As torch does; an output that is None has no shape.
        given = [
            like.new_zeros(shape) if one is None and len(shape) else one
            for one, shape in zip(given, shapes, strict=True)
        ]
        passed = node.apply(*given)
        needed = zip(passed, node.needs_input_grad, strict=True)
        passed = [gradient for gradient, is_needed in needed if is_needed]
        edges = [edge for edge in edges if edge[0] is not None]
    else:
        passed = node(*given)
        passed = passed if isinstance(passed, tuple) else (passed,)
    for edge, gradient in zip(edges, passed, strict=True):
        if edge[0] is not None and gradient is not None:
            yield edge, gradient


def _from_the_loss(first: Any) -> list[Any]:
    """All nodes of a graph, each before those that it passes gradients on to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(first, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(reader, False) for reader, _ in node.next_functions if reader is not None]
    return order[::-1]


def counted(
    device: FakeCuda, head: Head, step: Callable[[], Tensor]
) -> tuple[Operations, Operations]:
    """Count the operations of a step: of the forward pass with the loss, and of the backward pass.

    Args:
        device: of the head.
        head: whose parameters must all get a gradient.
        step: computes the loss.
    """
    forward, backward = Operations(), Operations()
    with device.mode:
        with forward:
            loss = step()
        with backward:
            found = gradients(loss)
    assert found.keys() == set(head.parameters())
    return forward, backward
