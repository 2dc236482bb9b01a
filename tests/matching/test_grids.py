"""Grids of edges: the piecewise operations against their equations, gradients included.

Letters: G grids, R rows, N columns, H hidden size, S size of what is read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.matching import grids
from pipeline.matching.grids import Pair, read_grid, update_grid

G, R, N, H, S = 3, 5, 4, 6, 2


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture(params=[1, 2, R, 2 * R], ids=lambda rows: f"pieces of {rows} rows")
def _rows_a_piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a row, of two with a shorter last one, of a grid, of two with a shorter last."""

    def pieces(number: int, rows: int, bytes_a_row: int, device: torch.device) -> Any:
        monkeypatch.setattr(grids, "_CACHE_BYTES", request.param * bytes_a_row)
        found = cut(number, rows, bytes_a_row, device)
        a_grid = -(-rows // request.param)
        assert len(found) == (number * a_grid if request.param <= rows else -(-number // 2))
        return found

    cut = grids._pieces
    monkeypatch.setattr(grids, "_pieces", pieces)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """The same outputs, and the same gradients of all inputs for random ones of the outputs."""
    assert found.keys() == expected.keys()
    gradients = []
    for outputs in (found, expected):
        loss = sum(
            (value * random(*value.shape, seed=place).detach()).sum()
            for place, value in enumerate(outputs.values())
        )
        gradients.append(torch.autograd.grad(loss, list(inputs.values()), retain_graph=True))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    for name, actual, wanted in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12, msg=f"grad of {name}")
        assert actual.abs().max() > 1e-3, name


def outputs(reading: grids.Reading) -> dict[str, Tensor]:
    return {name: value for name, value in reading._asdict().items() if value is not None}


@pytest.mark.usefixtures("_rows_a_piece")
@pytest.mark.parametrize("of_pairs", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["columns shared", "columns of each grid"])
@pytest.mark.parametrize("readers", [("rows",), ("rows", "kept"), ("rows", "columns", "kept")])
def test_reading_is_its_equations(of_pairs: bool, shared: bool, readers: tuple[str, ...]) -> None:
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
    found = read_grid(edges, inputs["weight"], inputs["column_term"], column_weight, *terms)

    expected = {
        name: torch.einsum("grnh,sh->grns", hidden, weight)
        for name, weight in zip(readers, inputs["weight"].split(S), strict=True)
    }
    to_rows = (expected.pop("rows") + inputs["column_term"][:, None]).clamp(min=0)
    expected["to_rows"] = torch.einsum("grns,rn->grs", to_rows, column_weight)
    if "columns" in readers:
        to_columns = (expected.pop("columns") + inputs["row_term"][:, :, None]).clamp(min=0)
        expected["to_columns"] = torch.einsum("grns,gr->gns", to_columns, row_weight)
    expected = {name: expected[name] for name in outputs(found)}
    same(outputs(found), expected, inputs)
    plain = grids._read_plainly(
        edges, inputs["weight"], inputs["column_term"], column_weight, *(terms or (None, None))
    )
    same(outputs(plain), expected, inputs)


@pytest.mark.usefixtures("_rows_a_piece")
@pytest.mark.parametrize("shared", [True, False], ids=["kept shared", "kept of each grid"])
def test_updating_is_its_equation(shared: bool) -> None:
    inputs = {
        "kept": random(1 if shared else G, R, N, S, seed=1),
        "left": random(G, R, H, seed=2),
        "right": random(G, N, H, seed=3),
        "weight": random(S, H, seed=4),
        "bias": random(S, seed=5),
    }
    pair = Pair(inputs["left"], inputs["right"])
    found = update_grid(inputs["kept"], pair, inputs["weight"], inputs["bias"])
    hidden = (inputs["left"].unsqueeze(2) + inputs["right"].unsqueeze(1)).clamp(min=0)
    read = torch.einsum("grnh,sh->grns", hidden, inputs["weight"])
    expected = (inputs["kept"] + read + inputs["bias"]).clamp(min=0)
    same({"updated": found}, {"updated": expected}, inputs)


def test_a_reading_without_gradients_keeps_nothing() -> None:
    pair = Pair(random(G, R, H, seed=1), random(1, N, H, seed=2))
    weight, term = random(S, H, seed=3), random(1, N, S, seed=4)
    share = torch.ones(1, N, dtype=torch.float64)
    with torch.no_grad():
        alone = read_grid(pair, weight, term, share)
    assert not alone.to_rows.requires_grad
    assert alone.to_columns is None
    assert alone.kept is None
    assert torch.equal(alone.to_rows, read_grid(pair, weight, term, share).to_rows)


def test_autocast_reaches_into_grids() -> None:
    """Products in bfloat16, of which many are added up in float32."""
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
