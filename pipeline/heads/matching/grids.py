"""Grids of edges, from every row to every column, in as little memory as possible.

Matching edges are a grid of instances by labels; the edges of a complete label graph are a grid of
labels by labels. Both are large (B·35·80 and B·80·80 edges at COCO's size), and the network does
little more with them than multiply matrices. So on a CPU, both operations here process a few rows
of a grid at a time: what is added, clipped and averaged between two products stays in the
processor's cache. An accelerator gets as many grids at once as its memory allows, since each of its
kernels costs time to launch. Everywhere, the backward pass keeps only what it can't cheaply
recompute.

- An edge whose hidden state is ``relu(left_i + right_j)`` is kept as its two nodes (`Pair`).
- Of a ``relu(x)`` that is averaged at once, the backward pass keeps one byte per number: whether it
  is above zero (torch.bool).
- Of an edge's update it keeps the updated hidden state, which the next reader needs anyway.

Compilers (`torch.export`, and with it the export to ONNX) can't follow autograd functions or loops
over pieces, and fuse such operations themselves. For them each operation has a plain form.

Letters: G grids (images, or 1 where all images share one), R rows, N columns, H hidden size of the
edges, S size of what is read of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.heads.matching.products import Factor, add_product

_CACHE_BYTES = 2**21
"""Size of the largest tensor of a piece on a CPU: of the order of a core's cache."""

_LARGEST_SHARE = 1 / 16
"""Size of the largest tensor of a piece on an accelerator, as a share of its free memory. A few
tensors of that size exist at the same time. Where other programs use the accelerator, too, the sums
of two runs may be rounded in different ways."""


class Pair(NamedTuple):
    """Hidden states ``relu(left_i + right_j)`` of a grid of edges, kept as their two nodes."""

    left: Tensor  # (G, R, H)
    right: Tensor  # (G or 1, N, H)

    def hidden(self) -> Tensor:
        """Compute the hidden states (G, R, N, H)."""
        return (self.left[:, :, None] + self.right[:, None]).relu()


Hidden = Pair | Tensor
"""The hidden states of a grid's edges: as a `Pair`, or as a tensor (G, R, N, H)."""


class Reading(NamedTuple):
    """What one fused product reads of a grid's edges.

    Attributes:
        to_rows: (G, R, S), mean message of each row's edges.
        to_columns: (G, N, S), mean message of each column's edges; None if columns read nothing.
        kept: (G, R, N, S), what the edges' own update reads of them; None without an update.
    """

    to_rows: Tensor
    to_columns: Tensor | None
    kept: Tensor | None


