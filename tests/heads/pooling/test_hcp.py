"""HCP against plain loops, and what its two losses teach it."""

from __future__ import annotations

import torch
from plain_loops import check_against, linear, real_regions
from tiny import C, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.pooling.hcp import Hcp


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Hcp)
    scores = [linear(head.classifier, x) for x in real_regions(head, batch, image)]
    best = [max(score[c] for score in scores) for c in range(C)]
    return torch.stack(best), torch.stack(scores)


def test_it_equals_plain_loops() -> None:
    check_against(make_head("hcp"), make_batch(4), make_label_set(), by_hand)


def test_the_region_that_shows_a_label_wins_it() -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    head = make_head("hcp-bce", dtype=torch.float32, least_deviation=0.1)
    fit(head, batch, labels, truth, rate=0.05)
    assert right_regions(head, batch, labels, kinds) > 0.95


def test_its_squared_loss_ranks_the_labels_of_an_image() -> None:
    batch, truth, _ = kinds_problem()
    some = (truth == 1).any(dim=1)
    batch, truth = batch.each(lambda x: x[some]), truth[some].float()
    head, labels = make_head("hcp", dtype=torch.float32), make_label_set(dtype=torch.float32)
    assert isinstance(head, Hcp)
    torch.nn.init.zeros_(head.classifier.weight)  # as training starts
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        shares = head(batch, labels).image.softmax(dim=1)
        loss = (shares - truth / truth.sum(dim=1, keepdim=True)).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = head(batch, labels).image
    lowest = scores.masked_fill(truth == 0, torch.inf).amin(dim=1)
    highest = scores.masked_fill(truth == 1, -torch.inf).amax(dim=1)
    assert (lowest > highest).double().mean() > 0.95
