"""CMA against its equations, and the embedding of its labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_loops import check_against, real_regions
from tiny import C, W, assert_same, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.label_graphs.cma import Cma, embed_labels, similarities


def length(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum())


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Cma)
    regions = []
    for x in real_regions(head, batch, image):
        hidden = head.first.weight @ x + head.first.bias
        hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
        regions.append(head.second.weight @ hidden + head.second.bias)
    logits, said = [], []
    for c in range(C):
        e = head.embeddings[c]
        # The cosine with a vector of zeros counts as 0.
        similar = [(v @ e) / (length(v) * length(e)) if e.any() else 0 * v[0] for v in regions]
        kept = [z if z > 0 else 0 * z for z in similar]
        total = sum(kept[1:], kept[0])
        shares = [z / total if total > 0 else 0 * z + 1 / len(kept) for z in kept]
        parts = [share * v for share, v in zip(shares, regions, strict=True)]
        node = sum(parts[1:], parts[0])
        logits.append(head.classifiers.weight[c] @ node + head.classifiers.bias[c])
        said.append(torch.stack(shares))
    return torch.stack(logits), torch.stack(said, dim=1)


def test_cma_equals_plain_loops() -> None:
    check_against(make_head("cma"), make_batch(8), make_label_set(), by_hand)


def test_a_label_that_resembles_no_region_reads_all_equally() -> None:
    head, batch, labels = make_head("cma"), make_batch(4), make_label_set()
    assert isinstance(head, Cma)
    head.embeddings[1] = 0
    attention = head(batch, labels).regions
    assert attention is not None
    equal = batch.mask.double() / batch.mask.sum(dim=1, keepdim=True)
    assert_same(attention[..., 1], equal)
    check_against(head, batch, labels, by_hand)


def test_embedded_labels_resemble_each_other_as_often_as_they_occur_together() -> None:
    # The vectors say nothing of it: they are orthogonal.
    conditional = torch.tensor([[0.0, 0.9, 0.0], [0.7, 0.0, 0.05], [0.0, 0.05, 0.0]])
    torch.manual_seed(0)
    embeddings = embed_labels(
        torch.eye(3, W), conditional, hidden_size=32, size=16, least_similarity=0.1
    )
    cosines = similarities(embeddings)
    assert not embeddings.requires_grad
    assert_same(cosines[0, 1], torch.tensor(0.8), 0.02)
    assert cosines[0, 2] < 0.12
    assert cosines[1, 2] < 0.12


def test_labels_that_are_apart_are_left_alone() -> None:
    # Opposite vectors, and a label that comes with another less often than alpha: no loss.
    vectors = torch.zeros(2, W)
    vectors[0, 0], vectors[1, 1] = 1, 1
    conditional = torch.tensor([[0.0, 0.2], [0.2, 0.0]])
    found = []
    for least in (0.0, 1.0):
        torch.manual_seed(1)
        found.append(
            similarities(
                embed_labels(vectors, conditional, hidden_size=16, size=8, least_similarity=least)
            )[0, 1]
        )
    assert_same(found[0], torch.tensor(0.2), 0.02)
    assert (found[1] - 0.2).abs() > 0.05


@pytest.mark.parametrize("least", [0.0, 0.1])
def test_the_embeddings_are_those_of_the_seed(least: float) -> None:
    one, same, other = (make_head("cma", seed=seed, least_similarity=least) for seed in (0, 0, 1))
    assert torch.equal(one.embeddings, same.embeddings)
    assert not torch.equal(one.embeddings, other.embeddings)
    assert "embeddings" in one.state_dict()


def test_the_embeddings_are_fixed_when_regions_are_learnt() -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    labels = replace(labels, conditional=torch.zeros(C, C))
    head = make_head("cma", dtype=torch.float32, label_set=labels)
    assert isinstance(head, Cma)
    before = head.embeddings.clone()
    fit(head, batch, labels, truth)
    assert torch.equal(head.embeddings, before)
    # A cosine weighs all that resembles a label, so that the best region stands out but little.
    assert right_regions(head, batch, labels, kinds) > 0.6
