"""Neighbours in the instance graph and the label graph against brute force.

Letters: B images, M instances, C labels, K and L neighbours, D feature size, W vector size.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import few, net, score, vectors
from reference import nearest_instances, nearest_labels
from tiny import make_batch

from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching import graphs
from pipeline.heads.matching.graphs import instance_neighbors, label_neighbors

eighths = st.integers(0, 8)


@st.composite
def instance_batches(draw: st.DrawFn) -> RegionBatch:
    """Draw boxes on a coarse grid, two scores, two classes, padding anywhere: all kinds of ties."""
    images, instances = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    total = images * instances
    corners = st.tuples(eighths, eighths, eighths, eighths)
    boxes = torch.tensor(draw(st.lists(corners, min_size=total, max_size=total))) / 8
    boxes = boxes.reshape(images, instances, 2, 2).sort(dim=2).values.flatten(2)
    scores = torch.tensor(draw(st.lists(st.integers(1, 2), min_size=total, max_size=total))) / 4
    classes = torch.tensor(draw(st.lists(st.integers(1, 2), min_size=total, max_size=total)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    mask = mask.reshape(images, instances)
    mask[:, draw(st.integers(0, instances - 1))] = True
    shape = (images, instances)
    features = torch.zeros(images, instances, 1)
    return RegionBatch(features, boxes, scores.reshape(shape), classes.reshape(shape), mask)


Rank = tuple[Fraction, float, int, tuple[float, ...]]


def ranks(batch: RegionBatch, image: int, i: int) -> dict[int, Rank]:
    """Compute the sort keys of the neighbours of i exactly: distance, -score, class, box."""

    def twice_center(j: int) -> tuple[Fraction, Fraction]:
        x1, y1, x2, y2 = map(Fraction, batch.boxes[image, j].tolist())
        return x1 + x2, y1 + y2

    (x, y), keys = twice_center(i), {}
    for j in range(batch.mask.shape[1]):
        if batch.mask[image, j] and j != i:
            other_x, other_y = twice_center(j)
            keys[j] = (
                (x - other_x) ** 2 + (y - other_y) ** 2,
                -float(batch.scores[image, j]),
                int(batch.classes[image, j]),
                tuple(batch.boxes[image, j].tolist()),
            )
    return keys


@few
@given(instance_batches(), st.integers(1, 7))
def test_instance_neighbors_by_brute_force(batch: RegionBatch, neighbors: int) -> None:
    nearest = instance_neighbors(batch, neighbors)
    images, instances = batch.mask.shape
    kept = min(neighbors, instances - 1)
    assert nearest.index.shape == nearest.mask.shape == (images, instances, kept)
    for image in range(images):
        for i in range(instances):
            index, mask = nearest.index[image, i].tolist(), nearest.mask[image, i].tolist()
            actual = [j for j, exists in zip(index, mask, strict=True) if exists]
            if not batch.mask[image, i]:
                assert actual == []
                continue
            expected = ranks(batch, image, i)
            assert len(set(actual)) == len(actual)
            assert [expected[j] for j in actual] == sorted(expected.values())[:neighbors]
            slow = nearest_instances(batch, image, i, neighbors)
            assert [expected[j] for j in slow] == sorted(expected.values())[:neighbors]


def test_distance_is_euclidean() -> None:
    """From (0, 0), (5, 0) is nearest in the city-block distance, (3, 3) in the Euclidean one, and
    (4, 4) is nearer than (5, 0) in the maximum distance only."""
    centers = torch.tensor([[0.0, 0], [5, 0], [4, 4], [3, 3]]) / 8
    batch = RegionBatch(
        features=torch.zeros(1, 4, 1),
        boxes=torch.cat([centers, centers + 1 / 8], dim=1)[None],
        scores=torch.ones(1, 4),
        classes=torch.ones(1, 4, dtype=torch.int64),
        mask=torch.ones(1, 4, dtype=torch.bool),
    )
    assert instance_neighbors(batch, 3).index[0, 0].tolist() == [3, 1, 2]
    assert nearest_instances(batch, 0, 0, 3) == [3, 1, 2]


def test_ties_are_broken_by_score_then_class_then_box() -> None:
    """Four instances with the centre of the first: each pair differs in one more key."""
    boxes = torch.tensor([[[0.25, 0.25, 0.75, 0.75]] * 5])
    boxes[0, 4] = torch.tensor([0.125, 0.25, 0.875, 0.75])
    batch = RegionBatch(
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

    actual = label_neighbors(torch.tensor(words, dtype=dtype), neighbors).tolist()
    assert len(actual) == len(words)
    for i, word in enumerate(words):
        others = [j for j in range(len(words)) if j != i]
        nearest = sorted(others, key=lambda j: (-signed_square_of_cosine(word, words[j]), j))
        assert actual[i] == (others if neighbors is None else nearest[:neighbors])
        assert set(nearest_labels(torch.tensor(words, dtype=dtype), i, neighbors)) == set(actual[i])


@pytest.mark.parametrize("seed", range(10))
def test_equal_cosines_tie_whatever_their_last_bit(seed: int) -> None:
    """Multiples of one vector: all cosines are 1, so the lowest label numbers are nearest."""
    factors = torch.tensor([3.0, 0.7, 1.0, 5.3, 0.1, 2.9], dtype=torch.float64)
    words = factors[:, None] * vectors(1, seed=seed)
    expected = [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert label_neighbors(words, 2).tolist() == expected
    assert [nearest_labels(words, i, 2) for i in range(6)] == expected


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("neighbors", [0, 1, 4, 20])
def test_label_neighbors_in_blocks_of_rows_are_those_of_one_block(
    monkeypatch: pytest.MonkeyPatch, rows: int, neighbors: int
) -> None:
    labels = 17
    words = vectors(labels, seed=3)
    words[5] = 2 * words[3]  # ties
    whole = label_neighbors(words, neighbors)
    assert whole.shape == (labels, min(neighbors, labels - 1))
    sorted_at_once: list[int] = []
    argsort = torch.Tensor.argsort

    def counted(values: torch.Tensor, **options: Any) -> torch.Tensor:
        sorted_at_once.append(len(values))
        return argsort(values, **options)

    monkeypatch.setattr(torch.Tensor, "argsort", counted)
    monkeypatch.setattr(graphs, "_BLOCK_BYTES", rows * labels * 8 + 7)
    assert torch.equal(label_neighbors(words, neighbors), whole)
    assert max(sorted_at_once) == rows
    assert sum(sorted_at_once) == labels


def test_label_neighbors_are_searched_once_for_many_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches = 0

    def counted(words: torch.Tensor, neighbors: int | None) -> torch.Tensor:
        nonlocal searches
        searches += 1
        return label_neighbors(words, neighbors)

    monkeypatch.setattr(graphs, "label_neighbors", counted)
    network, words = net(label_neighbors=2), vectors(7)
    for images in (1, 2, 3):
        score(network, make_batch(images), words)
    assert searches == 1
    score(network, make_batch(), words, label_graph=False)
    assert searches == 1
    score(network, make_batch(), vectors(7, seed=1))  # other vectors have other neighbours
    assert searches == 2
