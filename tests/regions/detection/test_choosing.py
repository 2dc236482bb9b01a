"""Proposals and detections of a batch are those that torchvision chooses image by image.

On accelerators boxes suppress each other in rounds, which is checked here on the CPU.

Letters: B images of a batch, S side of a view in pixels, n boxes, P proposals of an image, K
classes including the background.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from pipeline.regions import choosing
from pipeline.regions.choosing import choose, decoded, propose, survive, survive_in_rounds

S, CLASSES = 128, 12


@pytest.fixture(params=["one by one", "in rounds"])
def suppression(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let boxes suppress each other as on a CPU, or as on an accelerator."""

    def in_rounds(
        boxes: Tensor, _: Tensor, valid: Tensor, classes: Tensor | None, *, iou: float
    ) -> Tensor:
        return survive_in_rounds(boxes, valid, classes, iou=iou)

    if request.param == "in rounds":
        monkeypatch.setattr(choosing, "_survive_one_by_one", in_rounds)


# Detections --------------------------------------------------------------------------------------


def heads_like(regions: int, threshold: float, iou: float) -> Any:
    """torchvision's `RoIHeads`, as far as the choice of detections needs them."""
    return RoIHeads(
        None,
        None,
        None,
        0.5,
        0.5,
        512,
        0.25,
        None,
        threshold,
        iou,
        regions,
    )


