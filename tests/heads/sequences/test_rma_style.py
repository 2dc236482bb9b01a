"""The head in RMA's style against its equations, window by window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_loops import check_against, linear, lstm, real_regions, whole_view
from tiny import HIDDEN, C, D, make_batch, make_head, make_label_set, make_truth
from torch import Tensor
from toy_fits import fit, ranking

from pipeline.heads.contract import Head, LabelSet, RegionBatch
from pipeline.heads.sequences.rma_style import RmaStyle, constraints
from pipeline.settings import OwnLoss

ANCHORS = ((0, 0), (0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5))


def fits(window: Tensor, box: Tensor) -> Tensor:
    """10 IoU less the squared distance of the centres, in coordinates from -1 to 1."""
    sx, sy, tx, ty = window
    x1, y1, x2, y2 = (2 * b - 1 for b in box)
    wide = torch.minimum(x2, tx + abs(sx)) - torch.maximum(x1, tx - abs(sx))
    high = torch.minimum(y2, ty + abs(sy)) - torch.maximum(y1, ty - abs(sy))
    shared = wide * high if wide > 0 and high > 0 else torch.zeros((), dtype=torch.float64)
    union = (x2 - x1) * (y2 - y1) + 4 * abs(sx * sy) - shared
    return 10 * shared / union - (tx - (x1 + x2) / 2) ** 2 - (ty - (y1 + y2) / 2) ** 2


def walk(head: RmaStyle, batch: RegionBatch, image: int) -> tuple[list, list, list]:
    """Scores, windows and weights of the regions, for k from 1 to 5."""
    regions, boxes = real_regions(head, batch, image), batch.boxes[image]
    state = (torch.zeros(HIDDEN, dtype=torch.float64),) * 2
    seen = whole_view(head, batch, image)
    scores, windows, weights = [], [], []
    for k in range(6):
        state = lstm(head.cell, linear(head.read, seen), state)
        z = linear(head.after, state[0]).relu()
        if k > 0:
            scores.append(linear(head.output, z))
        if k < 5:
            windows.append(linear(head.window, z))
            shares = [torch.exp(fits(windows[-1], boxes[m])) for m in range(len(regions))]
            weights.append([share / sum(shares) for share in shares])
            pairs = zip(weights[-1], regions, strict=True)
            seen = sum((a * x for a, x in pairs), torch.zeros(()))
    return scores, windows, weights


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, RmaStyle)
    scores, _, weights = walk(head, batch, image)
    best = [max(range(5), key=lambda k, c=c: scores[k][c].item()) for c in range(C)]
    logits = torch.stack([scores[best[c]][c] for c in range(C)])
    return logits, torch.stack([torch.stack(weights[best[c]]) for c in range(C)], dim=1)


def test_rma_style_equals_plain_loops() -> None:
    head = make_head("rma-style", whole_region=False)
    check_against(head, make_batch(6), make_label_set(), by_hand)


def test_the_loss_equals_plain_loops() -> None:
    head, batch, labels, truth = (
        make_head("rma-style", whole_region=False),
        make_batch(6),
        make_label_set(),
        make_truth(6),
    )
    truth[0] = 0
    truth[1] = torch.tensor([-1, 1, 0])
    expected = torch.zeros((), dtype=torch.float64)
    for image in range(6):
        scores, windows, _ = walk(head, batch, image)
        kept = [c for c in range(C) if truth[image, c] >= 0]
        has = [c for c in kept if truth[image, c] == 1]
        top = {c: torch.exp(max(one[c] for one in scores)) for c in kept}
        for c in kept if has else ():
            target = 1 / len(has) if c in has else 0.0
            expected = expected + (top[c] / sum(top.values()) - target) ** 2 / 6
        for window, anchor in zip(windows, ANCHORS, strict=True):
            for axis in (0, 1):
                s, t = window[axis], window[2 + axis]
                large = torch.clamp(abs(s) - 0.5, min=0) ** 2
                far = 0.005 * (t - anchor[axis]) ** 2
                expected = expected + 0.1 * (large + far + 0.1 * torch.clamp(0.1 - s, min=0)) / 6
    found = head(batch, labels, truth).loss
    torch.testing.assert_close(found, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, list(head.parameters())))


def test_an_image_whose_labels_are_all_ignored() -> None:
    head, labels = make_head("rma-style", whole_region=False), make_label_set()
    output = head(make_batch(2), labels, torch.tensor([[-1, -1, -1], [1, 0, 0]]))
    output.loss.backward()
    assert output.loss.isfinite()
    assert head.cell.weight_hh.grad.isfinite().all()


def test_windows_at_their_anchors_of_an_allowed_size_cost_nothing() -> None:
    head = make_head("rma-style", dtype=torch.float32)
    assert isinstance(head, RmaStyle)
    windows = torch.cat([torch.full((5, 2), 0.3), head.anchors], dim=1)[None]
    assert constraints(windows, head.anchors) == 0
    assert constraints(windows + torch.tensor([0.3, 0, 0, 0]), head.anchors) == pytest.approx(0.05)


@pytest.mark.parametrize(("variant", "tells"), [("rma-style", True), ("linear-mean", False)])
def test_windows_tell_where_things_stand(variant: str, tells: bool) -> None:
    # One of three corners shows a thing, and which one it is tells the label. Regardless of place,
    # all images show the same.
    generator = torch.Generator().manual_seed(4)
    images, corners = 64, torch.tensor([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]])
    place = torch.randint(0, 3, (images,), generator=generator)
    shown = torch.nn.functional.one_hot(place, 4).float()
    boxes = torch.cat([corners, corners + 0.5], dim=1).expand(images, 4, 4)
    batch = make_batch(images, 4, full=True, dtype=torch.float32)
    features = torch.zeros(images, 4, D)
    features[..., 0] = 2 * shown
    batch = replace(batch, features=features, boxes=boxes, whole=features.mean(dim=1))
    truth, labels = shown[:, :C].long(), make_label_set(dtype=torch.float32)
    head = make_head(variant, dtype=torch.float32)
    loss = OwnLoss(name="own") if tells else None
    fit(head, batch, labels, truth, steps=300, rate=0.01, loss=loss)
    assert (ranking(head, batch, labels, truth) > 0.95) == tells
