"""ADD-GCN against its equations, and on a problem that needs its graphs."""

from __future__ import annotations

from dataclasses import replace

import torch
from plain_loops import check_against, real_regions
from tiny import HIDDEN, C, D, M, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, ranking, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.label_graphs.add_gcn import AddGcn


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def total(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0])


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, AddGcn)
    regions = real_regions(head, batch, image)
    fc, transform, static, dynamic = head.of_regions, head.transform, head.static, head.dynamic
    said = torch.stack([fc.weight @ x + fc.bias for x in regions])
    v = []
    for c in range(C):
        shares = [1 / (1 + torch.exp(-logit)) for logit in said[:, c]]
        moved = [transform.weight @ x + transform.bias for x in regions]
        v.append(total([share * x for share, x in zip(shares, moved, strict=True)]) / total(shares))
    changed = []
    for c in range(C):
        mixed = leaky(total([static.graph[c, k] * v[k] for k in range(C)]))
        changed.append(v[c] + leaky(static.layer.weight @ mixed + static.layer.bias))
    mean = dynamic.of_image.weight @ (total(changed) / C) + dynamic.of_image.bias
    deviation = ((mean - mean.mean()) ** 2).sum() / HIDDEN
    g = (mean - mean.mean()) / torch.sqrt(deviation + 1e-5)
    g = leaky(g * dynamic.norm.weight + dynamic.norm.bias)
    logits = []
    for n in range(C):
        read = []
        for c in range(C):
            edge = dynamic.edges_of_image.weight[c] @ g + dynamic.edges_of_image.bias[c]
            edge = torch.sigmoid(edge + dynamic.edges_of_nodes.weight[c] @ changed[n])
            read.append(edge * changed[c] / C)
        z = v[n] + leaky(dynamic.layer.weight @ leaky(total(read)) + dynamic.layer.bias)
        of_node = head.classifiers.weight[n] @ z + head.classifiers.bias[n]
        logits.append((max(said[:, n], key=Tensor.item) + of_node) / 2)
    return torch.stack(logits), said


def test_add_gcn_equals_plain_loops() -> None:
    check_against(make_head("add-gcn"), make_batch(4), make_label_set(), by_hand)


def test_every_image_has_a_graph_of_its_own() -> None:
    head = make_head("add-gcn")
    assert isinstance(head, AddGcn)
    nodes = torch.randn(2, C, HIDDEN, dtype=torch.float64)
    edges = head.dynamic.edges(nodes)
    assert edges.shape == (2, C, C)
    assert ((edges > 0) & (edges < 1)).all()
    assert (edges[0] - edges[1]).abs().max() > 0.01


def test_a_label_can_depend_on_two_others() -> None:
    # Label 2 means that exactly one of the kinds 0 and 1 is there, each in a region of its own. No
    # maximum over what single regions say can tell that.
    generator = torch.Generator().manual_seed(6)
    shown = torch.randint(0, 2, (64, 2), generator=generator)
    features = torch.zeros(64, M, D)
    features[:, 0, 0], features[:, 1, 1] = 3 * shown[:, 0], 3 * shown[:, 1]
    batch = make_batch(64, full=True, dtype=torch.float32)
    batch = replace(batch, features=features + 0.2 * batch.features)
    truth = torch.cat([shown, shown.sum(dim=1, keepdim=True) == 1], dim=1).long()
    labels = make_label_set(dtype=torch.float32)
    found = {}
    for variant in ("add-gcn", "max-pool"):
        head = make_head(variant, dtype=torch.float32)
        fit(head, batch, labels, truth, steps=150)
        found[variant] = ranking(head, batch, labels, truth)
    assert found["add-gcn"] > 0.98
    assert found["max-pool"] < 0.95


def test_the_region_that_shows_a_label_wins_it() -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    # From some starts, the graph tells a label that the regions' own logits then need not tell.
    head = make_head("add-gcn", dtype=torch.float32, seed=1)
    fit(head, batch, labels, truth, steps=100)
    assert right_regions(head, batch, labels, kinds) > 0.9
