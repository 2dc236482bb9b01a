"""Which boxes of a batch are kept: torchvision's proposals and detections, all images at once.

Letters: B images of a batch, S side of a view in pixels, n boxes of an image, m regions of an
image, K classes including the background, P proposals of an image, T candidates that are examined.
Boxes are xyxy in pixels of the view.

The shapes of results depend on settings alone: an image with fewer boxes than others has places
that hold none. So an accelerator need not be asked how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from pipeline.regions.given_boxes import SMALLEST_SIDE

_EXAMINED = 1000
"""Candidates of an image that are examined at first, those with the highest scores."""
_ROUNDS = 16
"""Rounds of a non-maximum suppression on an accelerator between two looks at whether it is done."""
_GRID = 2**26
"""Pairs of boxes that are compared at once on an accelerator. Each takes up to 16 bytes."""


Chosen = tuple[Tensor, Tensor, Tensor, Tensor]
"""The detections of B images, the best first: boxes (B, m, 4), scores (B, m), classes (B, m) int64,
and their number (B,) int64. All are zero where an image has fewer than others."""


def propose(
    rpn: Any, logits: list[Tensor], codes: list[Tensor], anchors: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Choose the proposals, as torchvision's `RegionProposalNetwork` does.

    Only the best anchors of each level are decoded, since no others can become proposals.

    Args:
        rpn: the network, for its settings.
        logits, codes: of each level, (B, A, H, W) and (B, 4A, H, W), for A anchors of a position.
        anchors: (n, 4) of all levels, in the order level, H, W, A.
        size: S.

    Returns:
        (B, P, 4) boxes, the best first, and (B, P) bool: which of these places hold one. Those that
        do come first.
    """
    batch, offset = len(logits[0]), 0
    of_levels: list[tuple[Tensor, ...]] = []
    for of_level, of_boxes in zip(logits, codes, strict=True):
        flat = of_level.permute(0, 2, 3, 1).reshape(batch, -1)
        best, positions = flat.topk(min(rpn.pre_nms_top_n(), flat.shape[1]), dim=1)
        by_anchor = of_boxes.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        of_best = by_anchor.gather(1, positions[..., None].expand(-1, -1, 4))
        of_levels.append((best.sigmoid(), of_best, anchors[positions + offset]))
        offset += flat.shape[1]
    scores, deltas, starts = (torch.cat(parts, dim=1) for parts in zip(*of_levels, strict=True))
    boxes = clip_boxes_to_image(decoded(rpn.box_coder, deltas, starts), (size, size))
    valid = _is_large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
    kept = [best.shape[1] for best, _, _ in of_levels]
    parts = (part.split(kept, dim=1) for part in (boxes, scores, valid))
    survivors = [survive(*of_level, iou=rpn.nms_thresh) for of_level in zip(*parts, strict=True)]
    scores = torch.where(torch.cat(survivors, dim=1), scores, -1.0)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    first = slice(rpn.post_nms_top_n())
    return _at(boxes, order[:, first]), scores[:, first] >= 0


def choose(
    heads: Any, scores: Tensor, codes: Tensor, proposals: Tensor, valid: Tensor, size: int
) -> Chosen:
    """Choose the detections, as torchvision's `postprocess_detections` does.

    Whether the NMS keeps a box depends only on boxes before it in the order of scores. So the m
    best survivors are among the T candidates with the highest scores, provided that m of these
    survive; T grows until they do or until it covers all candidates. With a score threshold of 0
    every proposal is a candidate for every class: 90,000 for the classes of COCO, of which 1000 are
    examined. Of equal scores, the one with the lower position comes first.

    Args:
        heads: torchvision's `RoIHeads`, for its settings.
        scores: (B, P, K), after the softmax.
        codes: (B, P, 4K)
        proposals: (B, P, 4)
        valid: (B, P) bool, which places hold a proposal.
        size: S.
    """
    return _best(heads, scores, codes, proposals, valid, size=size, examined=_EXAMINED)


def _best(heads: Any, *of_images: Tensor, size: int, examined: int) -> Chosen:
    """`choose`, beginning with a T of ``examined``."""
    scores, codes, proposals, valid = of_images
    classes, wanted = scores.shape[2], heads.detections_per_img
    foreground = scores[..., 1:].flatten(1)
    is_candidate = (foreground > heads.score_thresh) & valid.repeat_interleave(classes - 1, dim=1)
    # Positive floats are ordered as their bits are, and the positions distinguish equal ones.
    bits = foreground.contiguous().view(torch.int32).long() << 32
    keys = torch.where(is_candidate, bits - torch.arange(bits.shape[1], device=bits.device), -1)
    keys, places = keys.topk(min(examined, keys.shape[1]), dim=1)
    proposal, number = places // (classes - 1), places % (classes - 1) + 1
    of_class = (proposal * classes + number)[..., None].expand(-1, -1, 4)
    boxes = decoded(
        heads.box_coder,
        codes.unflatten(2, (-1, 4)).flatten(1, 2).gather(1, of_class),
        _at(proposals, proposal),
    )
    boxes = clip_boxes_to_image(boxes, (size, size))
    best = foreground.gather(1, places)
    kept = survive(
        boxes, best, (keys >= 0) & _is_large(boxes, SMALLEST_SIDE), number, iou=heads.nms_thresh
    )
    count = kept.sum(1).clamp(max=wanted)
    # Those that were kept come first, in their order.
    order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :wanted]
    blank = torch.arange(order.shape[1], device=order.device) >= count[:, None]
    missing = wanted - order.shape[1]
    chosen = (
        F.pad(_at(boxes, order).masked_fill(blank[..., None], 0), (0, 0, 0, missing)),
        F.pad(best.gather(1, order).masked_fill(blank, 0), (0, missing)),
        F.pad(number.gather(1, order).masked_fill(blank, 0), (0, missing)),
        count,
    )
    if examined >= bits.shape[1]:
        return chosen
    lacking = torch.where((count < wanted) & (is_candidate.sum(1) > examined))[0]
    if len(lacking):
        again = [part[lacking] for part in of_images]
        of_lacking = _best(heads, *again, size=size, examined=4 * examined)
        for part, of_part in zip(chosen, of_lacking, strict=True):
            part[lacking] = of_part
    return chosen