def crowded(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) boxes that lie in crowds, a fifth of them without width."""
    centers = rng.uniform(0, S, (int(rng.choice([1, 3, 50])), 2))[rng.integers(0, 1, n)]
    centers = centers + rng.normal(0, 3, (n, 2))
    sides = rng.uniform(10, 40, (n, 2))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1).clip(0, S)
    boxes[: n // 5, 2] = boxes[: n // 5, 0]
    return boxes


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.usefixtures("suppression")
def test_the_best_are_those_of_the_whole_nms(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Three images with crowds of proposals, few and many detections, ties, thresholds and empty
    boxes; the search begins with 1 to 1000 of up to 1320 candidates of an image."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 30, 120], 3).tolist()
    inputs: dict[str, list[Tensor]] = {"logits": [], "codes": [], "proposals": []}
    for n in counts:
        logits = np.log(rng.dirichlet(np.full(CLASSES, 0.3), n) + 1e-4)
        inputs["logits"].append(torch.tensor(logits.round() if seed % 2 else logits).float())
        inputs["codes"].append(torch.tensor(rng.normal(0, 1, (n, 4 * CLASSES))).float())
        inputs["proposals"].append(torch.tensor(crowded(rng, n)).float())
    heads = heads_like(
        regions=int(rng.choice([1, 10, 100, 5000])),
        threshold=float(rng.choice([0.0, 0.05, 0.3])),
        iou=float(rng.choice([0.02, 0.5, 0.9])),
    )
    expected = zip(
        *heads.postprocess_detections(
            torch.cat(inputs["logits"]),
            torch.cat(inputs["codes"]),
            inputs["proposals"],
            [(S, S)] * 3,
        ),
        strict=True,
    )
    monkeypatch.setattr(choosing, "_EXAMINED", int(rng.choice([1, 20, 300, 1000])))
    logits, codes, proposals = (pad_sequence(part, batch_first=True) for part in inputs.values())
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    *chosen, numbers = choose(heads, logits.softmax(-1), codes, proposals, valid, S)
    for image, (boxes, best, classes) in enumerate(expected):
        n = int(numbers[image])
        assert n == len(best)
        assert not any(part[image, n:].any() for part in chosen)
        if n:
            found_boxes, found_best, found_classes = (part[image, :n] for part in chosen)
            torch.testing.assert_close(found_best, best, rtol=0, atol=0)
            expected_rows = rows_above_the_last(boxes, best, classes)
            assert rows_above_the_last(found_boxes, found_best, found_classes) == expected_rows


def rows_above_the_last(boxes: Tensor, scores: Tensor, classes: Tensor) -> set[tuple[float, ...]]:
    """Rows of equal scores may come in any order, and which of those that tie with the last is
    open."""
    above = scores > scores[-1]
    return {
        (score, number, *box)
        for score, number, box in zip(
            scores[above].tolist(), classes[above].tolist(), boxes[above].tolist(), strict=True
        )
    }


def test_only_the_best_candidates_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """More are examined until as many detections as wanted survive, and only of images that lack
    some: the second image finds them among the first candidates."""
    examined: list[tuple[int, ...]] = []

    def noted(coder: Any, codes: Tensor, boxes: Tensor) -> Tensor:
        examined.append(tuple(codes.shape))
        return decoded(coder, codes, boxes)

    heads = heads_like(regions=40, threshold=0.0, iou=0.5)
    crowd = torch.tensor([[10.0, 10, 50, 50]]).repeat(300, 1)
    spread = torch.arange(300)[:, None] * torch.tensor([[0.4, 0.4, 0.4, 0.4]])
    spread = spread + torch.tensor([[0.0, 0, 0.3, 0.3]])
    scores = torch.randn(2, 300, CLASSES, generator=torch.Generator().manual_seed(1)).softmax(-1)
    scores[0, :, 4:] = 0  # so that the crowd has three detections in all
    monkeypatch.setattr(choosing, "decoded", noted)
    monkeypatch.setattr(choosing, "_EXAMINED", 50)
    codes, valid = torch.zeros(2, 300, 4 * CLASSES), torch.ones(2, 300, dtype=torch.bool)
    *_, numbers = choose(heads, scores, codes, torch.stack([crowd, spread]), valid, S)
    assert examined == [(2, 50, 4), (1, 200, 4), (1, 800, 4), (1, 3200, 4)]
    assert numbers.tolist() == [3, 40]


# Proposals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("suppression")
def test_proposals_are_torchvisions(seed: int) -> None:
    """For two images, with many or few ties and boxes without width; fewer or more than wanted."""
    random = torch.Generator().manual_seed(seed)
    wanted = {"training": 60, "testing": 60}
    kept = {"training": 60, "testing": 50 if seed % 4 else 500}
    rpn = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, wanted, kept, 0.7).eval()
    sides = (16, 8, 4)
    logits = [torch.randn(2, 3, side, side, generator=random) for side in sides]
    codes = [torch.randn(2, 12, side, side, generator=random) * 0.3 for side in sides]
    if seed % 2:
        logits = [of_level.round() * 20 for of_level in logits]  # many probabilities are exactly 1
    corners = torch.rand(3 * sum(side**2 for side in sides), 2, 2, generator=random) * S
    anchors = corners.sort(dim=1).values.flatten(1)
    anchors[::7, 2] = anchors[::7, 0]
    # In torchvision's order: of each level height, width and the anchors of a position.
    flat = [
        [level.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels]
        for levels in (logits, codes)
    ]
    objectness, deltas = (torch.cat(levels, dim=1) for levels in flat)
    boxes = rpn.box_coder.decode(deltas.flatten(0, 1), [anchors, anchors]).view(2, -1, 4)
    expected, scores = rpn.filter_proposals(
        boxes, objectness, [(S, S)] * 2, [3 * side**2 for side in sides]
    )
    proposals, valid = propose(rpn, logits, codes, anchors, S)
    assert proposals.shape[1] == min(kept["testing"], 60 + 60 + 48)
    for image, of_image in enumerate(expected):
        assert valid[image].tolist() == [n < len(of_image) for n in range(proposals.shape[1])]
        found = proposals[image, : len(of_image)]
        if not seed % 2:
            torch.testing.assert_close(found, of_image, rtol=0, atol=0)
            continue
        above = scores[image] > scores[image][-1]
        assert {*map(tuple, found[above].tolist())} == {*map(tuple, of_image[above].tolist())}


# Parts -------------------------------------------------------------------------------------------


def greedy(boxes: Tensor, valid: Tensor, classes: Tensor | None, iou: float) -> list[bool]:
    """The definition of the non-maximum suppression, box by box."""
    overlaps, kept = box_iou(boxes, boxes), []
    for n, is_valid in enumerate(valid.tolist()):
        suppressed = any(
            kept[k] and overlaps[k, n] > iou and (classes is None or classes[k] == classes[n])
            for k in range(n)
        )
        kept.append(is_valid and not suppressed)
    return kept


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.booleans())
def test_boxes_that_survive_in_rounds_are_those_of_the_definition(
    seed: int, iou: float, with_classes: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, 30, 2, 2, generator=random) * S
    boxes = corners.sort(dim=2).values.flatten(2)
    valid = torch.rand(2, 30, generator=random) > 0.2
    classes = torch.randint(0, 3, (2, 30), generator=random) if with_classes else None
    survivors = survive_in_rounds(boxes, valid, classes, iou=iou)
    for image in range(2):
        own = None if classes is None else classes[image]
        assert survivors[image].tolist() == greedy(boxes[image], valid[image], own, iou)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_a_chain_of_boxes_takes_as_many_rounds_as_it_has_boxes(n: int) -> None:
    """Each suppresses the next one, unless it is suppressed itself: every other box survives."""
    left = torch.arange(n) * 4.0
    boxes = torch.stack([left, torch.zeros(n), left + 10, torch.full((n,), 10.0)], dim=1)
    survivors = survive_in_rounds(boxes[None], torch.ones(1, n, dtype=torch.bool), iou=0.4)
    assert survivors[0].tolist() == [place % 2 == 0 for place in range(n)]


def test_without_boxes_none_survives() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    for survivors in (
        survive_in_rounds(torch.zeros(2, 0, 4), nothing, iou=0.5),
        survive(torch.zeros(2, 0, 4), torch.zeros(2, 0), nothing, iou=0.5),
    ):
        assert survivors.shape == (2, 0)


def test_boxes_are_decoded_as_torchvision_does() -> None:
    """To the bit, with scales beyond the largest."""
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(4, 25, 4, generator=random) * 15
    corners = torch.rand(4, 25, 2, 2, generator=random) * S
    starts = corners.sort(dim=2).values.flatten(2)
    expected = coder.decode_single(codes.flatten(0, 1), starts.flatten(0, 1))
    torch.testing.assert_close(
        decoded(coder, codes, starts).flatten(0, 1), expected, rtol=0, atol=0
    )


def test_an_accelerator_compares_no_more_pairs_at_once_than_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images are taken in parts; boxes of which a single image has too many, one by one."""
    sizes: list[int] = []

    def noted(boxes: Tensor, valid: Tensor, classes: Tensor | None, *, iou: float) -> Tensor:
        sizes.append(len(boxes))
        return valid

    monkeypatch.setattr(choosing, "survive_in_rounds", noted)
    monkeypatch.setattr(choosing, "_GRID", 100)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), shape=(5, 7, 4))
    on_gpu.split = lambda images: torch.zeros(5, 7, 4).split(images)
    survive(on_gpu, torch.zeros(5, 7), torch.ones(5, 7, dtype=torch.bool), iou=0.5)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(choosing, "_survive_one_by_one", lambda *_, **__: sizes.append(0))
    on_gpu.shape = (5, 11, 4)
    survive(on_gpu, torch.zeros(5, 11), torch.ones(5, 11, dtype=torch.bool), iou=0.5)
    assert sizes == [2, 2, 1, 0]
