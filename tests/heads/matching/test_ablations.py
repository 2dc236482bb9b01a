"""What each ablation takes away, and that nothing else goes with it.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import VARIANTS, H, gradients, net, score, vectors
from tiny import C, M, assert_same, make_batch

from pipeline.heads.matching.graphs import instance_neighbors, label_neighbors


def parameter_names(variant: str) -> set[str]:
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
    removed = {name for name in parameter_names("full") if any(part in name for part in dropped)}
    assert removed
    assert parameter_names(variant) == parameter_names("full") - removed


def test_last_module_has_no_parameters_for_edges_that_nothing_reads() -> None:
    network = net(modules=2)
    first, last = (
        {name for name, _ in module.named_parameters()} for module in network.convolutions
    )
    unread = {name for name in first if name.startswith(("instance_edge", "label_edge"))}
    assert len(unread) == 4 * 4
    assert last == first - unread


@pytest.mark.parametrize("variant", VARIANTS)
def test_boxes_enter_by_the_instance_graph_only(variant: str) -> None:
    """Scores and classes enter nowhere: without ties they decide nothing."""
    network, words = net(variant, neighbors=2), vectors()
    batch = make_batch()
    generator = torch.Generator().manual_seed(9)
    corners = torch.rand(3, M, 2, 2, generator=generator, dtype=torch.float64)
    batch = replace(batch, boxes=corners.sort(dim=2).values.flatten(2))
    scores = score(network, batch, words)
    moved = score(network, replace(batch, boxes=batch.boxes.flip(1)), words)
    if variant == "without-instance-graph":
        assert torch.equal(moved.regions, scores.regions)
    else:
        assert (moved.image - scores.image).abs().max() > 1e-3
    other = replace(batch, scores=1 - batch.scores, classes=batch.classes + 3)
    assert_same(score(network, other, words).regions, scores.regions, 1e-9)


def test_without_matching_edges_only_neighbours_meet() -> None:
    """With one module, a label's logits change with its own and its neighbours' vectors only.

    The same holds for instances. A longer vector keeps its cosines, and so all neighbours.
    """
    network = net(
        "without-matching-edges", modules=1, neighbors=1, label_neighbors=1, latent_size=32
    )
    batch, words = make_batch(1), vectors(5)
    scores, near = score(network, batch, words).regions[0], label_neighbors(words, 1)
    for label in range(5):
        longer = words.clone()
        longer[label] *= 1.5
        changed = (score(network, batch, longer).regions[0] != scores).any(dim=0)
        assert changed.tolist() == [label in (j, *near[j].tolist()) for j in range(5)]
    around = instance_neighbors(batch, 1).index[0]
    for instance in range(M):
        other = replace(batch, features=batch.features.clone())
        other.features[0, instance] += 1
        changed = (score(network, other, words).regions[0] != scores).any(dim=1)
        assert changed.tolist() == [instance in (i, *around[i].tolist()) for i in range(M)]


def test_over_stateless_edges_messages_are_those_of_the_nodes() -> None:
    """They lack the states' parameters, read one node, and reach every instance and label."""
    variant = "stateless-matching-edges"
    kept = {name for name in parameter_names("full") if "matching_edge" not in name}
    assert parameter_names(variant) == kept
    network = net(variant, modules=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    for message in ("instance_from_label", "label_from_instance"):
        assert shapes[f"convolutions.0.{message}.first.weight"] == (H // 2, H)
    assert shapes["decoder.mlp.first.weight"] == (H, H)  # two nodes of half the size
    batch, words = make_batch(2), vectors()
    longer = words.clone()
    longer[0] *= 1.5
    before = score(network, batch, words).regions[batch.mask]
    changed = score(network, batch, longer).regions[batch.mask] != before
    assert changed.all()
    other = replace(batch, features=batch.features.clone())
    other.features[0, 0] += 1
    changed = score(network, other, words).regions[batch.mask] != before
    images = torch.arange(2)[:, None].expand(2, M)[batch.mask]
    assert changed.all(dim=1).tolist() == (images == 0).tolist()


def test_without_label_graph_labels_still_affect_each_other_over_instances() -> None:
    network = net("without-label-graph", modules=1)
    batch, words = make_batch(1), vectors()
    longer = words.clone()
    longer[0] *= 1.5
    changed = score(network, batch, longer).regions != score(network, batch, words).regions
    assert changed[0].any(dim=0).all()


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient(variant: str, modules: int) -> None:
    # Wide enough that no layer's units are all dead on every region.
    network, batch = net(variant, modules=modules, latent_size=32), make_batch(4)
    truth = (torch.arange(4 * C) % 3 == 0).long().reshape(4, C)
    ratio = torch.full((C,), 0.3, dtype=torch.float64)
    by_name = gradients(network, score(network, batch, vectors()).image, truth, ratio)
    assert [
        name for name, gradient in by_name.items() if gradient is None or not gradient.any()
    ] == []
