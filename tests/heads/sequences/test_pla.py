"""PLA against its equations, step by step, and its alignment against all permutations."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from plain_loops import check_against, linear, log_probabilities, lstm, real_regions, whole_view
from tiny import C, make_batch, make_head, make_label_set, make_truth
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.sequences.pla import Pla, aligned_targets
from pipeline.settings import OwnLoss

OWN = OwnLoss(name="own")


def walk(
    head: Pla, batch: RegionBatch, image: int, ignored: tuple[int, ...] = ()
) -> list[tuple[Tensor, int, list[Tensor]]]:
    """Scores, emitted symbol and attention of each step."""
    regions, g = real_regions(head, batch, image), whole_view(head, batch, image)
    state, symbol = (linear(head.first_hidden, g), linear(head.first_cell, g)), C + 1
    steps = []
    for _ in range(head.steps):
        fits = [
            linear(
                head.affinity, (linear(head.of_region, x) + linear(head.of_hidden, state[0])).relu()
            )
            for x in regions
        ]
        shares = [torch.exp(fit[0]) for fit in fits]
        attention = [share / sum(shares) for share in shares]
        seen = sum((a * x for a, x in zip(attention, regions, strict=True)), torch.zeros(()))
        gate = torch.sigmoid(linear(head.gate, state[0]))
        state = lstm(head.cell, torch.cat([head.embeddings.weight[symbol], gate * seen]), state)
        scores = linear(head.output, state[0])
        symbol = max((c for c in range(C + 1) if c not in ignored), key=lambda c: scores[c].item())
        steps.append((scores, symbol, attention))
    return steps


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Pla)
    best = [torch.tensor(-1e9, dtype=torch.float64)] * C
    said: dict[int, list[Tensor]] = {}
    for scores, symbol, attention in walk(head, batch, image):
        log_p = log_probabilities(scores)
        best = [max(best[c], log_p[c]) for c in range(C)]
        if symbol == C:
            break
        said.setdefault(symbol, attention)
    logits = [-torch.log(1 - torch.exp(p)) if c in said else p for c, p in enumerate(best)]
    nothing = [torch.zeros((), dtype=torch.float64)] * int(batch.mask[image].sum())
    regions = [torch.stack(said.get(c, nothing)) for c in range(C)]
    return torch.stack(logits), torch.stack(regions, dim=1)


def test_pla_equals_plain_loops() -> None:
    head, batch, labels = make_head("pla", steps=5), make_batch(8, seed=1), make_label_set()
    check_against(head, batch, labels, by_hand)
    # The comparison is worth something if images differ in what they emit, and in how much.
    sizes = (head(batch, labels).image > 0).sum(dim=1)
    assert len(sizes.unique()) > 1
    # A label that is not emitted has no winning region.
    output = head(batch, labels)
    assert torch.equal(output.winners() >= 0, output.image > 0)


def test_the_loss_equals_plain_loops() -> None:
    head, batch, labels, truth = (
        make_head("pla", steps=4),
        make_batch(6),
        make_label_set(),
        make_truth(6),
    )
    truth[0] = 0
    expected = torch.zeros((), dtype=torch.float64)
    for image in range(6):
        ignored = tuple(c for c in range(C) if truth[image, c] < 0)
        steps = walk(head, batch, image, ignored)
        has = [c for c in range(C) if truth[image, c] == 1]
        kept = [c for c in range(C + 1) if c not in ignored]
        log_p = [
            dict(zip(kept, log_probabilities(scores[kept]), strict=True)) for scores, _, _ in steps
        ]
        order = best_order([one for _, one, _ in steps], log_p, has)
        for step, symbol in enumerate([*order, C]):
            expected = expected - log_p[step][symbol] / 6
    found = head(batch, labels, truth).loss
    torch.testing.assert_close(found, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, list(head.parameters())))


def best_order(emitted: list[int], log_p: list, has: list[int]) -> tuple[int, ...]:
    """The order of least cost among all that keep emitted labels where they are emitted first."""
    firsts = {c: emitted.index(c) for c in has if c in emitted[: len(has)]}
    allowed = [
        order for order in permutations(has) if all(order[t] == c for c, t in firsts.items())
    ]
    return min(allowed, key=lambda order: -sum(log_p[t][c].item() for t, c in enumerate(order)))


def test_the_alignment_is_the_best_of_all_orders() -> None:
    generator = torch.Generator().manual_seed(3)
    log_p = torch.randn(30, 7, 6, generator=generator).double().log_softmax(dim=2)
    truth = torch.randint(-1, 2, (30, 5), generator=generator)
    symbols = log_p.argmax(dim=2)
    targets = aligned_targets(log_p, symbols, truth).tolist()
    for image in range(30):
        has = [c for c in range(5) if truth[image, c] == 1]
        order = best_order(symbols[image].tolist(), list(log_p[image]), has)
        assert targets[image] == [*order, 5, *[-1] * (6 - len(has))]


def test_more_labels_than_steps() -> None:
    log_p = torch.tensor([[[0.5, 0.1, 0.3, 0.1], [0.4, 0.1, 0.45, 0.05]]]).log()
    targets = aligned_targets(log_p, log_p.argmax(dim=2), torch.ones(1, 3, dtype=torch.int64))
    assert targets.tolist() == [[0, 2]]


def test_the_step_that_emits_a_label_looks_at_its_region() -> None:
    batch, truth, kinds = kinds_problem()
    batch = replace(batch, whole=make_batch(len(truth), dtype=torch.float32).whole)
    labels = make_label_set(dtype=torch.float32)
    head = make_head("pla", dtype=torch.float32, steps=4)
    fit(head, batch, labels, truth, steps=100, loss=OWN)
    # A step looks at several labels' regions before it chooses one; by chance it would be 0.25.
    assert right_regions(head, batch, labels, kinds) > 0.6


@pytest.mark.parametrize(("variant", "alone"), [("pla", True), ("linear-whole", False)])
def test_labels_that_exclude_each_other_are_emitted_alone(variant: str, alone: bool) -> None:
    # Nothing in an image tells which of the three labels it has, only that it has one.
    batch = make_batch(192, 2, full=True, dtype=torch.float32)
    train, test = batch.each(lambda x: x[:96]), batch.each(lambda x: x[96:])
    truth = torch.nn.functional.one_hot(torch.arange(96) % 3, 3)
    labels = make_label_set(dtype=torch.float32)
    changes = {"steps": 3} if variant == "pla" else {}
    head = make_head(variant, dtype=torch.float32, **changes)
    fit(head, train, labels, truth, steps=40, loss=OWN if variant == "pla" else None)
    emitted = (head(test, labels).image > 0).sum(dim=1)
    assert ((emitted == 1).double().mean() > 0.9) == alone
