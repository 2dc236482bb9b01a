"""The baseline without a graph.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import torch
from networks import M, assert_same, batch64, net, vectors

from pipeline.heads.pooling.max_pool import MaxPool


def test_max_pool_equals_a_plain_loop() -> None:
    network, batch, words = net("max-pool"), batch64(), vectors()
    assert isinstance(network, MaxPool)
    scores = network(batch, words)
    first, second = network.mlp.first, network.mlp.second
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
