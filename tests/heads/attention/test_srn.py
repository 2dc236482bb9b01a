"""SRN against plain loops, and what it can learn of where labels lie."""

from __future__ import annotations

from dataclasses import replace

import torch
from plain_loops import check_against, linear, real_regions, softmax, whole_view
from tiny import C, D, make_batch, make_head, make_label_set
from torch import Tensor, nn
from toy_fits import fit, ranking

from pipeline.heads.attention.srn import Srn, coverage
from pipeline.heads.contract import Head, LabelSet, RegionBatch

R = 3


def convolved(layer: nn.Conv2d, raster: list[list[Tensor]]) -> list[list[Tensor]]:
    """A 1x1 convolution of a raster of vectors."""
    weights = layer.weight[:, :, 0, 0]
    bias = 0 if layer.bias is None else layer.bias
    return [[weights @ cell + bias for cell in row] for row in raster]


def normalised(layer: nn.GroupNorm, raster: list[list[Tensor]]) -> list[list[Tensor]]:
    """A group norm and a ReLU of a raster of vectors."""
    cells = torch.stack([torch.stack(row) for row in raster])
    size = layer.num_channels // layer.num_groups
    groups = []
    for start in range(0, layer.num_channels, size):
        values = cells[:, :, start : start + size]
        groups.append((values - values.mean()) / (values.var(correction=0) + layer.eps) ** 0.5)
    cells = (torch.cat(groups, dim=2) * layer.weight + layer.bias).clamp(min=0)
    return [list(row) for row in cells]


def spatial(layers: nn.Sequential, raster: list[list[Tensor]]) -> Tensor:
    first, norm1, _, second, norm2, _, third, norm3, _, _, _, last = layers
    raster = normalised(norm1, convolved(first, raster))
    raster = normalised(norm2, convolved(second, raster))
    found = []
    for channel in range(second.out_channels):
        for kernel in third.weight[4 * channel : 4 * channel + 4, 0]:
            cells = [kernel[y, x] * raster[y][x][channel] for y in range(R) for x in range(R)]
            found.append(sum(cells))
    return linear(last, normalised(norm3, [[torch.stack(found)]])[0][0])


def share(box: Tensor, row: int, column: int) -> float:
    """The share of a cell that a box covers."""
    left, top, right, bottom = box.tolist()
    width = min(right, (column + 1) / R) - max(left, column / R)
    height = min(bottom, (row + 1) / R) - max(top, row / R)
    return max(width, 0) * max(height, 0) * R * R


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Srn)
    first, _, second, _, third = head.attention
    features = real_regions(head, batch, image)
    hidden = [linear(first, x).clamp(min=0) for x in features]
    logits = [linear(third, linear(second, h).clamp(min=0)) for h in hidden]
    attention = [softmax([logit[c] for logit in logits]) for c in range(C)]
    weighted = []
    for m, x in enumerate(features):
        sure = linear(head.confidence, x).sigmoid()
        weighted.append(torch.stack([sure[c] * attention[c][m] for c in range(C)]))

    def cell(row: int, column: int) -> Tensor:
        boxes = batch.boxes[image]
        parts = [one * share(boxes[m], row, column) for m, one in enumerate(weighted)]
        return sum(parts[1:], parts[0])

    raster = [[cell(row, column) for column in range(R)] for row in range(R)]
    whole = linear(head.classifier, whole_view(head, batch, image))
    return (whole + spatial(head.relations, raster)) / 2, torch.stack(weighted)


def test_it_equals_plain_loops() -> None:
    check_against(
        make_head("srn", raster=R, whole_region=False), make_batch(4), make_label_set(), by_hand
    )


def test_coverage_of_cells() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 1.0, 0.75], [0.0, 0.0, 0.0, 0.0]]])
    expected = torch.tensor([[[1.0, 1], [1, 1]], [[0, 0], [0.25, 0.5]], [[0, 0], [0, 0]]])
    assert torch.equal(coverage(boxes, 2)[0], expected)


def relations(images: int, seed: int) -> tuple[RegionBatch, Tensor]:
    """Two things anywhere; the labels (B, 2): the first is left of the second, and above it."""
    generator = torch.Generator().manual_seed(seed)
    corners = 0.8 * torch.rand(images, 2, 2, generator=generator)
    features = torch.zeros(images, 2, D)
    features[:, 0, 0] = features[:, 1, 1] = 2.0
    batch = make_batch(images, 2, full=True, dtype=torch.float32)
    batch = replace(
        batch,
        features=features,
        boxes=torch.cat([corners, corners + 0.2], dim=2),
        whole=torch.zeros(images, D),
    )
    return batch, (corners[:, 0] < corners[:, 1]).long()


def test_it_learns_how_things_lie_to_each_other() -> None:
    head = make_head("srn", labels=2, dtype=torch.float32, raster=7)
    labels = make_label_set(2, dtype=torch.float32)
    batch, truth = relations(150, seed=0)
    fit(head, batch, labels, truth, steps=50, rate=0.005)
    batch, truth = relations(150, seed=1)
    assert ranking(head, batch, labels, truth) > 0.9


def test_it_trains_on_a_single_image() -> None:
    # Batch norms would refuse it.
    head = make_head("srn").train()
    output = head(make_batch(1), make_label_set())
    assert output.image.isfinite().all()
