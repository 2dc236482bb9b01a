"""Products of wide float32 matrices, by whichever of a CPU's two libraries is faster.

torch multiplies float32 matrices with MKL, whose kernels use AVX-512 on Intel's processors only. On
others, oneDNN, which torch offers for tensors in its own layout
(https://docs.pytorch.org/docs/stable/generated/torch.Tensor.to_mkldnn.html), multiplied them here
at twice the rate. Its sums are rounded in another order. Narrow matrices stay with MKL: copying
them would cost most of the gain, and published results would change in their last digits.

Letters: N rows, S and H sizes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from pipeline.machine import is_intel

_WIDE = 256
"""Smallest S and H for oneDNN."""


class Factor:
    """A matrix ``weight`` (S, H), for products of many others with its transpose."""

    def __init__(self, weight: Tensor) -> None:
        self._transposed = weight.T
        self._prepared = _prepared(weight) if _is_for_onednn(weight) else None

    def times(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``rows @ weight.T``: (N, H) -> (N, S), into ``out`` if it is given."""
        if self._prepared is None:
            return torch.mm(rows, self._transposed, out=out)
        result = linear(_prepared(rows), self._prepared).to_dense()
        return result if out is None else out.copy_(result)


def add_product(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """``total += gradient.T @ states``: (S, H), (N, S), (N, H)."""
    if _is_for_onednn(total) and total.dtype == states.dtype:
        total += linear(_prepared(gradient.T), _prepared(states.T)).to_dense()
    elif total.dtype == states.dtype:
        torch.addmm(total, gradient.T, states, out=total)
    else:
        total.add_(gradient.T @ states)


def _prepared(matrix: Tensor) -> Tensor:
    """Copy a matrix to oneDNN's layout."""
    return matrix.contiguous().to_mkldnn()


def _is_for_onednn(matrix: Tensor) -> bool:
    return (
        matrix.device.type == "cpu"
        and matrix.dtype == torch.float32
        and min(matrix.shape) >= _WIDE
        and _is_onednn_faster()
    )


@cache
def _is_onednn_faster() -> bool:
    """Whether this processor has AVX-512 that MKL does not use."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and torch.backends.mkldnn.is_available() and not is_intel()
