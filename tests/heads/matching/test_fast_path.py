"""The matching network against the edge-by-edge reference: scores, gradients, label nodes.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import VARIANTS, H, gradients, net, score, vectors
from reference import build_graph, convolve, decode, encode, reference_logits
from tiny import C, M, assert_same, make_batch
from torch import Tensor, nn

from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching.convolution import Convolution
from pipeline.heads.matching.network import GmMlic

SHAPES: dict[str, dict[str, Any]] = {
    "one image": {"counts": [4]},
    "padding": {"counts": [4, 2], "instances": 6},
    "one region": {"counts": [1, 4]},
    "only one region": {"counts": [1, 1, 1]},
    "M = 1": {"counts": [1, 1], "instances": 1},
    "fewer than neighbours": {"counts": [2, 3, 4, 1], "neighbors": 5},
    "one neighbour": {"counts": [4, 3, 2, 4], "neighbors": 1},
    "C = 1": {"labels": 1},
    "C = 1, sparse": {"labels": 1, "label_neighbors": 2},
    "C = 2": {"labels": 2, "label_neighbors": 5},
    "C = 6, sparse": {"labels": 6, "label_neighbors": 2, "modules": 3},
}
WITHOUT_A_MESSAGE = ("only one region", "M = 1", "C = 1", "C = 1, sparse")
"""Shapes without any edge of some kind, so that its MLPs never run in the reference."""


def case(
    images: int | None = None,
    *,
    counts: list[int] | None = None,
    instances: int = M,
    labels: int = C,
    variant: str,
    seed: int = 0,
    **changes: Any,
) -> tuple[GmMlic, RegionBatch, Tensor]:
    """Make a network, a batch and label vectors."""
    images = len(counts) if counts else images or 3
    network = net(variant, labels=labels, seed=seed, **changes)
    batch = make_batch(images, instances, counts=counts, seed=seed)
    return network, batch, vectors(labels, seed=seed)


def check(network: GmMlic, batch: RegionBatch, words: Tensor, unused: bool = False) -> None:
    """Compare scores, in float64 and float32, and the gradient of every parameter.

    ``unused`` allows parameters without a gradient, if no edge of the batch reaches them.
    """
    output, expected = score(network, batch, words), reference_logits(network, batch, words)
    assert_same(output.regions.detach(), expected.detach(), 1e-9)
    best = expected.max(dim=1).values  # (14)
    assert_same(output.image.detach(), best.detach(), 1e-9)
    images, labels = len(batch.mask), len(words)
    truth = torch.tensor([1, 0, -1, 1, 0]).repeat(images * labels)[: images * labels]
    truth = truth.reshape(images, labels)
    ratio = torch.linspace(0.1, 0.7, labels, dtype=torch.float64)
    fast = gradients(network, output.image, truth, ratio)
    slow = gradients(network, best, truth, ratio)
    assert fast.keys() == slow.keys() == dict(network.named_parameters()).keys()
    for name, gradient in slow.items():
        actual = fast[name]
        if gradient is None:
            assert unused, f"{name} has no gradient"
            assert actual is None or not actual.any(), name
        else:
            assert actual is not None, name
            assert unused or gradient.any(), f"{name} is dead, so this case sees no mistake in it"
            assert_same(actual, gradient, 1e-9)
    with torch.no_grad():
        network, batch = network.float(), batch.to(torch.device("cpu"), torch.float32)
        output = score(network, batch, words.float())
        assert output.image.dtype == output.regions.dtype == torch.float32
        assert_same(output.regions, expected.float(), 1e-4)


# Every pair of values of two settings is in some case.
@pytest.mark.parametrize(
    ("modules", "node_norm", "label_neighbors"),
    [
        (1, True, None),
        (1, False, 1),
        (2, True, 1),
        (2, False, None),
        (3, True, None),
        (3, False, 1),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_network_equals_reference(
    variant: str, modules: int, node_norm: bool, label_neighbors: int | None
) -> None:
    network, batch, words = case(
        variant=variant, modules=modules, node_norm=node_norm, label_neighbors=label_neighbors
    )
    check(network, batch, words)


@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_network_equals_reference(variant: str) -> None:
    network, batch, words = case(variant=variant, modules=3, residual=True)
    assert [type(module.instance_skip) for module in network.convolutions] == [
        nn.Identity,
        nn.Identity,
        nn.Linear,
    ]
    check(network, batch, words)


@torch.no_grad()
def test_dropout_spares_what_residual_nodes_keep() -> None:
    """It falls on the updates: if it drops all of these, a node keeps its state."""
    network, batch, words = case(variant="full", residual=True, dropout=0.5, modules=1)
    assert network.encoder.dropout.p == 0
    module = network.convolutions[0]
    module.dropout.p = 1.0
    structure = network._structures.build(batch, words, True, True)
    features, boxes = network.inputs.features(batch.features), network.inputs.boxes(batch.boxes)
    graph = network.encoder(features, boxes, network.inputs.vectors(words), structure)
    kept = module.instance_norm(module.instance_skip(graph.instances))
    assert_same(module.train()(graph, structure).instances, kept, 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_network_equals_reference_in_every_shape(variant: str, shape: str) -> None:
    network, batch, words = case(variant=variant, seed=3, **SHAPES[shape])
    check(network, batch, words, unused=shape in WITHOUT_A_MESSAGE)


def reference_without(
    network: GmMlic, batch: RegionBatch, words: Tensor, *kinds: str
) -> tuple[Tensor, Tensor]:
    """Compute (B, M, C) logits and (B, C, H) label nodes, edge by edge, without kinds of edges."""
    logits = torch.full((*batch.mask.shape, len(words)), -math.inf, dtype=words.dtype)
    nodes = []
    for image in range(len(batch.mask)):
        graph = build_graph(network, batch, image, words)
        for kind in kinds:
            edges = getattr(graph, kind)
            assert edges or kind == "label_edges" or batch.mask[image].sum() == 1
            edges.clear()
        graph = encode(network, graph)
        for module in network.convolutions:
            assert isinstance(module, Convolution)
            graph = convolve(module, graph)
        for (i, j), logit in decode(network, graph).items():
            logits[image, i, j] = logit
        nodes.append(torch.stack([graph.labels[j] for j in range(len(words))]))
    return logits, torch.stack(nodes)


@pytest.mark.parametrize(
    ("modules", "labels", "label_neighbors"), [(1, 6, 2), (1, C, None), (2, 6, 2), (2, 1, None)]
)
@pytest.mark.parametrize(
    ("variant", "graphs"),
    [
        ("full", ("label",)),
        ("full", ("instance",)),
        ("full", ("label", "instance")),
        ("without-label-graph", ("instance",)),
        ("without-instance-graph", ("label",)),
        ("without-matching-edges", ("label", "instance")),
        ("stateless-matching-edges", ("label", "instance")),
    ],
)
@torch.no_grad()
def test_taking_a_graph_away_equals_reference_without_its_edges(
    variant: str, graphs: tuple[str, ...], modules: int, labels: int, label_neighbors: int | None
) -> None:
    network, batch, words = case(
        variant=variant, labels=labels, modules=modules, label_neighbors=label_neighbors
    )
    without: Any = {f"{graph}_graph": False for graph in graphs}
    logits = score(network, batch, words, **without).regions
    kinds = [f"{graph}_edges" for graph in graphs]
    assert_same(logits, reference_without(network, batch, words, *kinds)[0], 1e-9)
    change = (logits - score(network, batch, words).regions).nan_to_num().abs().amax(dim=(1, 2))
    had_edges = torch.full((len(change),), "label" in graphs and labels > 1)
    if "instance" in graphs:
        had_edges |= batch.mask.sum(dim=1) > 1
    assert torch.equal(change > 1e-6, had_edges)
    assert not change[~had_edges].any()


@pytest.mark.parametrize("label_neighbors", [None, 1])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_label_nodes_equal_reference(variant: str, label_neighbors: int | None) -> None:
    network, batch, words = case(variant=variant, label_neighbors=label_neighbors)
    nodes = network.label_nodes(batch, words)
    assert nodes.shape == (3, C, H // 2)
    assert_same(nodes, reference_without(network, batch, words)[1], 1e-9)
    differ = (nodes[0] - nodes[1]).abs().max().item() > 1e-3
    assert differ == (variant != "without-matching-edges")


def test_padding_has_no_score() -> None:
    network, batch, words = case(variant="full", counts=[2, 4])
    for scores in (score(network, batch, words).regions, reference_logits(network, batch, words)):
        assert scores.shape == (2, M, C)
        assert torch.equal(scores == -torch.inf, ~batch.mask[..., None].expand(2, M, C))


@pytest.mark.parametrize("where", ["input_dropout", "dropout", "decoder_dropout"])
def test_dropout_is_off_in_eval_mode_and_random_in_training(where: str) -> None:
    network, batch, words = case(variant="full", **{where: 0.5})
    network.train()
    outputs = [score(network, batch, words).regions for _ in range(2)]
    assert not torch.equal(*outputs)
    check(network.eval(), batch, words)


@pytest.mark.parametrize("label_neighbors", [None, 2])
@torch.no_grad()
def test_one_network_takes_any_number_of_labels(label_neighbors: int | None) -> None:
    network = net(label_neighbors=label_neighbors)
    for labels in (6, 1, 3):
        batch, words = make_batch(seed=labels), vectors(labels, seed=labels)
        output = score(network, batch, words)
        assert_same(output.regions, reference_logits(network, batch, words), 1e-9)


@pytest.mark.parametrize("label_neighbors", [None, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_compiled_form_equals_reference(
    variant: str, label_neighbors: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `export` traces: grids of edges in their plain form."""
    network, batch, words = case(variant=variant, labels=5, label_neighbors=label_neighbors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    output = score(network, batch, words)
    assert_same(output.regions, reference_logits(network, batch, words), 1e-9)
