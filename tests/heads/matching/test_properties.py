"""Properties of every variant: permutations, padding, batches and winners.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import VARIANTS, few, net, score, seeds, vectors
from tiny import C, M, assert_same, make_batch, select, with_garbage

variants = st.sampled_from(VARIANTS)
sparsities = st.sampled_from([None, 1, 2])


@few
@given(variants, seeds, sparsities, st.permutations(range(M)), st.integers(1, 4))
def test_order_of_instances_does_not_matter(
    variant: str, seed: int, sparse: int | None, order: list[int], neighbors: int
) -> None:
    network = net(variant, seed=seed, label_neighbors=sparse, neighbors=neighbors)
    batch, words = make_batch(seed=seed), vectors(seed=seed)
    scores = score(network, batch, words)
    permuted = score(network, select(batch, slice(None), order), words)
    assert_same(permuted.regions, scores.regions[:, order], 1e-9)
    assert_same(permuted.image, scores.image, 1e-9)


@few
@given(variants, seeds, sparsities, st.permutations(range(5)))
def test_order_of_labels_does_not_matter(
    variant: str, seed: int, sparse: int | None, order: list[int]
) -> None:
    network = net(variant, labels=5, seed=seed, label_neighbors=sparse)
    batch, words = make_batch(seed=seed), vectors(5, seed=seed)
    permuted, scores = (score(network, batch, own).regions for own in (words[order], words))
    assert_same(permuted, scores[..., order], 1e-9)


@few
@given(variants, seeds, st.permutations(range(M + 2)), st.integers(1, 5))
def test_padding_changes_nothing(variant: str, seed: int, order: list[int], neighbors: int) -> None:
    """Two more instances of padding, anywhere; all padding is full of garbage."""
    network = net(variant, seed=seed, neighbors=neighbors)
    batch, words = make_batch(seed=seed), vectors(seed=seed)
    expected = score(network, batch, words)
    actual = score(network, select(with_garbage(batch), slice(None), order), words)
    restored = torch.empty_like(actual.regions)
    restored[:, order] = actual.regions
    assert_same(restored[:, :M], expected.regions, 1e-9)
    assert (restored[:, M:] == -torch.inf).all()
    assert_same(actual.image, expected.image, 1e-9)


@few
@given(variants, seeds, st.lists(st.integers(1, M), min_size=2, max_size=4))
def test_images_of_a_batch_are_independent(variant: str, seed: int, counts: list[int]) -> None:
    network = net(variant, seed=seed)
    batch, words = make_batch(len(counts), counts=counts, seed=seed), vectors(seed=seed)
    together = score(network, batch, words)
    for image, count in enumerate(counts):
        alone = score(network, select(batch, [image], slice(count)), words)
        assert_same(together.regions[[image], :count], alone.regions, 1e-9)
        assert_same(together.image[[image]], alone.image, 1e-9)


@few
@given(variants, seeds, st.sampled_from([0.0, -1e30]))
def test_winner_is_a_real_instance(variant: str, seed: int, shift: float) -> None:
    """Even if all logits are far below 0."""
    network = net(variant, seed=seed, dtype=torch.float32)
    batch = make_batch(4, seed=seed, dtype=torch.float32)
    order = torch.arange(M).flip(0)  # padding first
    batch = select(batch, slice(None), order)
    with torch.no_grad():
        network.decoder.mlp.second.bias += shift
    best, scores, *_ = output = score(network, batch, vectors(seed=seed, dtype=torch.float32))
    winners = output.winners()
    assert best.shape == winners.shape == (4, C)
    assert batch.mask.gather(1, winners).all()
    assert torch.equal(scores.gather(1, winners[:, None])[:, 0], best)
    for image in range(4):
        for label in range(C):
            real = [scores[image, i, label].item() for i in range(M) if batch.mask[image, i]]
            assert best[image, label].item() == max(real)
