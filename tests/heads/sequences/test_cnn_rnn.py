"""CNN-RNN against its equations, and its beam search against lists of paths."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from plain_loops import check_against, linear, log_probabilities, lstm, whole_view
from tiny import HIDDEN, C, make_batch, make_head, make_label_set, make_truth
from torch import Tensor
from toy_fits import fit

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.sequences.cnn_rnn import CnnRnn, ordered_targets
from pipeline.settings import OwnLoss

State = tuple[Tensor, Tensor]


def step(head: CnnRnn, image: Tensor, symbol: int | None, state: State) -> tuple[Tensor, State]:
    """Scores after a symbol, None for the start."""
    before = head.first_embedding if symbol is None else head.embeddings[symbol]
    state = lstm(head.cell, before, state)
    x = (linear(head.of_hidden, state[0]) + image).relu()
    return torch.stack([(u * x).sum() for u in head.embeddings]), state


def along(head: CnnRnn, image: Tensor, path: tuple[int, ...]) -> list[list[Tensor]]:
    """Log probabilities of all symbols at each step of a path."""
    state: State = (torch.zeros(HIDDEN, dtype=torch.float64),) * 2
    symbol, steps = None, []
    for following in path:
        scores, state = step(head, image, symbol, state)
        steps.append(log_probabilities(scores))
        symbol = following
    return steps


def searched(head: CnnRnn, image: Tensor) -> tuple[int, ...]:
    """The path that a beam search finds."""
    paths: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(head.steps):
        longer = []
        for total, path in paths:
            if path and path[-1] == C:
                longer.append((total, path))
                continue
            last = along(head, image, (*path, 0))[-1]
            longer += [(total + last[c].item(), (*path, c)) for c in range(C + 1)]
        paths = sorted(longer, key=lambda one: -one[0])[: head.beams]
    return paths[0][1]


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, CnnRnn)
    projection = linear(head.of_image, whole_view(head, batch, image))
    steps = along(head, projection, searched(head, projection))
    best = [max(log_p[c] for log_p in steps) for c in range(C)]
    return torch.stack([p - torch.log(1 - torch.exp(p)) for p in best]), None


@pytest.mark.parametrize("beams", [1, 2, 7])
def test_cnn_rnn_equals_plain_loops(beams: int) -> None:
    head = make_head("cnn-rnn", steps=3, beams=beams)
    check_against(head, make_batch(5), make_label_set(), by_hand)


def test_enough_beams_find_the_most_probable_path() -> None:
    head, batch, labels = make_head("cnn-rnn", steps=3, beams=64), make_batch(6), make_label_set()
    greedy = make_head("cnn-rnn", steps=3, beams=1)
    differs = False
    for image in range(6):
        projection = linear(head.of_image, whole_view(head, batch, image))

        def likely(path: tuple[int, ...], projection: Tensor = projection) -> float:
            steps = along(head, projection, path)
            return sum(log_p[c].item() for log_p, c in zip(steps, path, strict=True))

        paths = [
            path
            for length in (1, 2, 3)
            for path in product(range(C + 1), repeat=length)
            if C not in path[:-1] and (length == 3 or path[-1] == C)
        ]
        best = max(paths, key=likely)
        steps = along(head, projection, best)
        expected = torch.stack([max(log_p[c] for log_p in steps) for c in range(C)]).sigmoid()
        found = head(batch, labels).image[image].sigmoid().log()
        torch.testing.assert_close(found, expected.logit())
        differs = differs or searched(greedy, projection) != best
    assert differs  # else any search would do


def test_the_loss_equals_plain_loops() -> None:
    head, batch, labels, truth = (
        make_head("cnn-rnn", steps=4),
        make_batch(6),
        make_label_set(),
        make_truth(6),
    )
    truth[0] = 0
    expected = torch.zeros((), dtype=torch.float64)
    for image in range(6):
        has = [c for c in range(C) if truth[image, c] == 1]
        path = (*sorted(has, key=lambda c: -labels.ratio[c].item()), C)
        projection = linear(head.of_image, whole_view(head, batch, image))
        kept = [c for c in range(C + 1) if c == C or truth[image, c] >= 0]
        for log_p, symbol in zip(along(head, projection, path), path, strict=True):
            possible = torch.log(sum(torch.exp(log_p[c]) for c in kept))
            expected = expected - (log_p[symbol] - possible) / 6
    found = head(batch, labels, truth).loss
    torch.testing.assert_close(found, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, list(head.parameters())))


def test_targets_are_ordered_by_frequency() -> None:
    truth = torch.tensor([[1, -1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    ratio = torch.tensor([0.1, 0.2, 0.4, 0.3])
    assert ordered_targets(truth, ratio, 6).tolist() == [
        [2, 3, 0, 4, -1, -1],
        [4, -1, -1, -1, -1, -1],
        [1, 4, -1, -1, -1, -1],
    ]
    assert ordered_targets(truth, ratio, 2).tolist() == [[2, 3], [4, -1], [1, 4]]


def test_a_label_is_certain_once_its_companion_is_predicted() -> None:
    # Images show nothing: 3 in 5 have the labels 0 and 1, the others have label 2 alone. So the
    # share of images with label 1 is 0.6, but it is certain on the most probable path.
    batch = make_batch(60, 2, full=True, dtype=torch.float32)
    batch = batch.each(lambda x: x[:1].expand(60, *x.shape[1:]))
    pair = torch.arange(60) % 5 < 3
    truth = torch.stack([pair, pair, ~pair], dim=1).long()
    labels = make_label_set(dtype=torch.float32)
    head = make_head("cnn-rnn", dtype=torch.float32, steps=3)
    fit(head, batch, labels, truth, steps=80, loss=OwnLoss(name="own"))
    scores = head(batch.each(lambda x: x[:1]), labels).image.sigmoid()[0].detach()
    leading = int(labels.ratio[0] < labels.ratio[1])
    assert scores[leading] == pytest.approx(0.6, abs=0.07)
    assert scores[1 - leading] > 0.95
    assert scores[2] == pytest.approx(0.4, abs=0.07)
