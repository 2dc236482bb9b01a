"""Grids of edges: both forms of their operations, piecewise and plain, against the equations.

Letters: G grids, R rows, N columns, H hidden size, S size of what is read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.heads.matching import grids
from pipeline.heads.matching.grids import Pair, read_grid, update_grid

G, R, N, H, S = 3, 5, 4, 6, 2


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture(params=[1, 2, R, 2 * R], ids=lambda rows: f"pieces of {rows} rows")
def _rows_per_piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces of one row, two rows, a grid, or two grids; the last piece may be smaller."""

    def pieces(number: int, rows: int, bytes_per_row: int, device: torch.device) -> Any:
        monkeypatch.setattr(grids, "_CACHE_BYTES", request.param * bytes_per_row)
        slices = split(number, rows, bytes_per_row, device)
        per_grid = -(-rows // request.param)
        assert len(slices) == (number * per_grid if request.param <= rows else -(-number // 2))
        return slices

    split = grids._pieces
    monkeypatch.setattr(grids, "_pieces", pieces)


def assert_same(
    actual_outputs: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Tensor]
) -> None:
    """Assert equal outputs, and equal gradients of all inputs for random ones of the outputs."""
    assert actual_outputs.keys() == expected.keys()
    gradients = []
    for outputs in (actual_outputs, expected):
        loss = sum(
            (value * random(*value.shape, seed=number).detach()).sum()
            for number, value in enumerate(outputs.values())
        )
        gradients.append(torch.autograd.grad(loss, list(inputs.values()), retain_graph=True))
    for name, value in actual_outputs.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    for name, actual, wanted in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12, msg=f"grad of {name}")
        assert actual.abs().max() > 1e-3, name


def outputs(reading: grids.Reading) -> dict[str, Tensor]:
    return {name: value for name, value in reading._asdict().items() if value is not None}


@pytest.mark.usefixtures("_rows_per_piece")
@pytest.mark.parametrize("of_pairs", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["columns shared", "columns of each grid"])
@pytest.mark.parametrize("readers", [("rows",), ("rows", "kept"), ("rows", "columns", "kept")])
def test_read_grid_equals_its_equations(
    of_pairs: bool, shared: bool, readers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {
        "weight": random(len(readers) * S, H, seed=10),
        "column_term": random(1 if shared else G, N, S, seed=11),
    }
    if of_pairs:
        inputs["left"] = random(G, R, H, seed=12)
        inputs["right"] = random(1 if shared else G, N, H, seed=13)
        edges: grids.Hidden = Pair(inputs["left"], inputs["right"])
        hidden = (inputs["left"].unsqueeze(2) + inputs["right"].unsqueeze(1)).clamp(min=0)
    else:
        edges = hidden = inputs["hidden"] = random(G, R, N, H, seed=14)
    column_weight = random(R, N, seed=15).detach()
    row_weight = random(G, R, seed=16).detach()
    terms: tuple[Tensor, ...] = ()
    if "columns" in readers:
        inputs["row_term"] = random(G, R, S, seed=17)
        terms = (inputs["row_term"], row_weight)
    arguments = (edges, inputs["weight"], inputs["column_term"], column_weight, *terms)
    actual = outputs(read_grid(*arguments))

    expected = {
        name: torch.einsum("grnh,sh->grns", hidden, weight)
        for name, weight in zip(readers, inputs["weight"].split(S), strict=True)
    }
    to_rows = (expected.pop("rows") + inputs["column_term"][:, None]).clamp(min=0)
    expected["to_rows"] = torch.einsum("grns,rn->grs", to_rows, column_weight)
    if "columns" in readers:
        to_columns = (expected.pop("columns") + inputs["row_term"][:, :, None]).clamp(min=0)
        expected["to_columns"] = torch.einsum("grns,gr->gns", to_columns, row_weight)
    expected = {name: expected[name] for name in actual}
    assert_same(actual, expected, inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(outputs(read_grid(*arguments)), expected, inputs)


@pytest.mark.usefixtures("_rows_per_piece")
@pytest.mark.parametrize("shared", [True, False], ids=["kept shared", "kept of each grid"])
def test_update_grid_equals_its_equation(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {
        "kept": random(1 if shared else G, R, N, S, seed=1),
        "left": random(G, R, H, seed=2),
        "right": random(G, N, H, seed=3),
        "weight": random(S, H, seed=4),
        "bias": random(S, seed=5),
    }
    pair = Pair(inputs["left"], inputs["right"])
    arguments = (inputs["kept"], pair, inputs["weight"], inputs["bias"])
    hidden = (inputs["left"].unsqueeze(2) + inputs["right"].unsqueeze(1)).clamp(min=0)
    read = torch.einsum("grnh,sh->grns", hidden, inputs["weight"])
    expected = (inputs["kept"] + read + inputs["bias"]).clamp(min=0)
    assert_same({"updated": update_grid(*arguments)}, {"updated": expected}, inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same({"updated": update_grid(*arguments)}, {"updated": expected}, inputs)


def test_reading_without_gradients_has_no_graph() -> None:
    pair = Pair(random(G, R, H, seed=1), random(1, N, H, seed=2))
    weight, term = random(S, H, seed=3), random(1, N, S, seed=4)
    share = torch.ones(1, N, dtype=torch.float64)
    with torch.no_grad():
        alone = read_grid(pair, weight, term, share)
    assert not alone.to_rows.requires_grad
    assert alone.to_columns is None
    assert alone.kept is None
    assert torch.equal(alone.to_rows, read_grid(pair, weight, term, share).to_rows)


def test_autocast_applies_to_grids() -> None:
    """Products are computed in bfloat16, and sums of many of them in float32."""
    pair = Pair(random(G, 40, H, seed=1).float(), random(G, 50, H, seed=2).float())
    kept, bias = random(1, 40, 50, S, seed=4).float(), random(S, seed=5).float()
    weight = random(S, H, seed=3).float().detach().requires_grad_()
    (exact,) = torch.autograd.grad(update_grid(kept, pair, weight, bias).sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        updated = update_grid(kept, pair, weight, bias)
    assert updated.dtype == torch.bfloat16
    (rounded,) = torch.autograd.grad(updated.float().sum(), weight)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize(("free", "largest"), [(10**12, 7), (16 * 1200, 2), (16 * 300, 1)])
def test_pieces_on_an_accelerator_are_as_large_as_its_free_memory_allows(
    free: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 grids of 5 rows of 100 bytes: all at once, two grids (1,200 bytes) or three rows (300)."""
    monkeypatch.setattr(grids, "_free_bytes", lambda device: free)
    slices = grids._pieces(7, 5, 100, torch.device("cuda"))
    covered = [(g, r) for grid, row in slices for g in range(7)[grid] for r in range(5)[row]]
    assert sorted(covered) == [(g, r) for g in range(7) for r in range(5)]
    assert max(len(range(7)[grid]) for grid, _ in slices) == largest
    assert max(len(range(7)[g]) * len(range(5)[r]) * 100 for g, r in slices) <= free / 16
