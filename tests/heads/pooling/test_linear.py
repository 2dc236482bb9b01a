"""Linear probes, and the one on the detector's scores."""

from __future__ import annotations

import pytest
import torch
from plain_loops import check_against, real_regions, whole_view
from tiny import CLASSES, C, D, assert_same, make_batch, make_head, make_label_set
from torch import Tensor

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.pooling.linear import Linear
from pipeline.heads.pooling.linear_scores import LinearScores


def vector_by_hand(head: Linear, batch: RegionBatch, image: int) -> Tensor:
    if head.of == "whole":
        return whole_view(head, batch, image)
    regions = real_regions(head, batch, image)
    if head.of == "mean":
        return sum(regions[1:], regions[0]) / len(regions)
    return torch.stack([max(region[d] for region in regions) for d in range(D)])


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Linear)
    vector, layer = vector_by_hand(head, batch, image), head.classifier
    scores = [
        layer.bias[c] + sum(layer.weight[c, d] * vector[d] for d in range(D)) for c in range(C)
    ]
    return torch.stack(scores), None


@pytest.mark.parametrize("of", ["whole", "mean", "max"])
def test_a_probe_equals_plain_loops(of: str) -> None:
    check_against(make_head(f"linear-{of}"), make_batch(5), make_label_set(), by_hand)


def test_the_scores_of_the_detector_by_class() -> None:
    head, batch = make_head("linear-scores"), make_batch(6)
    assert isinstance(head, LinearScores)
    expected = []
    for image in range(6):
        best = dict.fromkeys(range(CLASSES), 0.0)
        for m in range(batch.mask.shape[1]):
            if batch.mask[image, m]:
                number = int(batch.classes[image, m])
                best[number] = max(best[number], float(batch.scores[image, m]))
        vector = torch.tensor(list(best.values()), dtype=torch.float64)
        expected.append(head.classifier.weight @ vector + head.classifier.bias)
    assert_same(head(batch, make_label_set()).image, torch.stack(expected))


def test_a_class_that_no_training_region_had_is_not_read() -> None:
    head, batch = make_head("linear-scores"), make_batch(3, full=True)
    labels = make_label_set()
    strange = batch.each(torch.clone)
    strange.classes[0, 1] = CLASSES + 20
    without = strange.each(torch.clone)
    without.mask[0, 1] = False
    assert_same(head(strange, labels).image, head(without, labels).image)
