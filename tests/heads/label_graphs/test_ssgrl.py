"""SSGRL against its equations, and on a problem that needs its graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_loops import check_against, real_regions
from tiny import HIDDEN, C, D, M, W, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.label_graphs.ssgrl import GatedGraph, Ssgrl


def gated(graph: GatedGraph, nodes: list[Tensor], conditional: Tensor) -> list[Tensor]:
    """One pass over the graph."""
    blocks = graph.messages.weight.split(HIDDEN), graph.messages.bias.split(HIDDEN)
    (w_z, w_r, w_h), (b_z, b_r, b_h) = blocks
    u_z, u_r = graph.gates.weight.split(HIDDEN)
    after = []
    for i in range(C):
        given = torch.zeros(HIDDEN, dtype=torch.float64)
        taken = torch.zeros(HIDDEN, dtype=torch.float64)
        for j in range(C):
            given = given + conditional[i, j] * nodes[j]
            taken = taken + conditional[j, i] * nodes[j]
        v, h = torch.cat([given, taken]), nodes[i]
        z = torch.sigmoid(w_z @ v + b_z + u_z @ h)
        r = torch.sigmoid(w_r @ v + b_r + u_r @ h)
        candidate = torch.tanh(w_h @ v + b_h + graph.candidate.weight @ (r * h))
        after.append((1 - z) * h + z * candidate)
    return after


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Ssgrl)
    assert labels.conditional is not None
    project = head.projection
    regions = [project.weight @ x + project.bias for x in real_regions(head, batch, image)]
    said, read = [], []
    for c in range(C):
        key = head.of_vectors.weight @ (labels.vectors[c] * head.inputs.vector_scale)
        scores = [
            (head.query.weight[0] * torch.tanh((head.of_regions.weight @ x) * key)).sum()
            for x in regions
        ]
        shares = [torch.exp(score) for score in scores]
        total = sum(shares[1:], shares[0])
        said.append(torch.stack([share / total for share in shares]))
        parts = [share / total * x for share, x in zip(shares, regions, strict=True)]
        read.append(sum(parts[1:], parts[0]))
    nodes = read
    if head.propagation is not None:
        for _ in range(3):
            nodes = gated(head.propagation, nodes, labels.conditional)
        nodes = [torch.cat(pair) for pair in zip(nodes, read, strict=True)]
    logits = []
    for c in range(C):
        out = torch.tanh(head.output.weight @ nodes[c] + head.output.bias)
        logits.append(head.classifiers.weight[c] @ out + head.classifiers.bias[c])
    return torch.stack(logits), torch.stack(said, dim=1)


@pytest.mark.parametrize("variant", ["ssgrl", "ssgrl-without-graph"])
def test_ssgrl_equals_plain_loops(variant: str) -> None:
    check_against(make_head(variant), make_batch(4), make_label_set(), by_hand)


def test_the_graph_hands_on_what_another_label_attended_to() -> None:
    # A region that is marked in component 1 shows label 0 if its component 0 is positive; those of
    # other regions mislead. Label 1 comes with label 0, but its vector is 0, so that it reads all
    # regions equally: only the graph can tell it what label 0 found.
    generator = torch.Generator().manual_seed(4)
    sign = 2 * torch.randint(0, 2, (192,), generator=generator) - 1.0
    features = torch.zeros(192, M, D)
    features[..., 0] = 2 * torch.randn(192, M, generator=generator)
    features[:, 0, 0] = 2 * sign
    features[:, 0, 1] = 3
    batch = replace(make_batch(192, full=True, dtype=torch.float32), features=features)
    truth = torch.stack([sign > 0] * 2, dim=1).long()
    vectors = torch.zeros(2, W)
    vectors[0] = 1
    labels = LabelSet(vectors, torch.full((2,), 0.5), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    train, test = batch.each(lambda x: x[:96]), batch.each(lambda x: x[96:])
    found = {}
    for variant in ("ssgrl", "ssgrl-without-graph"):
        head = make_head(variant, labels=2, label_set=labels, dtype=torch.float32)
        fit(head, train, labels, truth[:96], steps=120)
        with torch.no_grad():
            scores = head(test, labels).image
        found[variant] = [area(scores[:, c], truth[96:, c]) for c in range(2)]
    assert found["ssgrl"][0] > 0.9
    assert found["ssgrl-without-graph"][0] > 0.9
    assert found["ssgrl"][1] > 0.9
    assert found["ssgrl-without-graph"][1] < 0.8


def area(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve."""
    pairs = scores[truth == 1][:, None] - scores[truth == 0]
    return float((pairs > 0).double().mean())
