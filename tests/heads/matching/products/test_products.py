"""Products of matrices through MKL and through oneDNN, against NumPy's in float64.

Letters: N rows, S and H sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.heads.matching import products
from pipeline.heads.matching.grids import Pair, read_grid, update_grid
from pipeline.heads.matching.products import Factor, add_product
from pipeline.machine import is_intel

N, S, H = 7, 5, 6


@pytest.fixture(params=["MKL", "oneDNN"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_onednn(monkeypatch, request.param == "oneDNN")


def use_onednn(monkeypatch: pytest.MonkeyPatch, wanted: bool, wide: int = 2) -> None:
    if wanted and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is without oneDNN")
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: wanted)
    monkeypatch.setattr(products, "_WIDE", wide)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(matrix: torch.Tensor) -> np.ndarray:
    return matrix.double().numpy()


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("transposed", [False, True])
def test_products_equal_those_of_numpy(transposed: bool) -> None:
    weight = random(H, S, seed=1).T if transposed else random(S, H, seed=1)
    rows = random(N, H, seed=2)
    expected = exact(rows) @ exact(weight).T
    factor, out = Factor(weight), torch.empty(N, S)
    assert factor.times(rows, out=out) is out
    for product in (factor.times(rows), out):
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-6)
    gradient, total = random(N, S, seed=3), random(S, H, seed=4)
    expected = exact(total) + exact(gradient).T @ exact(rows)
    add_product(total, gradient, rows)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wide", "dtype"), [(H, torch.float32), (2, torch.float64), (2, torch.bfloat16)], ids=str
)
def test_narrow_matrices_and_other_precisions_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch, wide: int, dtype: torch.dtype
) -> None:
    use_onednn(monkeypatch, True, wide)
    monkeypatch.setattr(products, "_prepared", None)
    weight, rows = random(S, H, seed=1).to(dtype), random(N, H, seed=2).to(dtype)
    assert torch.equal(Factor(weight).times(rows), rows @ weight.T)
    add_product(torch.zeros(S, H, dtype=dtype), random(N, S, seed=3).to(dtype), rows)


def test_grids_give_the_same_through_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, of an update that is read by nodes of both kinds."""
    results = []
    for wanted in (False, True):
        use_onednn(monkeypatch, wanted)
        inputs = [random(2, N, H, seed=1), random(1, S, H, seed=2), random(H, H, seed=3)]
        inputs += [random(2 * S, H, seed=4), random(1, S, S, seed=5), random(2, N, S, seed=6)]
        left, right, weight, reader, column_term, row_term = (x.requires_grad_() for x in inputs)
        edges = update_grid(torch.zeros(1, N, S, H), Pair(left, right), weight, torch.ones(H))
        weights = torch.full((1, S), 1 / S), torch.full((2, N), 1 / N)
        read = read_grid(edges, reader, column_term, weights[0], row_term, weights[1])
        assert read.to_columns is not None
        outputs = [read.to_rows, read.to_columns]
        gradients = torch.autograd.grad(sum(one.square().sum() for one in outputs), inputs)
        results.append([*(one.detach() for one in outputs), *gradients])
    for mkl, onednn in zip(*results, strict=True):
        torch.testing.assert_close(onednn, mkl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_the_kernel_names_the_vendor(tmp_path: Path, vendor: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert is_intel(tmp_path) == (vendor == "GenuineIntel")
