"""WSDDN against plain loops, and what it can learn."""

from __future__ import annotations

import pytest
import torch
from plain_loops import check_against, linear, real_regions, softmax
from tiny import C, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.pooling.wsddn import Wsddn


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Wsddn)
    h = real_regions(head, batch, image)
    if head.hidden is not None:
        h = [linear(head.hidden, x).clamp(min=0) for x in h]
    of_labels = [softmax(list(linear(head.classification, x))) for x in h]
    logits = [linear(head.detection, x) for x in h]
    of_regions = [softmax([logit[c] for logit in logits]) for c in range(C)]
    scores, said = [], []
    for c in range(C):
        shares = [of_labels[m][c] * of_regions[c][m] for m in range(len(h))]
        total = sum(shares[1:], shares[0])
        scores.append((total / (1 - total + 1e-6)).log())
        said.append(torch.stack(shares))
    return torch.stack(scores), torch.stack(said, dim=1)


@pytest.mark.parametrize("hidden_size", [0, 16])
def test_it_equals_plain_loops(hidden_size: int) -> None:
    head = make_head("wsddn", hidden_size=hidden_size)
    check_against(head, make_batch(4), make_label_set(), by_hand)


def test_the_region_that_shows_a_label_wins_it() -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    head = make_head("wsddn", dtype=torch.float32)
    fit(head, batch, labels, truth, steps=100)
    assert right_regions(head, batch, labels, kinds) > 0.95


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_label_that_is_wrong_beyond_doubt_still_learns(scale: float) -> None:
    head = make_head("wsddn", dtype=torch.float32)
    with torch.no_grad():
        head.classification.weight.mul_(scale)
        head.detection.weight.mul_(scale)
    output = head(make_batch(4, full=True, dtype=torch.float32), make_label_set())
    assert output.image.isfinite().all()
    for wrong in (-1, 1):
        head.zero_grad()
        torch.nn.functional.softplus(wrong * output.image).sum().backward(retain_graph=True)
        assert head.classification.weight.grad.isfinite().all()


def test_probabilities_of_a_label_alone() -> None:
    head = make_head("wsddn", labels=1)
    scores = head(make_batch(4), make_label_set(1)).image.sigmoid()
    assert (scores > 0.99999).all()
