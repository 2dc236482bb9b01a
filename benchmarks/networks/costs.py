"""What a step costs, for `benchmarks.matching` and `.gpu`: time, memory and matrix products."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks.sides import CPU, TINY, Size, make_inputs, our_side, their_side
from pipeline.heads.matching.products import Factor


def seconds(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Measure how long ``work`` takes, until the device has finished it."""
    _wait_for(device)
    started = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> int:
    """Read VmRSS or VmHWM of this process, in bytes.

    The peak is VmHWM and not ru_maxrss, which starts from the resident set of the process that
    started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s*(\d+) kB", status)[0]) * 1024


def _step_memory(whose: str, size: Size, threads: int, half: bool) -> int:
    """Measure how many bytes a first training step needs beyond those in use before it."""
    torch.set_num_threads(threads)
    make_side = our_side if whose == "ours" else their_side
    replace(make_side(TINY, make_inputs(TINY)), half=half).train()
    side = replace(make_side(size, make_inputs(size)), half=half)
    ctypes.CDLL(None).malloc_trim(0)  # or the step would reuse what the preparation freed
    before, highest = _resident("VmRSS"), _resident("VmHWM")
    side.train()
    after = _resident("VmHWM")
    if after <= highest:
        raise SystemExit(f"the preparation of {size} needs more memory than the step itself")
    return after - before


def step_memory(whose: str, size: Size, threads: int, *, half: bool = False) -> float:
    """Measure a training step of `ours` or `theirs` in a process of its own, in megabytes (1e6).

    ``half`` is that of `Side`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_step_memory, whose, size, threads, half).result() / 1e6


RATE_SIZES = ((2048, 2048, 2048), (22400, 512, 1536))
"""(n, k, m) of (n, k) x (k, m): a square, and the widest product of 8 images of COCO's size."""


def product_rate(
    repetitions: int = 4,
    *,
    sizes: Sequence[tuple[int, int, int]] = RATE_SIZES,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Measure the best rate of products (n, k) x (k, m), in floating-point operations per second.

    Args:
        repetitions: of each product.
        sizes: (n, k, m) of each.
        device, dtype: of the matrices.
    """
    best = 0.0
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        by_torch = partial(torch.mm, left, right, out=out)
        by_ours = partial(Factor(right.T).times, left, out=out)
        for multiply in [by_torch, by_ours] * repetitions:
            best = max(best, 2 * rows * inner * columns / seconds(multiply, device))
    return best


def product_operations(work: Callable[[], object]) -> int:
    """Count the floating-point operations of the matrix products that ``work`` really runs."""

    def added(_: Any, left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
        """Count those of a product (n, k) x (k, m), or of several, that is added to something."""
        return 2 * math.prod(left) * right[-1]

    # Forms that PyTorch's counter does not know.
    aten = torch.ops.aten
    others = (aten.addmm_, aten.baddbmm_, aten.addbmm, aten.addbmm_, aten._addmm_activation)
    mapping: dict[Any, Any] = dict.fromkeys(others, added)
    mapping[aten.mkldnn_linear] = lambda rows, weight, *_, **__: 2 * math.prod(rows) * weight[0]
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()
