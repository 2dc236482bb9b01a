"""pipeline.matching: the fast path against the edge-by-edge reference, numbers by hand, properties.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from builders import make_instances
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    Graph,
    build_graph,
    convolve,
    decode,
    encode,
    nearest_instances,
    nearest_labels,
    reference_logits,
)
from torch import Tensor, nn

from pipeline.matching.graphs import InstanceBatch, instance_neighbors, label_neighbors
from pipeline.matching.loss import matching_loss
from pipeline.matching.network import (
    Convolution,
    Inputs,
    MatchingNetwork,
    MaxPoolNetwork,
    build_network,
    image_logits,
)
from pipeline.settings import VARIANTS as CHANGES
from pipeline.settings import NetworkSettings

D, W, H, M, C = 6, 5, 16, 4, 3  # with a smaller H whole layers die, and hide mistakes
VARIANTS: tuple[str, ...] = tuple(CHANGES)
GRAPHS: tuple[str, ...] = tuple(v for v in VARIANTS if v != "max-pool")
"""The variants that the reference computes."""

Network = MatchingNetwork | MaxPoolNetwork
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def network_settings(variant: str, **changes: Any) -> NetworkSettings:
    own: Any = CHANGES[variant].get("network", {})
    return NetworkSettings(**{**own, **changes})


def net(
    variant: str = "full",
    *,
    labels: int = C,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Network:
    """A tiny network in which no parameter and no statistic has a value that hides its misuse."""
    config = network_settings(variant, **{"latent_size": H, "neighbors": 2, **changes})
    network = build_network(D, labels, W, config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[1] / 1.5))
            else:
                parameter.add_(0.4 * noise)
        for name, buffer in network.inputs.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
            buffer.copy_(0.3 * noise if name.endswith("mean") else 0.7 + noise.abs())
    return network


def matching_net(variant: str = "full", **changes: Any) -> MatchingNetwork:
    network = net(variant, **changes)
    assert isinstance(network, MatchingNetwork)
    return network


def batch64(images: int = 3, **changes: Any) -> InstanceBatch:
    return make_instances(
        images, feature_size=D, dtype=torch.float64, **{"instances": M, **changes}
    )


def vectors(labels: int = C, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(C, W)"""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(labels, W, generator=generator, dtype=torch.float64).to(dtype)


