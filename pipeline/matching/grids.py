"""Edges from every row to every column of a grid, without ever holding what can be made again.

Matching edges are a grid of instances by labels, those of a complete label graph one of labels by
labels. Both are large (B·35·80 and B·80·80 edges at COCO's size), and what the network does with
them is little more than matrix products. So both operations here go through a grid a few rows at
a time: what is added, cut off and averaged between two products stays in the processor's cache,
and the backward pass keeps only what it can't cheaply make again.

- An edge whose hidden state is ``relu(left_i + right_j)`` is kept as its two nodes (`Pair`).
- Of ``relu(x)`` that is averaged at once, the backward pass keeps a bit per number, as bool.
- Of an edge's update it keeps the updated hidden state, which the next reader needs anyway.

Letters: G grids (images, or 1 where all images share one), R rows, N columns, H hidden size of the
edges as they come, S size of what is read of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHE_BYTES = 2**21
"""What one piece's largest tensor may take: of the order of a core's cache."""


class Pair(NamedTuple):
    """Hidden states ``relu(left_i + right_j)`` of a grid of edges, by their two nodes."""

    left: Tensor  # (G, R, H)
    right: Tensor  # (G or 1, N, H)

    def hidden(self) -> Tensor:
        """(G, R, N, H)"""
        return (self.left[:, :, None] + self.right[:, None]).relu()


Hidden = Pair | Tensor
"""The hidden states of a grid's edges: of a `Pair`, or themselves (G, R, N, H)."""


class Reading(NamedTuple):
    """What is read of a grid's edges by one fused product.

    Attributes:
        to_rows: (G, R, S), mean message of each row's edges.
        to_columns: (G, N, S), mean message of each column's edges; None if there is no reader.
        kept: (G, R, N, S), what the edges' own update reads of them; None if there is none.
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
    """Messages along a grid's edges, averaged, and what the edges' update reads.

    With ``[x^r, x^c, x^k] = weight @ hidden_ij``:

        to_rows_i    = sum over j of column_weight_ij relu(x^r_ij + column_term_j)
        to_columns_j = sum over i of row_weight_i relu(x^c_ij + row_term_i)
        kept_ij      = x^k_ij

    Args:
        edges: their hidden states.
        weight: (S, H), (2S, H) or (3S, H): readers in the order of `Reading`; `to_columns` is there
            if ``row_term`` is, and `kept` if a third is left.
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
    """Hidden state of the updated edges: ``relu(kept_ij + weight @ pair_ij + bias)``.

    Args:
        kept: (G or 1, R, N, S).
        pair: (G, R, H) and (G, N, H).
        weight: (S, H).
        bias: (S,).

    Returns:
        (G, R, N, S).
    """
    if torch.compiler.is_compiling():
        return (kept + pair.hidden() @ weight.T + bias).relu()
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
    """`read_grid` in as many lines as it has equations, for compilers, which fuse it themselves."""
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


def _as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the precision that autocast asks for; it does not look into functions of one's own."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _sum_like(tensor: Tensor) -> Tensor:
    """Zeros of its shape to add many pieces to: in bfloat16 the last would be rounded away."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=wide)


def _add_product(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """``total += gradient.T @ states``"""
    if total.dtype == states.dtype:
        torch.addmm(total, gradient.T, states, out=total)
    else:
        total.add_(gradient.T @ states)


def _pieces(
    grids: int, rows: int, bytes_a_row: int, device: torch.device
) -> list[tuple[slice, slice]]:
    """(grids, rows) of each piece: some rows of a grid, or where it is small, of several grids.

    On other devices than the CPU a piece is a whole grid, at least.
    """
    fitting = _CACHE_BYTES // bytes_a_row
    if fitting >= rows or device.type != "cpu":
        some = max(1, fitting // rows)
        return [(slice(g, g + some), slice(0, rows)) for g in range(0, grids, some)]
    some = max(1, fitting)
    starts = range(0, rows, some)
    return [(slice(g, g + 1), slice(r, r + some)) for g in range(grids) for r in starts]


def _of(shared: Tensor, grids: slice) -> Tensor:
    """The grids' own, or what all grids share."""
    return shared[grids] if len(shared) > 1 else shared


def _add_to(total: Tensor, grids: slice, part: Tensor) -> None:
    """Add the grids' parts to their own totals, or to what all grids share."""
    if len(total) > 1:
        total[grids] += part
    else:
        total += part.sum(dim=0, keepdim=True)


