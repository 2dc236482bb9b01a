"""CSRA against its equations, region by region."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_loops import check_against, real_regions, whole_view
from tiny import C, D, assert_same, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.pooling.csra import Csra


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Csra)
    regions = real_regions(head, batch, image)
    logits, said = [], []
    for c in range(C):
        total = head.bias[c]
        of_regions = [head.bias[c] for _ in regions]
        for h, temperature in enumerate(head.temperatures):
            w = head.classifiers[h, c]
            length = torch.sqrt(sum((w[d] ** 2 for d in range(D)), torch.zeros(())))

            def score(x: Tensor, w: Tensor = w, length: Tensor = length) -> Tensor:
                return sum((w[d] * x[d] for d in range(D)), torch.zeros(())) / length

            scores = [score(x) for x in regions]
            if head.base == "whole":
                base = score(whole_view(head, batch, image))
            else:
                base = sum(scores[1:], scores[0]) / len(scores)
            if temperature == 99:
                best = max(scores)
            else:
                shares = [torch.exp(temperature * s) for s in scores]
                best = sum(a * s for a, s in zip(shares, scores, strict=True)) / sum(shares)
            total = total + base + head.weight * best
            of_regions = [one + 1.7 * s for one, s in zip(of_regions, scores, strict=True)]
        logits.append(total)
        said.append(torch.stack(of_regions))
    return torch.stack(logits), torch.stack(said, dim=1)


@pytest.mark.parametrize("base", ["whole", "mean"])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_csra_equals_plain_loops(base: str, heads: int) -> None:
    head = make_head("csra", base=base, heads=heads, weight=0.7)
    check_against(head, make_batch(4), make_label_set(), by_hand)


@pytest.mark.parametrize("heads", [1, 4])
def test_what_a_region_says_is_what_an_image_of_it_alone_would_score(heads: int) -> None:
    head, labels = make_head("csra", heads=heads), make_label_set()
    head.inputs.whole_mean.copy_(head.inputs.feature_mean)
    head.inputs.whole_scale.copy_(head.inputs.feature_scale)
    batch = make_batch(4, regions=1)
    alone = replace(batch, whole=batch.features[:, 0])
    assert_same(head(alone, labels).image, head(batch, labels).regions[:, 0])


def test_the_region_that_shows_a_label_wins_it() -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    head = make_head("csra", dtype=torch.float32, base="mean")
    fit(head, batch, labels, truth)
    assert right_regions(head, batch, labels, kinds) > 0.95
