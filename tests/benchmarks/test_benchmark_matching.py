"""benchmarks.matching: PyTorch Geometric's network equals ours, and operations are counted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    # PyTorch Geometric calls torch.jit, which is deprecated, while it is imported.
    warnings.filterwarnings("ignore", r"`torch\.jit")
    pytest.importorskip(
        "torch_geometric", reason="PyTorch Geometric is not installed (pip install -e .[dev])"
    )

from benchmarks.networks.costs import product_operations
from benchmarks.networks.geometric import (
    LABELS,
    MATCHING,
    NEAR,
    graph_image_logits,
    make_graph,
)
from benchmarks.networks.sides import (
    GRADIENTS_LIMIT,
    SCORES_LIMIT,
    Size,
    largest_differences,
    make_inputs,
    our_side,
    require_close,
    require_equal,
    their_side,
)
from pipeline.settings import GmMlicSettings, variant_changes
from pipeline.settings.heads import HEADS

SMALL = Size(3, 4, 5, feature_size=8, vector_size=6, latent_size=16)
GRAPHS = (*HEADS["gm-mlic"].variants, *HEADS["gm-mlic"].further)


def small_settings(variant: str = "full", **changes: Any) -> GmMlicSettings:
    own = variant_changes(variant)["network"]
    return GmMlicSettings(**{"latent_size": 16, "neighbors": 2, **own, **changes})


@pytest.mark.parametrize("variant", GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_networks_are_equal(variant: str, dtype: torch.dtype) -> None:
    settings = small_settings(variant)
    scores, gradients = largest_differences(SMALL, dtype, settings, padding=3)
    assert scores <= SCORES_LIMIT[dtype]
    if dtype is torch.float64:
        assert gradients <= GRADIENTS_LIMIT


@pytest.mark.parametrize(
    "changes",
    [
        {"label_neighbors": 2},
        {"modules": 3},
        {"modules": 1},
        {"neighbors": 9},
        {"node_norm": False},
    ],
    ids=str,
)
def test_networks_are_equal_with_other_settings(changes: dict[str, Any]) -> None:
    scores, gradients = largest_differences(
        SMALL, torch.float64, small_settings(**changes), padding=1
    )
    assert max(scores, gradients) <= GRADIENTS_LIMIT


def test_networks_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES_LIMIT, torch.float32, 0.0)
    with pytest.raises(SystemExit, match="not equal"):
        require_equal(SMALL)


def test_edges_by_hand() -> None:
    """Two images of two regions, of which the last is padding, and three labels."""
    inputs = make_inputs(Size(2, 2, 3, feature_size=8, vector_size=6), padding=1)
    graph = make_graph(inputs.batch, inputs.labels.vectors, GmMlicSettings(label_neighbors=None))
    assert len(graph["instance"].x) == 3
    assert len(graph["label"].x) == 6
    assert sorted(graph[NEAR].edge_index.T.tolist()) == [[0, 1], [1, 0]]
    one = [[a, b] for a in range(3) for b in range(3) if a != b]
    assert sorted(graph[LABELS].edge_index.T.tolist()) == one + [[a + 3, b + 3] for a, b in one]
    matching = [[label, instance] for instance in (0, 1) for label in range(3)]
    assert graph[MATCHING].edge_index.T.tolist() == [*matching, [3, 2], [4, 2], [5, 2]]
    logits = torch.tensor([1.0, -2.0, 3.0, 0.0, -1.0, 4.0, -7.0, -8.0, 9.0])
    assert graph_image_logits(logits, graph).tolist() == [[1.0, -1.0, 4.0], [-7.0, -8.0, 9.0]]


def test_a_step_updates_every_parameter_of_both_networks() -> None:
    inputs = make_inputs(SMALL)
    for make_side in (our_side, their_side):
        side = make_side(SMALL, inputs)
        first = next(side.network.parameters()).clone()
        side.train()
        assert not torch.equal(next(side.network.parameters()), first)
        for name, parameter in side.network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_operations_of_products_by_hand() -> None:
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    batch = torch.ones(2, 3, 5)

    def work() -> None:
        (a @ b).sum().backward()  # forward, and the gradient of a
        torch.zeros(3, 7).addmm_(a.detach(), b)
        torch.einsum("bnk,km->bnm", batch, b)
        torch.zeros(2, 3, 7).baddbmm_(batch, b.expand(2, -1, -1))

    def by_onednn() -> None:
        torch.nn.functional.linear(a.detach().to_mkldnn(), b.T.contiguous().to_mkldnn())

    assert product_operations(work) == 2 * 3 * 5 * 7 * (2 + 1 + 2 + 2)
    if torch.backends.mkldnn.is_available():
        assert product_operations(by_onednn) == 2 * 3 * 5 * 7


def test_scores_in_bfloat16_that_are_far_from_float32_are_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = [make_side(SMALL, make_inputs(SMALL)) for make_side in (our_side, their_side)]
    require_close(sides)
    monkeypatch.setattr("benchmarks.networks.sides.HALF_LIMIT", 1e-6)
    with pytest.raises(SystemExit, match="bfloat16"):
        require_close(sides)
