"""Initial weights, and standardisation of the inputs.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import VARIANTS, vectors
from reference import Graph, build_graph, convolve, decode, encode
from tiny import W
from torch import Tensor

from pipeline.heads.contract import HeadSizes, LabelSet, RegionBatch
from pipeline.heads.inputs import InputStatistics
from pipeline.heads.matching.convolution import Convolution
from pipeline.heads.matching.network import GmMlic
from pipeline.settings import GmMlicSettings


def mean_square(states: dict[Any, Tensor]) -> float:
    return torch.stack(list(states.values())).square().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_states_keep_their_scale(variant: str, seed: int) -> None:
    """Without any norm, the mean square of nodes and edges stays near 1 after every layer."""
    torch.manual_seed(seed)
    size, instances, labels = 128, 6, 5
    config = GmMlicSettings(latent_size=size, modules=2, neighbors=2, node_norm=False)
    network = GmMlic(HeadSizes(size, labels, size, 1), config)
    batch = RegionBatch(
        features=torch.randn(1, instances, size),
        boxes=torch.randn(1, instances, 4),
        scores=torch.rand(1, instances),
        classes=torch.ones(1, instances, dtype=torch.int64),
        mask=torch.ones(1, instances, dtype=torch.bool),
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
    network = GmMlic(HeadSizes(400, 3, 300, 1), GmMlicSettings(latent_size=256))
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
    network = GmMlic(HeadSizes(3, 2, W, 1), GmMlicSettings(latent_size=4))
    words = vectors(2, dtype=torch.float32) * 7
    statistics = InputStatistics(
        feature_mean=torch.tensor([1.0, 2.0, 3.0]),
        # Root mean square 1, so the second feature, which never varies, is scaled by 0.1.
        feature_std=torch.tensor([1.0, 0.0, math.sqrt(2)]),
        box_mean=torch.tensor([0.5, 0.5, 0.25, 0.75]),
        box_std=torch.tensor([0.25, 0.5, 0.5, 1.0]),
        whole_mean=torch.tensor([0.0, -1.0, 2.0]),
        whole_std=torch.tensor([1.0, math.sqrt(2), 0.0]),
        classes=1,
    )
    network.start(statistics, LabelSet(words, torch.full((2,), torch.nan)))
    copy = GmMlic(HeadSizes(3, 2, W, 1), GmMlicSettings(latent_size=4))
    copy.load_state_dict(network.state_dict())
    for inputs in (network.inputs, copy.inputs):
        standardised = inputs.features(torch.tensor([5.0, 9.0, 2.0])).tolist()
        assert standardised == pytest.approx([4.0, 70.0, -1 / math.sqrt(2)])
        assert inputs.boxes(torch.tensor([0.0, 1.0, 0.75, 0.75])).tolist() == [-2.0, 1.0, 1.0, 0.0]
        whole = inputs.whole(torch.tensor([[3.0, 1.0, 2.5]]))
        assert whole[0].tolist() == pytest.approx([3.0, math.sqrt(2), 5.0])
        scaled = inputs.vectors(words)
        assert scaled.square().mean().item() == pytest.approx(1.0)
        assert torch.allclose(scaled / words, (scaled / words)[0, 0])