def rows(batch: InstanceBatch, images: Any, places: Any) -> InstanceBatch:
    """The batch indexed by images and, in each, by places."""
    return InstanceBatch(
        batch.features[images][:, places],
        batch.boxes[images][:, places],
        batch.scores[images][:, places],
        batch.classes[images][:, places],
        batch.mask[images][:, places],
    )


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal shape and infinities, and finite values within the tolerance of the largest one."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[~finite], expected[~finite])
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    difference = (actual[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0
    assert difference <= tolerance * scale + 1e-15, f"{difference} of {scale}"


# The fast path is the reference ------------------------------------------------------------------

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
"""Shapes in which some kind of edge does not exist, so that its MLPs never run in the reference."""


def case(
    images: int | None = None,
    *,
    counts: list[int] | None = None,
    instances: int = M,
    labels: int = C,
    variant: str,
    seed: int = 0,
    **changes: Any,
) -> tuple[MatchingNetwork, InstanceBatch, Tensor]:
    images = len(counts) if counts else images or 3
    network = matching_net(variant, labels=labels, seed=seed, **changes)
    batch = batch64(images, counts=counts, instances=instances, seed=seed)
    return network, batch, vectors(labels, seed=seed)


def check_scores(network: MatchingNetwork, batch: InstanceBatch, words: Tensor) -> None:
    with torch.no_grad():
        assert_same(network(batch, words), reference_logits(network, batch, words), 1e-9)
        network, batch = network.float(), batch.to(torch.device("cpu"), torch.float32)
        words = words.float()
        scores = network(batch, words)
        assert scores.dtype == torch.float32
        assert_same(scores, reference_logits(network, batch, words), 1e-4)


def gradients(
    network: Network, logits: Tensor, truth: Tensor, ratio: Tensor
) -> dict[str, Tensor | None]:
    """Of the loss that training uses, with class balance and ignored labels."""
    loss = matching_loss(image_logits(logits)[0], truth, ratio, beta=0.4)
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def check_gradients(
    network: MatchingNetwork, batch: InstanceBatch, words: Tensor, unused: bool
) -> None:
    """Of every parameter; ``unused`` allows those to be missing that no edge of the batch runs."""
    images, labels = len(batch.mask), len(words)
    truth = torch.tensor([1, 0, -1, 1, 0]).repeat(images * labels)[: images * labels]
    truth = truth.reshape(images, labels)
    ratio = torch.linspace(0.1, 0.7, labels, dtype=torch.float64)
    fast = gradients(network, network(batch, words), truth, ratio)
    slow = gradients(network, reference_logits(network, batch, words), truth, ratio)
    assert fast.keys() == slow.keys() == dict(network.named_parameters()).keys()
    for name, expected in slow.items():
        actual = fast[name]
        if expected is None:
            assert unused, f"{name} has no gradient"
            assert actual is None or not actual.any(), name
        else:
            assert actual is not None, name
            assert unused or expected.any(), f"{name} is dead, so this case sees no mistake in it"
            assert_same(actual, expected, 1e-9)


@pytest.mark.parametrize("label_neighbors", [None, 1])
@pytest.mark.parametrize("node_norm", [True, False])
@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("variant", GRAPHS)
def test_fast_path_is_the_reference(
    variant: str, modules: int, node_norm: bool, label_neighbors: int | None
) -> None:
    network, batch, words = case(
        variant=variant, modules=modules, node_norm=node_norm, label_neighbors=label_neighbors
    )
    check_gradients(network, batch, words, unused=False)
    check_scores(network, batch, words)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", GRAPHS)
def test_fast_path_is_the_reference_in_every_shape(variant: str, shape: str) -> None:
    network, batch, words = case(variant=variant, seed=3, **SHAPES[shape])
    check_gradients(network, batch, words, unused=shape in WITHOUT_A_MESSAGE)
    check_scores(network, batch, words)


def reference_without(
    network: MatchingNetwork, batch: InstanceBatch, words: Tensor, *kinds: str
) -> tuple[Tensor, Tensor]:
    """(B, M, C) logits and (B, C, H) label nodes, edge by edge, of graphs without some edges."""
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


@pytest.mark.parametrize(("labels", "label_neighbors"), [(C, None), (6, 2), (1, None)])
@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize(
    ("variant", "graphs"),
    [
        ("full", ("label",)),
        ("full", ("instance",)),
        ("full", ("label", "instance")),
        ("without-label-graph", ("instance",)),
        ("without-instance-graph", ("label",)),
        ("without-matching-edges", ("label", "instance")),
    ],
)
@torch.no_grad()
def test_a_graph_taken_away_is_the_reference_without_its_edges(
    variant: str, graphs: tuple[str, ...], modules: int, labels: int, label_neighbors: int | None
) -> None:
    network, batch, words = case(
        variant=variant, labels=labels, modules=modules, label_neighbors=label_neighbors
    )
    without: Any = {f"{graph}_graph": False for graph in graphs}
    logits = network(batch, words, **without)
    kinds = [f"{graph}_edges" for graph in graphs]
    assert_same(logits, reference_without(network, batch, words, *kinds)[0], 1e-9)
    change = (logits - network(batch, words)).nan_to_num().abs().amax(dim=(1, 2))
    had_edges = torch.full((len(change),), "label" in graphs and labels > 1)
    if "instance" in graphs:
        had_edges |= batch.mask.sum(dim=1) > 1
    assert torch.equal(change > 1e-6, had_edges)
    assert not change[~had_edges].any()


@pytest.mark.parametrize("label_neighbors", [None, 1])
@pytest.mark.parametrize("variant", GRAPHS)
@torch.no_grad()
def test_label_nodes_are_the_reference(variant: str, label_neighbors: int | None) -> None:
    network, batch, words = case(variant=variant, label_neighbors=label_neighbors)
    nodes = network.label_nodes(batch, words)
    assert nodes.shape == (3, C, H // 2)
    assert_same(nodes, reference_without(network, batch, words)[1], 1e-9)
    seen = (nodes[0] - nodes[1]).abs().max().item() > 1e-3
    assert seen == (variant != "without-matching-edges")


def test_reference_and_network_never_see_padding() -> None:
    network, batch, words = case(variant="full", counts=[2, 4])
    for scores in (network(batch, words), reference_logits(network, batch, words)):
        assert scores.shape == (2, M, C)
        assert torch.equal(scores == -torch.inf, ~batch.mask[..., None].expand(2, M, C))


@pytest.mark.parametrize("where", ["input_dropout", "dropout", "decoder_dropout"])
def test_dropout_is_off_in_eval_mode_and_random_in_training(where: str) -> None:
    network, batch, words = case(variant="full", **{where: 0.5})
    assert not torch.equal(network.train()(batch, words), network(batch, words))
    check_scores(network.eval(), batch, words)


# Numbers by hand ---------------------------------------------------------------------------------


def test_two_instances_and_two_labels_by_hand() -> None:
    """One module from size 2 to size 1. Each number is worked out below."""
    config = NetworkSettings(latent_size=2, modules=1, neighbors=1, node_norm=False)
    network = MatchingNetwork(1, 1, config).double()

    def put(layer: nn.Linear, weight: list[list[int]], bias: float = 0.0) -> None:
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.fill_(bias)

    module = network.convolutions[0]
    assert isinstance(module, Convolution)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        unit = [[1, 0], [0, 1]]
        # Encoder (4): v_i^o = (f_i, 0), v_j^l = (0, w_j), e_ij^l = (w_i, w_j), e_ij^m = (f_i, w_j),
        # and e_ij^o = (left of box i, right of box j).
        put(network.encode_instance.first, [[1], [0]])
        put(network.encode_instance.second, unit)
        put(network.encode_label.first, [[0], [1]])
        put(network.encode_label.second, unit)
        for mlp, weight in (
            (network.encode_instance_edge, [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0]]),
            (network.encode_label_edge, unit),
            (network.encode_matching_edge, unit),
        ):
            assert mlp is not None
            put(mlp.first, weight)
            put(mlp.second, unit)
        # Each mlp(x) = second * relu(first . x + bias) + bias, of the pieces that are commented.
        for mlp, first, first_bias, second, second_bias in (
            (module.instance_from_instance, [4, 10, 1, 0], 0, 1, 0),  # e^o, v^o
            (module.instance_from_label, [3, 0, 0, -1], 0, 1, 0),  # e^m, v^l
            (module.instance_node, [1, 0, 1, 2], -10, 1, 0),  # v^o, from instances, from labels
            (module.label_from_label, [1, 10, 0, 1], 0, 1, 0),  # e^l, v^l
            (module.label_from_instance, [1, -2, 1, 0], 0, 3, 1),  # e^m, v^o
            (module.label_node, [0, 1, 1, 10], 0, 1, 0),  # v^l, from labels, from instances
            (module.matching_edge_from_nodes, [10, 1], 0, 1, 0),  # v^o, v^l
            (module.matching_edge, [100, 1000, 1], 0, 1, 0),  # e^m, from nodes
            (network.decode, [1], -2000, -1, 0.5),  # e^m
        ):
            assert mlp is not None
            put(mlp.first, [first], first_bias)
            put(mlp.second, [[second]], second_bias)

    batch = InstanceBatch(
        features=torch.tensor([[[1.0], [3.0]]], dtype=torch.float64),
        boxes=torch.tensor([[[0.25, 0, 0.5, 1], [0.5, 0, 1, 1]]], dtype=torch.float64),
        scores=torch.tensor([[0.5, 0.5]], dtype=torch.float64),
        classes=torch.tensor([[1, 1]]),
        mask=torch.tensor([[True, True]]),
    )
    words = torch.tensor([[2.0], [5.0]], dtype=torch.float64)
    # (5)  instance 0 from 1: e^o = (0.25, 1),  v = (3, 0): 4*0.25 + 10*1   + 3 = 14
    #      instance 1 from 0: e^o = (0.5, 0.5), v = (1, 0): 4*0.5  + 10*0.5 + 1 = 8
    #      instance i from label j: relu(3 f_i - w_j)
    #        0: relu(3-2) = 1, relu(3-5) = 0, mean 0.5;  1: relu(9-2) = 7, relu(9-5) = 4, mean 5.5
    # (6)  v_0^o = 1 + 14 + 2*0.5 - 10 = 6;  v_1^o = 3 + 8 + 2*5.5 - 10 = 12
    # (7)  label 0 from 1: e^l = (2, 5), v = (0, 5): 2 + 10*5 + 5 = 57
    #      label 1 from 0: e^l = (5, 2), v = (0, 2): 5 + 10*2 + 2 = 27
    #      label j from instance i: 3 relu(f_i - 2 w_j + f_i) + 1
    #        0: relu(2-4) = 0, relu(6-4) = 2, mean 3*1 + 1 = 4;  1: both 0, mean 1
    # (8)  v_0^l = 2 + 57 + 10*4 = 99;  v_1^l = 5 + 27 + 10*1 = 42
    # (11) 10 v_i^o + v_j^l: 60 + 99 = 159, 60 + 42 = 102; 120 + 99 = 219, 120 + 42 = 162
    # (12) 100 f_i + 1000 w_j + that: 2259, 5202; 2519, 5462
    # (13) 0.5 - relu(that - 2000)
    expected = torch.tensor([[[-258.5, -3201.5], [-518.5, -3461.5]]], dtype=torch.float64)
    assert torch.equal(network(batch, words), expected)
    assert torch.equal(reference_logits(network, batch, words), expected)
    best, winners = image_logits(expected)
    assert best.tolist() == [[-258.5, -3201.5]]
    assert winners.tolist() == [[0, 0]]


def test_reference_graph_by_hand() -> None:
    """(1)-(3) of three instances in a row, the middle one nearest to both others."""
    network = matching_net(neighbors=1, label_neighbors=1)
    network.inputs = Inputs(D).double()
    batch = batch64(1, counts=[3])
    left = torch.tensor([0.0, 0.375, 0.5], dtype=torch.float64)
    boxes = torch.stack([left, left * 0, left + 0.25, left * 0 + 1], dim=1)
    batch.boxes[0, :3] = boxes
    words = torch.zeros(3, W, dtype=torch.float64)
    words[0, 0], words[1, 1], words[2, :2] = 1, 1, torch.tensor([3.0, 1.0])
    graph = build_graph(network, batch, 0, words)
    f = batch.features[0]
    assert list(graph.instances) == [0, 1, 2]
    assert list(graph.labels) == [0, 1, 2]
    # Label 2 leans to label 0, and both others to label 2.
    assert list(graph.instance_edges) == [(0, 1), (1, 2), (2, 1)]
    assert list(graph.label_edges) == [(0, 2), (1, 2), (2, 0)]
    assert torch.equal(graph.instance_edges[1, 2], torch.cat([boxes[1], boxes[2]]))
    assert torch.equal(graph.label_edges[2, 0], torch.cat([words[2], words[0]]))
    assert len(graph.matching_edges) == 9
    assert torch.equal(graph.matching_edges[1, 2], torch.cat([f[1], words[2]]))


# Neighbours --------------------------------------------------------------------------------------

eighths = st.integers(0, 8)


@st.composite
def instance_batches(draw: st.DrawFn) -> InstanceBatch:
    """Boxes on a coarse grid, two scores, two classes, padding anywhere: ties of every kind."""
    images, places = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    total = images * places
    corners = st.tuples(eighths, eighths, eighths, eighths)
    boxes = torch.tensor(draw(st.lists(corners, min_size=total, max_size=total))) / 8
    boxes = boxes.reshape(images, places, 2, 2).sort(dim=2).values.flatten(2)
    scores = torch.tensor(draw(st.lists(st.integers(1, 2), min_size=total, max_size=total))) / 4
    classes = torch.tensor(draw(st.lists(st.integers(1, 2), min_size=total, max_size=total)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    mask = mask.reshape(images, places)
    mask[:, draw(st.integers(0, places - 1))] = True
    shape = (images, places)
    features = torch.zeros(images, places, 1)
    return InstanceBatch(features, boxes, scores.reshape(shape), classes.reshape(shape), mask)


Rank = tuple[Fraction, float, int, tuple[float, ...]]


def ranks(batch: InstanceBatch, image: int, i: int) -> dict[int, Rank]:
    """What neighbours of i are sorted by: distance, falling score, class, box; in exact numbers."""

    def twice_center(j: int) -> tuple[Fraction, Fraction]:
        x1, y1, x2, y2 = map(Fraction, batch.boxes[image, j].tolist())
        return x1 + x2, y1 + y2

    (x, y), found = twice_center(i), {}
    for j in range(batch.mask.shape[1]):
        if batch.mask[image, j] and j != i:
            other_x, other_y = twice_center(j)
            found[j] = (
                (x - other_x) ** 2 + (y - other_y) ** 2,
                -float(batch.scores[image, j]),
                int(batch.classes[image, j]),
                tuple(batch.boxes[image, j].tolist()),
            )
    return found


@few
@given(instance_batches(), st.integers(1, 7))
def test_instance_neighbors_by_brute_force(batch: InstanceBatch, neighbors: int) -> None:
    found = instance_neighbors(batch, neighbors)
    images, places = batch.mask.shape
    kept = min(neighbors, places - 1)
    assert found.index.shape == found.mask.shape == (images, places, kept)
    for image in range(images):
        for i in range(places):
            index, there = found.index[image, i].tolist(), found.mask[image, i].tolist()
            actual = [j for j, exists in zip(index, there, strict=True) if exists]
            if not batch.mask[image, i]:
                assert actual == []
                continue
            expected = ranks(batch, image, i)
            assert len(set(actual)) == len(actual)
            assert [expected[j] for j in actual] == sorted(expected.values())[:neighbors]
            slow = nearest_instances(batch, image, i, neighbors)
            assert [expected[j] for j in slow] == sorted(expected.values())[:neighbors]


def test_nearest_is_euclidean() -> None:
    """From a centre, (5, 0) is nearest by city blocks, (3, 3) by Euclid; (4, 4) beats (5, 0) by
    the larger coordinate only."""
    centers = torch.tensor([[0.0, 0], [5, 0], [4, 4], [3, 3]]) / 8
    batch = InstanceBatch(
        features=torch.zeros(1, 4, 1),
        boxes=torch.cat([centers, centers + 1 / 8], dim=1)[None],
        scores=torch.ones(1, 4),
        classes=torch.ones(1, 4, dtype=torch.int64),
        mask=torch.ones(1, 4, dtype=torch.bool),
    )
    assert instance_neighbors(batch, 3).index[0, 0].tolist() == [3, 1, 2]
    assert nearest_instances(batch, 0, 0, 3) == [3, 1, 2]


def test_ties_go_by_score_then_class_then_box() -> None:
    """Four instances with the centre of the first: each pair differs in one more key."""
    boxes = torch.tensor([[[0.25, 0.25, 0.75, 0.75]] * 5])
    boxes[0, 4] = torch.tensor([0.125, 0.25, 0.875, 0.75])
    batch = InstanceBatch(
        features=torch.zeros(1, 5, 1),
        boxes=boxes,
        scores=torch.tensor([[0.1, 0.2, 0.9, 0.2, 0.2]]),
        classes=torch.tensor([[1, 7, 9, 4, 4]]),
        mask=torch.ones(1, 5, dtype=torch.bool),
    )
    # 2 has the best score; of the others 1 has the higher class; of 3 and 4, 4 begins further left.
    assert instance_neighbors(batch, 4).index[0, 0].tolist() == [2, 4, 3, 1]
    assert nearest_instances(batch, 0, 0, 4) == [2, 4, 3, 1]
    assert instance_neighbors(batch, 4).index[0, 2].tolist() == [4, 3, 1, 0]


@few
@given(
    st.integers(1, 6).flatmap(
        lambda labels: st.lists(
            st.tuples(*[st.integers(-2, 2)] * 3).filter(any), min_size=labels, max_size=labels
        )
    ),
    st.none() | st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_label_neighbors_by_brute_force(
    words: list[tuple[int, ...]], neighbors: int | None, dtype: torch.dtype
) -> None:
    def signed_square_of_cosine(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return Fraction(dot * abs(dot), sum(x * x for x in a) * sum(x * x for x in b))

    found = label_neighbors(torch.tensor(words, dtype=dtype), neighbors).tolist()
    assert len(found) == len(words)
    for i, word in enumerate(words):
        others = [j for j in range(len(words)) if j != i]
        nearest = sorted(others, key=lambda j: (-signed_square_of_cosine(word, words[j]), j))
        assert found[i] == (others if neighbors is None else nearest[:neighbors])
        assert set(nearest_labels(torch.tensor(words, dtype=dtype), i, neighbors)) == set(found[i])


@pytest.mark.parametrize("seed", range(10))
def test_equal_cosines_tie_whatever_their_last_bit(seed: int) -> None:
    """Multiples of one vector: all cosines are 1, so the lowest label numbers are nearest."""
    factors = torch.tensor([3.0, 0.7, 1.0, 5.3, 0.1, 2.9], dtype=torch.float64)
    words = factors[:, None] * vectors(1, seed=seed)
    expected = [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert label_neighbors(words, 2).tolist() == expected
    assert [nearest_labels(words, i, 2) for i in range(6)] == expected


# Properties --------------------------------------------------------------------------------------

variants = st.sampled_from(VARIANTS)
sparsities = st.sampled_from([None, 1, 2])


@few
@given(variants, seeds, sparsities, st.permutations(range(M)), st.integers(1, 4))
def test_order_of_instances_never_matters(
    variant: str, seed: int, sparse: int | None, order: list[int], neighbors: int
) -> None:
    network = net(variant, seed=seed, label_neighbors=sparse, neighbors=neighbors)
    batch, words = batch64(seed=seed), vectors(seed=seed)
    scores = network(batch, words)
    permuted = network(rows(batch, slice(None), order), words)
    assert_same(permuted, scores[:, order], 1e-9)
    assert_same(image_logits(permuted)[0], image_logits(scores)[0], 1e-9)


@few
@given(st.sampled_from(GRAPHS), seeds, sparsities, st.permutations(range(5)))
def test_order_of_labels_never_matters(
    variant: str, seed: int, sparse: int | None, order: list[int]
) -> None:
    network = net(variant, labels=5, seed=seed, label_neighbors=sparse)
    batch, words = batch64(seed=seed), vectors(5, seed=seed)
    assert_same(network(batch, words[order]), network(batch, words)[..., order], 1e-9)


@few
@given(variants, seeds, st.permutations(range(M + 2)), st.integers(1, 5))
def test_padding_changes_nothing(variant: str, seed: int, order: list[int], neighbors: int) -> None:
    """Two more places, full of garbage, and so is the padding that was there; anywhere."""
    network = net(variant, seed=seed, neighbors=neighbors)
    batch, words = batch64(seed=seed), vectors(seed=seed)
    expected = network(batch, words)
    wide = rows(batch, slice(None), [*range(M), 0, 0])
    wide.mask[:, M:] = False
    padding = ~wide.mask
    wide.features[padding] = 1e6
    wide.boxes[padding] = torch.tensor([0.4, -7.0, 0.6, 9.0], dtype=torch.float64)
    wide.scores[padding] = 99.0
    wide.classes[padding] = -5
    actual = network(rows(wide, slice(None), order), words)
    restored = torch.empty_like(actual)
    restored[:, order] = actual
    assert_same(restored[:, :M], expected, 1e-9)
    assert (restored[:, M:] == -torch.inf).all()
    assert_same(image_logits(actual)[0], image_logits(expected)[0], 1e-9)


@few
@given(variants, seeds, st.lists(st.integers(1, M), min_size=2, max_size=4))
def test_images_of_a_batch_never_meet(variant: str, seed: int, counts: list[int]) -> None:
    network = net(variant, seed=seed)
    batch, words = batch64(len(counts), counts=counts, seed=seed), vectors(seed=seed)
    together = network(batch, words)
    for image, count in enumerate(counts):
        alone = network(rows(batch, [image], slice(count)), words)
        assert_same(together[[image], :count], alone, 1e-9)


@few
@given(variants, seeds, st.sampled_from([0.0, -1e30]))
def test_winner_is_a_real_instance(variant: str, seed: int, shift: float) -> None:
    network = net(variant, seed=seed, dtype=torch.float32)
    batch = make_instances(4, instances=M, feature_size=D, seed=seed)
    order = torch.arange(M).flip(0)  # padding first
    batch = rows(batch, slice(None), order)
    scores = network(batch, vectors(seed=seed, dtype=torch.float32)) + shift
    best, winners = image_logits(scores)
    assert best.shape == winners.shape == (4, C)
    assert batch.mask.gather(1, winners).all()
    assert torch.equal(scores.gather(1, winners[:, None])[:, 0], best)
    for image in range(4):
        for label in range(C):
            real = [scores[image, i, label].item() for i in range(M) if batch.mask[image, i]]
            assert best[image, label].item() == max(real)


# Ablations ---------------------------------------------------------------------------------------


def names(variant: str) -> set[str]:
    return {name for name, _ in net(variant).named_parameters()}


@pytest.mark.parametrize(
    ("variant", "dropped"),
    [
        ("without-label-graph", ("label_edge", "label_from_label")),
        ("without-instance-graph", ("instance_edge", "instance_from_instance")),
        (
            "without-matching-edges",
            ("matching_edge", "instance_from_label", "label_from_instance"),
        ),
    ],
)
def test_an_ablation_lacks_the_parameters_of_its_edges(
    variant: str, dropped: tuple[str, ...]
) -> None:
    gone = {name for name in names("full") if any(part in name for part in dropped)}
    assert gone
    assert names(variant) == names("full") - gone


def test_last_module_has_no_parameters_for_edges_that_nothing_reads() -> None:
    network = matching_net(modules=2)
    first, last = (
        {name for name, _ in module.named_parameters()} for module in network.convolutions
    )
    unread = {name for name in first if name.startswith(("instance_edge", "label_edge"))}
    assert len(unread) == 4 * 4
    assert last == first - unread


@pytest.mark.parametrize("variant", VARIANTS)
def test_boxes_enter_by_the_instance_graph_only(variant: str) -> None:
    """And scores and classes nowhere: without ties they decide nothing."""
    network, words = net(variant, neighbors=2), vectors()
    batch = batch64()
    generator = torch.Generator().manual_seed(9)
    corners = torch.rand(3, M, 2, 2, generator=generator, dtype=torch.float64)
    batch = replace(batch, boxes=corners.sort(dim=2).values.flatten(2))
    scores = network(batch, words)
    moved = network(replace(batch, boxes=batch.boxes.flip(1)), words)
    if variant == "without-instance-graph":
        assert torch.equal(moved, scores)
    else:
        assert (image_logits(moved)[0] - image_logits(scores)[0]).abs().max() > 1e-3
    other = replace(batch, scores=1 - batch.scores, classes=batch.classes + 3)
    assert_same(network(other, words), scores, 1e-9)


def test_without_matching_edges_only_neighbours_meet() -> None:
    """One module: a label's logits change with its own vector and its neighbours', no others'.

    So with instances. A longer vector keeps its cosines, and so everybody's neighbours.
    """
    network = matching_net(
        "without-matching-edges", modules=1, neighbors=1, label_neighbors=1, latent_size=32
    )
    batch, words = batch64(1), vectors(5)
    scores, near = network(batch, words)[0], label_neighbors(words, 1)
    for label in range(5):
        longer = words.clone()
        longer[label] *= 1.5
        changed = (network(batch, longer)[0] != scores).any(dim=0)
        assert changed.tolist() == [label in (j, *near[j].tolist()) for j in range(5)]
    around = instance_neighbors(batch, 1).index[0]
    for instance in range(M):
        other = replace(batch, features=batch.features.clone())
        other.features[0, instance] += 1
        changed = (network(other, words)[0] != scores).any(dim=1)
        assert changed.tolist() == [instance in (i, *around[i].tolist()) for i in range(M)]


def test_without_label_graph_labels_still_meet_over_instances() -> None:
    network = matching_net("without-label-graph", modules=1)
    batch, words = batch64(1), vectors()
    longer = words.clone()
    longer[0] *= 1.5
    assert ((network(batch, longer) != network(batch, words))[0].any(dim=0)).all()


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient(variant: str, modules: int) -> None:
    # Wide enough that no layer's units are all dead on every region.
    network, batch = net(variant, modules=modules, latent_size=32), batch64(4)
    truth = (torch.arange(4 * C) % 3 == 0).long().reshape(4, C)
    ratio = torch.full((C,), 0.3, dtype=torch.float64)
    found = gradients(network, network(batch, vectors()), truth, ratio)
    assert [
        name for name, gradient in found.items() if gradient is None or not gradient.any()
    ] == []


# Initialisation and inputs -----------------------------------------------------------------------


def mean_square(states: dict[Any, Tensor]) -> float:
    return torch.stack(list(states.values())).square().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", GRAPHS)
def test_initial_states_keep_their_scale(variant: str, seed: int) -> None:
    """Mean square of nodes and edges after every layer stays near 1, without any norm."""
    torch.manual_seed(seed)
    size, places, labels = 128, 6, 5
    config = NetworkSettings(latent_size=size, modules=2, neighbors=2, node_norm=False)
    network = build_network(size, labels, size, config)
    assert isinstance(network, MatchingNetwork)
    batch = InstanceBatch(
        features=torch.randn(1, places, size),
        boxes=torch.randn(1, places, 4),
        scores=torch.rand(1, places),
        classes=torch.ones(1, places, dtype=torch.int64),
        mask=torch.ones(1, places, dtype=torch.bool),
    )
    with torch.no_grad():
        graphs: list[Graph] = [
            encode(network, build_graph(network, batch, 0, torch.randn(labels, size)))
        ]
        for module in network.convolutions:
            assert isinstance(module, Convolution)
            graphs.append(convolve(module, graphs[-1]))
        logits = torch.stack(list(decode(network, graphs[-1]).values()))
    for depth, graph in enumerate(graphs):
        for kind, states in vars(graph).items():
            if states:
                assert 0.25 < mean_square(states) < 4, (depth, kind)
    assert 0.1 < logits.std() < 4


def test_initial_biases_are_zero_and_weights_follow_fan_in() -> None:
    torch.manual_seed(0)
    network = build_network(400, 3, 300, NetworkSettings(latent_size=256))
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 10_000:
            gain = 1.0 if name.endswith("first.weight") else 2.0
            variance = parameter.var().item() * parameter.shape[1]
            assert variance == pytest.approx(gain, rel=0.1), name


def test_inputs_standardise_and_are_saved_with_the_network() -> None:
    network = build_network(3, 2, W, NetworkSettings(latent_size=4))
    words = vectors(2, dtype=torch.float32) * 7
    network.inputs.set_statistics(
        feature_mean=torch.tensor([1.0, 2.0, 3.0]),
        # Root mean square 1, so the second feature, which never varies, is scaled by 0.1.
        feature_std=torch.tensor([1.0, 0.0, math.sqrt(2)]),
        box_mean=torch.tensor([0.5, 0.5, 0.25, 0.75]),
        box_std=torch.tensor([0.25, 0.5, 0.5, 1.0]),
        label_vectors=words,
    )
    copy = build_network(3, 2, W, NetworkSettings(latent_size=4))
    copy.load_state_dict(network.state_dict())
    for inputs in (network.inputs, copy.inputs):
        standardised = inputs.features(torch.tensor([5.0, 9.0, 2.0])).tolist()
        assert standardised == pytest.approx([4.0, 70.0, -1 / math.sqrt(2)])
        assert inputs.boxes(torch.tensor([0.0, 1.0, 0.75, 0.75])).tolist() == [-2.0, 1.0, 1.0, 0.0]
        scaled = inputs.vectors(words)
        assert scaled.square().mean().item() == pytest.approx(1.0)
        assert torch.allclose(scaled / words, (scaled / words)[0, 0])


# Max-pool ----------------------------------------------------------------------------------------


def test_max_pool_is_a_plain_loop() -> None:
    network, batch, words = net("max-pool"), batch64(), vectors()
    assert isinstance(network, MaxPoolNetwork)
    scores = network(batch, words)
    first, second = network.classify.mlp.first, network.classify.mlp.second
    for image in range(3):
        for i in range(M):
            if not batch.mask[image, i]:
                assert (scores[image, i] == -torch.inf).all()
                continue
            x = torch.cat(
                [
                    network.inputs.features(batch.features[image, i]),
                    network.inputs.boxes(batch.boxes[image, i]),
                ]
            )
            expected = second.weight @ (first.weight @ x + first.bias).relu() + second.bias
            assert_same(scores[image, i], expected, 1e-9)
    assert torch.equal(network(batch, -3 * words), scores)


# Loss --------------------------------------------------------------------------------------------


@st.composite
def losses(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], list[float], float]:
    """Logits (B, C), truth (B, C) with -1 for ignored, ratios (C,) and beta."""
    images, labels = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def table(value: st.SearchStrategy[Any]) -> Any:
        row = st.lists(value, min_size=labels, max_size=labels)
        return draw(st.lists(row, min_size=images, max_size=images))

    ratio = draw(st.lists(st.floats(0, 1), min_size=labels, max_size=labels))
    return (
        table(st.floats(-20, 20)),
        table(st.sampled_from([-1, 0, 1])),
        ratio,
        draw(st.sampled_from([0.0, 0.4, 2.0])),
    )


@few
@given(losses())
def test_loss_is_equation_15(
    drawn: tuple[list[list[float]], list[list[int]], list[float], float],
) -> None:
    logits, truth, ratio, beta = drawn
    total = 0.0
    for row, labels in zip(logits, truth, strict=True):
        for logit, y, r in zip(row, labels, ratio, strict=True):
            if y == -1:
                continue
            weight = y * math.exp(beta * (1 - r)) + (1 - y) * math.exp(beta * r)
            # log p and log(1 - p) of p = 1 / (1 + exp(-logit))
            log_p, log_q = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
            total -= weight * (y * log_p + (1 - y) * log_q)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    marks = torch.tensor(truth)
    loss = matching_loss(x, marks, torch.tensor(ratio, dtype=torch.float64), beta)
    assert loss.item() == pytest.approx(total / len(logits), rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, [x])
    assert torch.equal(gradient != 0, marks >= 0)


def test_loss_without_balance_is_the_mean_over_images_of_bce() -> None:
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.0], [-0.7, 4.0]])
    truth = torch.tensor([[1, 0], [0, 1], [1, 1]])
    expected = nn.functional.binary_cross_entropy_with_logits(
        logits, truth.float(), reduction="sum"
    )
    loss = matching_loss(logits, truth, torch.tensor([0.1, 0.9]), 0.0)
    assert loss.item() == pytest.approx(expected.item() / 3)


def test_extreme_logits_have_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 1e30]], requires_grad=True)
    loss = matching_loss(logits, torch.tensor([[0, 1, 1, 0, -1]]), torch.full((5,), 0.5), 0.4)
    assert loss.item() == pytest.approx(2e4 * math.exp(0.2))
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert gradient.isfinite().all()
    assert gradient[0, 4] == 0