def decoded(coder: Any, codes: Tensor, starts: Tensor) -> Tensor:
    """Move and scale boxes, as torchvision's `BoxCoder` does, which waits for the device twice.

    Args:
        coder: the `BoxCoder`, for its weights and its largest logarithm.
        codes: (..., 4) shifts of the centre, in widths and heights, and logarithms of the scales.
        starts: (..., 4) boxes.
    """
    x, y, width, height = (
        code / weight for code, weight in zip(codes.unbind(-1), coder.weights, strict=True)
    )
    widths, heights = starts[..., 2] - starts[..., 0], starts[..., 3] - starts[..., 1]
    x = x * widths + (starts[..., 0] + 0.5 * widths)
    y = y * heights + (starts[..., 1] + 0.5 * heights)
    half_width = 0.5 * (width.clamp(max=coder.bbox_xform_clip).exp() * widths)
    half_height = 0.5 * (height.clamp(max=coder.bbox_xform_clip).exp() * heights)
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def survive(
    boxes: Tensor, scores: Tensor, valid: Tensor, classes: Tensor | None = None, *, iou: float
) -> Tensor:
    """Suppress boxes that overlap a better one of their class, which is kept, by more than ``iou``.

    Args:
        boxes: (B, n, 4), the best of an image first.
        scores: (B, n), descending where valid.
        valid: (B, n) bool; others neither survive nor suppress.
        classes: (B, n); None if all are of one class.

    Returns:
        (B, n) bool, which boxes survive.
    """
    if boxes.device.type == "cpu" or boxes.shape[1] ** 2 > _GRID:
        return _survive_one_by_one(boxes, scores, valid, classes, iou=iou)
    images = max(1, _GRID // max(1, boxes.shape[1]) ** 2)
    parts = [part.split(images) for part in (boxes, valid)]
    of_parts = classes.split(images) if classes is not None else [None] * len(parts[0])
    return torch.cat(
        [survive_in_rounds(*part, iou=iou) for part in zip(*parts, of_parts, strict=True)]
    )


def _survive_one_by_one(
    boxes: Tensor, scores: Tensor, valid: Tensor, classes: Tensor | None, *, iou: float
) -> Tensor:
    """`survive` by torchvision's kernel, image by image."""
    survivors = torch.zeros_like(valid)
    for image, of_image in enumerate(valid):
        places = torch.where(of_image)[0]
        own = boxes[image, places]
        if classes is not None and len(places):
            # Classes are shifted apart, in double precision, in which no coordinate is rounded.
            own = own.double() + (1 + own.max()) * classes[image, places, None]
        kept = nms(own, scores[image, places].to(own.dtype), iou)
        survivors[image, places[kept]] = True
    return survivors


def survive_in_rounds(
    boxes: Tensor, valid: Tensor, classes: Tensor | None = None, *, iou: float
) -> Tensor:
    """`survive`, for all boxes of all images at once.

    In each round, a box is taken to survive unless one before it that survived the last round
    overlaps it. A box is right, and stays so, once all those before it that overlap it are right:
    after n rounds all are, mostly after a few. torchvision's kernel takes the boxes of an image one
    after the other, on a single multiprocessor.
    """
    left, top, right, bottom = boxes[:, :, None].unbind(-1)  # (B, n, 1) each
    widths = torch.minimum(right, right.mT).sub_(torch.maximum(left, left.mT)).clamp_(min=0)
    shared = torch.minimum(bottom, bottom.mT).sub_(torch.maximum(top, top.mT))
    shared = shared.clamp_(min=0).mul_(widths)
    area = (right - left) * (bottom - top)
    overlaps = shared.div_((area + area.mT).sub_(shared)) > iou
    overlaps = overlaps.triu_(1)  # (B, i, j): i comes before j
    if classes is not None:
        overlaps &= classes[:, :, None] == classes[:, None]
    suppressing = overlaps.half()
    survivors = valid
    while True:
        for _ in range(_ROUNDS):
            last = survivors
            suppressed = torch.bmm(last[:, None].half(), suppressing)[:, 0] > 0
            survivors = valid & ~suppressed
        if torch.equal(survivors, last):
            return survivors


def _is_large(boxes: Tensor, side: float) -> Tensor:
    """Which boxes (..., 4) have sides of at least ``side``."""
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)


def _at(boxes: Tensor, places: Tensor) -> Tensor:
    """The boxes (B, n, 4) at places (B, k) of each image."""
    return boxes.gather(1, places[..., None].expand(-1, -1, 4))