def read_grid(
    edges: Hidden,
    weight: Tensor,
    column_term: Tensor,
    column_weight: Tensor,
    row_term: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Reading:
    """Compute the mean messages along a grid's edges, and what the edges' update reads of them.

    With ``[x^r, x^c, x^k] = weight @ hidden_ij``:

        to_rows_i    = sum over j of column_weight_ij relu(x^r_ij + column_term_j)
        to_columns_j = sum over i of row_weight_i relu(x^c_ij + row_term_i)
        kept_ij      = x^k_ij

    Args:
        edges: their hidden states.
        weight: (S, H), (2S, H) or (3S, H), the readers in the order of `Reading`. `to_columns` is
            computed if ``row_term`` is given, and `kept` if the weight has S more rows.
        column_term: (G or 1, N, S).
        column_weight: (R or 1, N).
        row_term: (G, R, S).
        row_weight: (G, R).
    """
    if torch.compiler.is_compiling():
        return _read_plainly(edges, weight, column_term, column_weight, row_term, row_weight)
    hidden, left, right = (
        (None, edges.left, edges.right) if isinstance(edges, Pair) else (edges, None, None)
    )
    inputs = (hidden, left, right, weight, column_term, column_weight, row_term, row_weight)
    return Reading(*cast(Any, _Read).apply(*_as_autocast(*inputs)))


def update_grid(kept: Tensor, pair: Pair, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the hidden state of updated edges, ``relu(kept_ij + weight @ pair_ij + bias)``.

    Args:
        kept: (G or 1, R, N, S).
        pair: (G, R, H) and (G, N, H).
        weight: (S, H).
        bias: (S,).

    Returns:
        (G, R, N, S).
    """
    if torch.compiler.is_compiling():
        return _update_plainly(kept, pair, weight, bias)
    inputs = _as_autocast(kept, pair.left, pair.right, weight, bias)
    return cast(Tensor, cast(Any, _Update).apply(*inputs))


def _read_plainly(
    edges: Hidden,
    weight: Tensor,
    column_term: Tensor,
    column_weight: Tensor,
    row_term: Tensor | None,
    row_weight: Tensor | None,
) -> Reading:
    """Compute `read_grid` as its equations stand, for compilers."""
    size = column_term.shape[-1]
    hidden = edges.hidden() if isinstance(edges, Pair) else edges
    read = hidden @ weight.T
    messages = (read[..., :size] + column_term[:, None]).relu()
    to_rows = (messages * column_weight[..., None]).sum(dim=2)
    to_columns = None
    parts = 1
    if row_term is not None and row_weight is not None:
        messages = (read[..., size : 2 * size] + row_term[:, :, None]).relu()
        to_columns = (messages * row_weight[:, :, None, None]).sum(dim=1)
        parts = 2
    kept = read[..., parts * size :] if len(weight) > parts * size else None
    return Reading(to_rows, to_columns, kept)


def _update_plainly(kept: Tensor, pair: Pair, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `update_grid` as its equation stands, for compilers."""
    return (kept + pair.hidden() @ weight.T + bias).relu()


def _as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Convert to the precision that autocast asks for, since it ignores custom functions."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _sum_like(tensor: Tensor) -> Tensor:
    """Make zeros to add many pieces to. In bfloat16 the last ones would be rounded away."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=wide)


@cache
def _free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that was free when this was first asked."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0]
    return 2**62


def _piece_bytes(device: torch.device) -> int:
    """Size of the largest tensor of a piece on a device."""
    if device.type == "cpu":
        return _CACHE_BYTES
    return int(_LARGEST_SHARE * _free_bytes(device))


def _pieces(
    grids: int, rows: int, bytes_per_row: int, device: torch.device
) -> list[tuple[slice, slice]]:
    """Split grids into pieces (grids, rows): some rows of one grid, or several small grids."""
    fitting = _piece_bytes(device) // bytes_per_row
    if fitting >= rows:
        count = fitting // rows
        return [(slice(g, g + count), slice(0, rows)) for g in range(0, grids, count)]
    count = max(1, fitting)
    starts = range(0, rows, count)
    return [(slice(g, g + 1), slice(r, r + count)) for g in range(grids) for r in starts]


def _select(shared: Tensor, grids: slice) -> Tensor:
    """Select what belongs to some grids, or what all grids share."""
    return shared[grids] if len(shared) > 1 else shared


def _add_to(total: Tensor, grids: slice, part: Tensor) -> None:
    """Add the grids' parts to their own totals, or to the total that all grids share."""
    if len(total) > 1:
        total[grids] += part
    else:
        total += part.sum(dim=0, keepdim=True)


class _Read(torch.autograd.Function):
    """`read_grid`, one piece at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        weight: Tensor,
        column_term: Tensor,
        column_weight: Tensor,
        row_term: Tensor | None,
        row_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size, columns = column_term.shape[-1], column_term.shape[-2]
        first = hidden if left is None else left
        grids, rows = cast(Tensor, first).shape[:2]
        has_columns = row_term is not None
        has_kept = len(weight) > (1 + has_columns) * size
        to_rows = weight.new_empty(grids, rows, size)
        to_columns = _sum_like(weight.new_empty(grids, columns, size)) if has_columns else None
        kept = weight.new_empty(grids, rows, columns, size) if has_kept else None
        differentiated = any(ctx.needs_input_grad)
        passed_shape = (grids, rows, columns, size) if differentiated else (0,)
        row_passed = weight.new_empty(passed_shape, dtype=torch.bool)
        column_passed = row_passed.new_empty(passed_shape if has_columns else (0,))
        scale = column_weight.expand(rows, columns)[..., None]
        reader = Factor(weight)
        row_bytes = columns * len(weight) * weight.element_size()
        for g, r in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(hidden, left, right, g, r)
            read = reader.times(states.flatten(0, 2)).view(*states.shape[:3], len(weight))
            messages = read[..., :size].add_(_select(column_term, g)[:, None]).relu_()
            if differentiated:
                row_passed[g, r] = messages
            torch.sum(messages.mul_(scale[r]), dim=2, out=to_rows[g, r])
            if row_term is not None and row_weight is not None and to_columns is not None:
                messages = read[..., size : 2 * size].add_(row_term[g, r, None]).relu_()
                if differentiated:
                    column_passed[g, r] = messages
                weights = row_weight[g, r, None, None]
                to_columns[g] += messages.mul_(weights).sum(dim=1)
            if kept is not None:
                kept[g, r] = read[..., -size:]
        ctx.save_for_backward(
            hidden, left, right, weight, column_term, column_weight, row_weight, row_passed,
            column_passed,
        )  # fmt: skip
        if to_columns is not None:
            to_columns = to_columns.to(weight.dtype)
        return to_rows, to_columns, kept

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_rows: Tensor, to_columns: Tensor | None, kept: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the inputs from those of the outputs."""
        saved = ctx.saved_tensors
        hidden, left, right, weight, column_term, column_weight, row_weight = saved[:7]
        # As int8: products with it are several times as fast as with torch.bool, or as a mask.
        row_passed, column_passed = (passed.view(torch.int8) for passed in saved[7:])
        grids, rows, columns, size = row_passed.shape
        grad_hidden = None if hidden is None else torch.empty_like(hidden)
        grad_left = None if left is None else torch.empty_like(left)
        grad_right = None if right is None else _sum_like(right)
        grad_weight, grad_column = _sum_like(weight), _sum_like(column_term)
        grad_row = None if to_columns is None else weight.new_empty(grids, rows, size)
        scale = column_weight.expand(rows, columns)[..., None]
        reader = Factor(weight.T)
        row_bytes = columns * len(weight) * weight.element_size()
        for g, r in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(hidden, left, right, g, r)
            grad_read = weight.new_empty(*states.shape[:3], len(weight))
            grad_messages = grad_read[..., :size]
            torch.mul(to_rows[g, r, None], scale[r], out=grad_messages).mul_(row_passed[g, r])
            _add_to(grad_column, g, grad_messages.sum(dim=1))
            if grad_row is not None and to_columns is not None:
                grad_messages = grad_read[..., size : 2 * size]
                weights = row_weight[g, r, None, None]
                torch.mul(to_columns[g, None], weights, out=grad_messages)
                grad_messages.mul_(column_passed[g, r])
                torch.sum(grad_messages, dim=2, out=grad_row[g, r])
            if kept is not None:
                grad_read[..., -size:] = kept[g, r]
            flat = grad_read.flatten(0, 2)
            add_product(grad_weight, flat, states.flatten(0, 2))
            if grad_hidden is not None:
                reader.times(flat, out=grad_hidden[g, r].flatten(0, 2))
            else:
                _split(reader.times(flat), states, g, r, grad_left, grad_right)
        return (
            grad_hidden,
            grad_left,
            None if grad_right is None else grad_right.to(weight.dtype),
            grad_weight.to(weight.dtype),
            grad_column.to(weight.dtype),
            None,
            grad_row,
            None,
        )


class _Update(torch.autograd.Function):
    """`update_grid`, one piece at a time."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        grids, rows, columns = len(left), left.shape[1], right.shape[1]
        updated = weight.new_empty(grids, rows, columns, len(weight))
        reader = Factor(weight)
        row_bytes = columns * max(weight.shape) * weight.element_size()
        for g, r in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(None, left, right, g, r).flatten(0, 2)
            piece = updated[g, r]
            reader.times(states, out=piece.flatten(0, 2))
            piece.add_(_select(kept, g)[:, r]).add_(bias).relu_()
        ctx.save_for_backward(updated, left, right, weight)
        ctx.shared = len(kept) < grids
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Compute the gradients of the inputs from that of the updated edges."""
        updated, left, right, weight = ctx.saved_tensors
        grids, rows, columns, size = updated.shape
        grad_kept = gradient.new_empty(1 if ctx.shared else grids, rows, columns, size)
        if ctx.shared:
            grad_kept = _sum_like(grad_kept)
        grad_left, grad_right = torch.empty_like(left), _sum_like(right)
        grad_weight, grad_bias = _sum_like(weight), _sum_like(weight[:, 0])
        reader = Factor(weight.T)
        row_bytes = columns * max(weight.shape) * weight.element_size()
        for g, r in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(None, left, right, g, r)
            grad_sum = _relu_gradient(gradient[g, r], updated[g, r])
            if ctx.shared:
                grad_kept[0, r] += grad_sum.sum(dim=0)
            else:
                grad_kept[g, r] = grad_sum
            flat = grad_sum.flatten(0, 2)
            add_product(grad_weight, flat, states.flatten(0, 2))
            grad_bias += flat.sum(dim=0)
            _split(reader.times(flat), states, g, r, grad_left, grad_right)
        dtype = weight.dtype
        return (
            grad_kept.to(dtype),
            grad_left,
            grad_right.to(dtype),
            grad_weight.to(dtype),
            grad_bias.to(dtype),
        )


def _relu_gradient(gradient: Tensor, output: Tensor) -> Tensor:
    """Compute the gradient before a ReLU from the gradient after it and its output."""
    return cast(Tensor, torch.ops.aten.threshold_backward(gradient, output, 0))


def _states(hidden: Tensor | None, left: Any, right: Any, g: slice, r: slice) -> Tensor:
    """Compute the hidden states of the edges in one piece."""
    if hidden is not None:
        return hidden[g, r]
    sums = left[g, r, None] + _select(right, g)[:, None]
    return cast(Tensor, sums.relu_())


def _split(grad_states: Tensor, states: Tensor, g: slice, r: slice, left: Any, right: Any) -> None:
    """Pass the gradient of ``relu(left + right)`` on to both."""
    grad_sums = _relu_gradient(grad_states.view_as(states), states)
    torch.sum(grad_sums, dim=2, out=left[g, r])
    _add_to(right, g, grad_sums.sum(dim=1))
