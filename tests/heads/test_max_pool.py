"""The baseline without a graph.

Letters: B images, M regions, C labels, D feature size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    C,
    D,
    M,
    W,
    assert_same,
    make_batch,
    make_label_set,
    perturb,
    select,
    with_garbage,
)
from torch import Tensor

from pipeline.heads.contract import HeadSizes, LabelSet, RegionBatch
from pipeline.heads.pooling.max_pool import MaxPool
from pipeline.learning.losses import matching_loss
from pipeline.settings import MaxPoolSettings

LABELS = make_label_set()

few = settings(max_examples=25)
seeds = st.integers(0, 10_000)


def net(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> MaxPool:
    """Make a tiny network in which no parameter or statistic has a value that hides its misuse."""
    chosen = MaxPoolSettings(**{"hidden_size": 16, **changes})
    network = MaxPool(HeadSizes(D, C, W, 1), chosen).to(dtype)
    perturb(network, seed)
    return network


def plain_loop(network: MaxPool, batch: RegionBatch, boxes: bool = True) -> tuple[Tensor, Tensor]:
    """Logits (B, C) of images and (B, M, C) of regions, one region after the other."""
    of_regions, of_images = [], []
    for image, real in enumerate(batch.mask.tolist()):
        rows = []
        for i in range(len(real)):
            pieces = [network.inputs.features(batch.features[image, i])]
            if boxes:
                pieces.append(network.inputs.boxes(batch.boxes[image, i]))
            hidden = network.first.weight @ torch.cat(pieces) + network.first.bias
            logits = network.second.weight @ hidden.clamp(min=0) + network.second.bias
            rows.append(logits if real[i] else torch.full_like(logits, -torch.inf))
        of_regions.append(torch.stack(rows))
        best = rows[real.index(True)]
        for row in rows:
            best = torch.where(row > best, row, best)
        of_images.append(best)
    return torch.stack(of_images), torch.stack(of_regions)


@pytest.mark.parametrize("boxes", [True, False])
def test_max_pool_equals_a_plain_loop(boxes: bool) -> None:
    network, batch = net(boxes=boxes), make_batch()
    output, (image, regions) = network(batch, LABELS), plain_loop(network, batch, boxes)
    assert_same(output.image, image, 1e-9)
    assert_same(output.regions, regions, 1e-9)
    assert (output.whole, output.loss) == (None, None)
    truth = torch.tensor([[1, 0, -1], [0, 1, 1], [-1, 0, 1]])
    parameters = list(network.parameters())
    ours, expected = (
        torch.autograd.grad(matching_loss(x, truth, LABELS.ratio, 0.4), parameters)
        for x in (output.image, image)
    )
    for own, other in zip(ours, expected, strict=True):
        assert other.any()
        assert_same(own, other, 1e-9)


def test_nothing_of_the_labels_is_read() -> None:
    network, batch = net(), make_batch()
    unknown = torch.full((C,), torch.nan, dtype=torch.float64)
    other = network(batch, LabelSet(unknown[:, None], unknown))
    assert torch.equal(other.image, network(batch, LABELS).image)


@pytest.mark.parametrize("boxes", [True, False])
def test_boxes_are_read_only_if_the_settings_say_so(boxes: bool) -> None:
    """Scores and classes never are."""
    network, batch = net(boxes=boxes), make_batch()
    image = network(batch, LABELS).image
    moved = network(replace(batch, boxes=batch.boxes.flip(-1)), LABELS).image
    assert ((moved - image).abs() > 1e-3).any() == boxes
    assert torch.equal(moved, image) != boxes
    other = replace(batch, scores=1 - batch.scores, classes=batch.classes + 3)
    assert torch.equal(network(other, LABELS).image, image)


@few
@given(seeds, st.permutations(range(M)))
def test_order_of_regions_does_not_matter(seed: int, order: list[int]) -> None:
    network, batch = net(seed), make_batch(seed=seed)
    output = network(batch, LABELS)
    permuted = network(select(batch, slice(None), order), LABELS)
    assert_same(permuted.regions, output.regions[:, order], 1e-9)
    assert_same(permuted.image, output.image, 1e-9)


@few
@given(seeds, st.permutations(range(M + 2)))
def test_padding_changes_nothing(seed: int, order: list[int]) -> None:
    """Two more regions of padding, anywhere; all padding is full of garbage."""
    network, batch = net(seed), make_batch(seed=seed)
    expected = network(batch, LABELS)
    actual = network(select(with_garbage(batch), slice(None), order), LABELS)
    restored = torch.empty_like(actual.regions)
    restored[:, order] = actual.regions
    assert_same(restored[:, :M], expected.regions, 1e-9)
    assert (restored[:, M:] == -torch.inf).all()
    assert_same(actual.image, expected.image, 1e-9)


@few
@given(seeds, st.lists(st.integers(1, M), min_size=2, max_size=4))
def test_images_of_a_batch_are_independent(seed: int, counts: list[int]) -> None:
    network, batch = net(seed), make_batch(len(counts), counts=counts, seed=seed)
    together = network(batch, LABELS)
    for image, count in enumerate(counts):
        alone = network(select(batch, [image], slice(count)), LABELS)
        assert_same(together.regions[[image], :count], alone.regions, 1e-9)
        assert_same(together.image[[image]], alone.image, 1e-9)


@few
@given(seeds, st.sampled_from([0.0, -1e30]))
def test_winner_is_a_real_region(seed: int, shift: float) -> None:
    """Even if all logits are far below 0, and padding comes first."""
    network = net(seed, torch.float32)
    with torch.no_grad():
        network.second.bias += shift
    batch = select(make_batch(4, seed=seed, dtype=torch.float32), slice(None), [3, 2, 1, 0])
    output = network(batch, make_label_set(dtype=torch.float32))
    winners = output.winners()
    assert batch.mask.gather(1, winners).all()
    assert torch.equal(output.regions.gather(1, winners[:, None])[:, 0], output.image)


@pytest.mark.parametrize("where", ["input_dropout", "dropout"])
def test_dropout_is_off_in_eval_mode_and_random_in_training(where: str) -> None:
    network, batch = net(**{where: 0.5}), make_batch()
    network.train()
    assert not torch.equal(network(batch, LABELS).image, network(batch, LABELS).image)
    network.eval()
    assert_same(network(batch, LABELS).image, plain_loop(network, batch)[0], 1e-9)
