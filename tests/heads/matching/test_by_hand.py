"""The assignment graph and the matching network against numbers worked out by hand.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import torch
from networks import net, score
from reference import build_graph, reference_logits
from tiny import D, W, make_batch
from torch import nn

from pipeline.heads.contract import HeadSizes, RegionBatch
from pipeline.heads.inputs import Inputs
from pipeline.heads.matching.convolution import Convolution
from pipeline.heads.matching.network import GmMlic
from pipeline.settings import GmMlicSettings


def put(layer: nn.Linear, weight: list[list[int]], bias: float = 0.0) -> None:
    layer.weight.copy_(torch.tensor(weight))
    layer.bias.fill_(bias)


@torch.no_grad()
def network_by_hand() -> GmMlic:
    """One module from size 2 to size 1, with small whole numbers as parameters."""
    config = GmMlicSettings(latent_size=2, modules=1, neighbors=1, node_norm=False)
    network = GmMlic(HeadSizes(features=1, labels=2, vectors=1, classes=1), config).double()
    encoder, module = network.encoder, network.convolutions[0]
    assert isinstance(module, Convolution)
    for parameter in network.parameters():
        parameter.zero_()
    unit = [[1, 0], [0, 1]]
    # Encoder (4): v_i^o = (f_i, 0), v_j^l = (0, w_j), e_ij^l = (w_i, w_j), e_ij^m = (f_i, w_j),
    # and e_ij^o = (left of box i, right of box j).
    put(encoder.instance.first, [[1], [0]])
    put(encoder.instance.second, unit)
    put(encoder.label.first, [[0], [1]])
    put(encoder.label.second, unit)
    for mlp, weight in (
        (encoder.instance_edge, [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0]]),
        (encoder.label_edge, unit),
        (encoder.matching_edge, unit),
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
        (network.decoder.mlp, [1], -2000, -1, 0.5),  # e^m
    ):
        assert mlp is not None
        put(mlp.first, [first], first_bias)
        put(mlp.second, [[second]], second_bias)
    return network


def test_two_instances_and_two_labels_by_hand() -> None:
    """Each number is worked out below."""
    network = network_by_hand()
    batch = RegionBatch(
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
    assert torch.equal(reference_logits(network, batch, words), expected)
    output = score(network, batch, words)
    assert output.regions is not None
    assert torch.equal(output.regions, expected)
    assert output.image.tolist() == [[-258.5, -3201.5]]
    assert output.winners().tolist() == [[0, 0]]
    assert output.whole is None
    assert output.loss is None


def test_reference_graph_by_hand() -> None:
    """(1)-(3) of three instances in a row, the middle one nearest to both others."""
    network = net(neighbors=1, label_neighbors=1)
    network.inputs = Inputs(D).double()
    batch = make_batch(1, counts=[3])
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