class _Read(torch.autograd.Function):
    """`read_grid`, piece by piece."""

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
        both = row_term is not None
        keeps = len(weight) > (1 + both) * size
        to_rows = weight.new_empty(grids, rows, size)
        to_columns = _sum_like(weight.new_empty(grids, columns, size)) if both else None
        kept = weight.new_empty(grids, rows, columns, size) if keeps else None
        differentiated = any(ctx.needs_input_grad)
        cut_shape = (grids, rows, columns, size) if differentiated else (0,)
        row_cut = weight.new_empty(cut_shape, dtype=torch.bool)
        column_cut = row_cut.new_empty(cut_shape if both else (0,))
        scale = column_weight.expand(rows, columns)[..., None]
        row_bytes = columns * len(weight) * weight.element_size()
        for some, part in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(hidden, left, right, some, part)
            read = (states.flatten(0, 2) @ weight.T).view(*states.shape[:3], len(weight))
            messages = read[..., :size].add_(_of(column_term, some)[:, None])
            if differentiated:
                torch.le(messages, 0, out=row_cut[some, part])
            torch.sum(messages.relu_().mul_(scale[part]), dim=2, out=to_rows[some, part])
            if row_term is not None and row_weight is not None and to_columns is not None:
                messages = read[..., size : 2 * size].add_(row_term[some, part, None])
                if differentiated:
                    torch.le(messages, 0, out=column_cut[some, part])
                weights = row_weight[some, part, None, None]
                to_columns[some] += messages.relu_().mul_(weights).sum(dim=1)
            if kept is not None:
                kept[some, part] = read[..., -size:]
        ctx.save_for_backward(
            hidden, left, right, weight, column_term, column_weight, row_weight, row_cut,
            column_cut,
        )  # fmt: skip
        if to_columns is not None:
            to_columns = to_columns.to(weight.dtype)
        return to_rows, to_columns, kept

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_rows: Tensor, to_columns: Tensor | None, kept: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs from those of the outputs."""
        saved = ctx.saved_tensors
        hidden, left, right, weight, column_term, column_weight, row_weight = saved[:7]
        row_cut, column_cut = saved[7:]
        grids, rows, columns, size = row_cut.shape
        of_hidden = None if hidden is None else torch.empty_like(hidden)
        of_left = None if left is None else torch.empty_like(left)
        of_right = None if right is None else _sum_like(right)
        of_weight, of_column = _sum_like(weight), _sum_like(column_term)
        of_row = None if to_columns is None else weight.new_empty(grids, rows, size)
        scale = column_weight.expand(rows, columns)[..., None]
        row_bytes = columns * len(weight) * weight.element_size()
        for some, part in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(hidden, left, right, some, part)
            of_read = weight.new_empty(*states.shape[:3], len(weight))
            of_messages = of_read[..., :size]
            torch.mul(to_rows[some, part, None], scale[part], out=of_messages)
            of_messages.masked_fill_(row_cut[some, part], 0)
            _add_to(of_column, some, of_messages.sum(dim=1))
            if of_row is not None and to_columns is not None:
                of_messages = of_read[..., size : 2 * size]
                weights = row_weight[some, part, None, None]
                torch.mul(to_columns[some, None], weights, out=of_messages)
                of_messages.masked_fill_(column_cut[some, part], 0)
                torch.sum(of_messages, dim=2, out=of_row[some, part])
            if kept is not None:
                of_read[..., -size:] = kept[some, part]
            flat = of_read.flatten(0, 2)
            _add_product(of_weight, flat, states.flatten(0, 2))
            if of_hidden is not None:
                torch.mm(flat, weight, out=of_hidden[some, part].flatten(0, 2))
            else:
                _split(flat @ weight, states, some, part, of_left, of_right)
        return (
            of_hidden,
            of_left,
            None if of_right is None else of_right.to(weight.dtype),
            of_weight.to(weight.dtype),
            of_column.to(weight.dtype),
            None,
            of_row,
            None,
        )


class _Update(torch.autograd.Function):
    """`update_grid`, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        grids, rows, columns = len(left), left.shape[1], right.shape[1]
        updated = weight.new_empty(grids, rows, columns, len(weight))
        row_bytes = columns * max(weight.shape) * weight.element_size()
        for some, part in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(None, left, right, some, part).flatten(0, 2)
            piece = updated[some, part]
            torch.mm(states, weight.T, out=piece.flatten(0, 2))
            piece.add_(_of(kept, some)[:, part]).add_(bias).relu_()
        ctx.save_for_backward(updated, left, right, weight)
        ctx.shared = len(kept) < grids
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs from that of the updated edges."""
        updated, left, right, weight = ctx.saved_tensors
        grids, rows, columns, size = updated.shape
        of_kept = gradient.new_empty(1 if ctx.shared else grids, rows, columns, size)
        if ctx.shared:
            of_kept = _sum_like(of_kept)
        of_left, of_right = torch.empty_like(left), _sum_like(right)
        of_weight, of_bias = _sum_like(weight), _sum_like(weight[:, 0])
        row_bytes = columns * max(weight.shape) * weight.element_size()
        for some, part in _pieces(grids, rows, row_bytes, weight.device):
            states = _states(None, left, right, some, part)
            of_sum = _of_relu(gradient[some, part], updated[some, part])
            if ctx.shared:
                of_kept[0, part] += of_sum.sum(dim=0)
            else:
                of_kept[some, part] = of_sum
            flat = of_sum.flatten(0, 2)
            _add_product(of_weight, flat, states.flatten(0, 2))
            of_bias += flat.sum(dim=0)
            _split(flat @ weight, states, some, part, of_left, of_right)
        dtype = weight.dtype
        return (
            of_kept.to(dtype),
            of_left,
            of_right.to(dtype),
            of_weight.to(dtype),
            of_bias.to(dtype),
        )


def _of_relu(gradient: Tensor, output: Tensor) -> Tensor:
    """The gradient before a relu, from that after it and its output."""
    return cast(Tensor, torch.ops.aten.threshold_backward(gradient, output, 0))


def _states(hidden: Tensor | None, left: Any, right: Any, some: slice, part: slice) -> Tensor:
    """Hidden states of some grids' edges of some rows."""
    if hidden is not None:
        return hidden[some, part]
    sums = left[some, part, None] + _of(right, some)[:, None]
    return cast(Tensor, sums.relu_())


def _split(
    of_states: Tensor, states: Tensor, some: slice, part: slice, left: Any, right: Any
) -> None:
    """Hand the gradient of ``relu(left + right)`` on to both."""
    of_sums = _of_relu(of_states.view_as(states), states)
    torch.sum(of_sums, dim=2, out=left[some, part])
    _add_to(right, some, of_sums.sum(dim=1))
