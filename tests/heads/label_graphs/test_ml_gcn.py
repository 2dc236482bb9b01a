"""ML-GCN against its equations, and on a problem that needs its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_loops import check_against, linear, real_regions
from tiny import HIDDEN, C, W, assert_same, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.label_graphs.ml_gcn import MlGcn, label_graph


def graph_by_hand(conditional: Tensor, threshold: float, share: float) -> list[list[float]]:
    labels = range(len(conditional))
    kept = [[float(conditional[i, j] >= threshold and i != j) for j in labels] for i in labels]
    a = [[0.0 for _ in labels] for _ in labels]
    for i in labels:
        for j in labels:
            column = sum(kept[k][j] for k in labels)
            if i == j:
                a[i][j] = 1.0
            elif column:
                a[i][j] = share / (1 - share) * kept[i][j] / column
    d = [sum(a[i]) for i in labels]
    return [[a[j][i] / (d[i] * d[j]) ** 0.5 for j in labels] for i in labels]


def convolved(graph: list[list[float]], nodes: list[Tensor]) -> list[Tensor]:
    return [
        torch.stack([weight * node for weight, node in zip(row, nodes, strict=True)]).sum(dim=0)
        for row in graph
    ]


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, MlGcn)
    assert labels.conditional is not None
    one = head.settings
    graph = [[float(i == j) for j in range(C)] for i in range(C)]
    if one.graph == "statistics":
        graph = graph_by_hand(labels.conditional, one.threshold, one.share)
    first, second = head.first.weight, head.second.weight
    nodes = []
    for c in range(C):
        vector = labels.vectors[c] * head.inputs.vector_scale
        nodes.append(torch.stack([first[h] @ vector for h in range(HIDDEN)]))
    hidden = [torch.where(node > 0, node, 0.2 * node) for node in convolved(graph, nodes)]
    classifiers = convolved(graph, [second @ node for node in hidden])
    regions = real_regions(head, batch, image)
    if head.projection is not None:
        regions = [linear(head.projection, x).clamp(min=0) for x in regions]
    size = len(regions[0])
    best = torch.stack([max((x[d] for x in regions), key=Tensor.item) for d in range(size)])
    said = torch.stack(
        [torch.stack([h @ x / size**0.5 for h in classifiers]) + head.bias for x in regions]
    )
    if one.of == "regions":
        return torch.stack([max(said[:, c], key=Tensor.item) for c in range(C)]), said
    return torch.stack([h @ best / size**0.5 for h in classifiers]) + head.bias, said


@pytest.mark.parametrize("variant", ["ml-gcn", "ml-gcn-identity", "ml-gcn-regions"])
def test_ml_gcn_equals_plain_loops(variant: str) -> None:
    head, labels = make_head(variant), make_label_set()
    assert labels.conditional is not None
    assert (labels.conditional >= 0.4).any()
    check_against(head, make_batch(4), labels, by_hand)


@pytest.mark.parametrize("threshold", [0.1, 0.4, 1.0])
def test_the_graph_equals_plain_loops(threshold: float) -> None:
    conditional = make_label_set(5).conditional
    assert conditional is not None
    expected = graph_by_hand(conditional, threshold, 0.3)
    assert_same(
        label_graph(conditional, threshold, 0.3), torch.tensor(expected, dtype=torch.float64)
    )


def test_without_edges_the_graph_is_the_identity() -> None:
    assert torch.equal(label_graph(torch.zeros(3, 3), 0.0, 0.2), torch.eye(3))


def test_the_graph_of_two_labels() -> None:
    # Every image of label 0 has label 1, too, so with a share of a half A = [[1, 1], [0, 1]], whose
    # rows have the sums 2 and 1. Label 1 reads label 0.
    graph = label_graph(torch.tensor([[0.0, 1.0], [0.1, 0.0]]), 0.4, 0.5)
    assert_same(graph, torch.tensor([[1 / 2, 0], [1 / 2**0.5, 1]]), 1e-6)


def test_a_label_that_was_never_seen_follows_the_one_that_it_comes_with() -> None:
    # All values of label 2 are ignored in training, so that only the graph can tell its classifier.
    batch, truth, _ = kinds_problem()
    seen = truth.clone()
    seen[:, 2] = -1
    conditional = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    known = make_label_set(dtype=torch.float32)
    labels = LabelSet(torch.eye(C, W), known.ratio, conditional)
    found = {}
    for variant in ("ml-gcn", "ml-gcn-identity"):
        head = make_head(variant, dtype=torch.float32, label_set=labels, share=0.5)
        fit(head, batch, labels, seen)
        with torch.no_grad():
            scores = head(batch, labels).image
        found[variant] = float(torch.corrcoef(scores[:, [0, 2]].T)[0, 1])
    assert found["ml-gcn"] > 0.9
    assert found["ml-gcn-identity"] < 0.6


@pytest.mark.parametrize("of", ["image", "regions"])
def test_the_region_that_shows_a_label_wins_it(of: str) -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    # Some starts among few labels end in a local optimum of the max over regions.
    start: dict[str, Any] = {"projection_size": None, "seed": 2}
    head = make_head("ml-gcn-identity", dtype=torch.float32, of=of, **start)
    fit(head, batch, labels, truth)
    assert right_regions(head, batch, labels, kinds) > 0.95


def test_another_order_of_labels_is_only_that() -> None:
    head, batch, labels = make_head("ml-gcn"), make_batch(3), make_label_set()
    assert isinstance(head, MlGcn)
    assert labels.conditional is not None
    order = torch.tensor([2, 0, 1])
    expected = head(batch, labels).image[:, order]
    head.bias.data = head.bias.data[order]
    conditional = labels.conditional[order][:, order]
    other = LabelSet(labels.vectors[order], labels.ratio[order], conditional)
    assert_same(head(batch, other).image, expected)
