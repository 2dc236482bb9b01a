"""Running the detector on views: torchvision's numbers, without the work whose result is dropped.

Letters: B images of a batch, S side of a view in pixels, m regions of an image, n boxes,
d feature size, C channels of a pyramid level, K classes including the background, A anchors per
position of a level.
Boxes are xyxy: in pixels of the view inside this module, in [0,1] of the view in what it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import (
    FrozenBatchNorm2d,
    MultiScaleRoIAlign,
    batched_nms,
    clip_boxes_to_image,
    remove_small_boxes,
)
from torchvision.ops.poolers import LevelMapper

from pipeline.regions.given_boxes import SMALLEST_SIDE, GivenRegions

# Boxes that are pooled at once on a CPU. The result, 25 MB at full width, stays below the 32 MB
# above which glibc asks the system for new pages each time. 250 and 1000 were slower.
_PIECE = 500
# Up to this number of boxes, torchvision's `batched_nms` keeps classes apart by shifting their
# boxes, which rounds coordinates; above it, by a loop over classes, which does not.
_SHIFTED = {"cpu": 1000, "cuda": 25_000}


@dataclass(frozen=True)
class Detections:
    """The regions of one view, ordered by descending score.

    Attributes:
        boxes: (n, 4) float32, xyxy in [0,1] of the view.
        scores: (n,) float32, descending.
        classes: (n,) int64, the detector's class numbers; 0 only in the stand-in region.
        features: (n, d) float32, the box head's vector, pooled at these very boxes.
        whole: (d,) float32, the box head's vector at the box of the whole view; None unless it was
            asked for.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    features: Tensor
    whole: Tensor | None = None


def prepare_for_extraction(model: FasterRCNN) -> FasterRCNN:
    """Return a copy that computes the same faster, up to rounding, and can't be trained.

    Batch norms are folded into their convolutions. On a CPU, convolutions also work on
    channels-last memory, and pooling uses all cores and vector instructions; on other devices
    torchvision's own pooling is kept, since it is fast there.

    Args:
        model: in eval mode, on the device on which it will run.

    Raises:
        ValueError: the model is in training mode, in which batch norms have no fixed statistics.
    """
    if model.training:
        raise ValueError("a model in training mode can't be prepared; call its eval() first")
    model = copy.deepcopy(model).requires_grad_(False)
    for module in list(model.modules()):
        # In ResNets a norm is defined, and called, right after its convolution.
        for (_, conv), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                _fold(conv, norm)
                setattr(module, name, nn.Identity())
    heads = model.roi_heads
    if _on_cpu(model) and isinstance(heads.box_roi_pool, MultiScaleRoIAlign):
        model.to(memory_format=torch.channels_last)
        heads.box_head = _ChannelsLastHead(heads.box_head, heads.box_roi_pool.output_size[0])
        heads.box_roi_pool = _TapsPool(heads.box_roi_pool)
    return model


@contextmanager
def trained_faster(model: FasterRCNN) -> Iterator[None]:
    """Make a model's training steps on a CPU faster within the block, up to rounding.

    Convolutions work on channels-last memory, and pooling, whose gradient takes most of
    torchvision's time for it, uses all cores and vector instructions. Both are undone at the end;
    on other devices nothing changes.

    Args:
        model: on the device on which it is trained. Its parameters stay the same objects.
    """
    pool = model.roi_heads.box_roi_pool
    if not _on_cpu(model):
        yield
        return
    model.to(memory_format=torch.channels_last)
    model.roi_heads.box_roi_pool = _TapsPool(pool)
    try:
        yield
    finally:
        model.roi_heads.box_roi_pool = pool
        model.to(memory_format=torch.contiguous_format)


def _on_cpu(model: FasterRCNN) -> bool:
    device: torch.device = next(model.parameters()).device
    return device.type == "cpu"


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Make ``conv`` return what ``norm`` returns for its output x:
    (x - mean) / sqrt(var + eps) * weight + bias."""
    mean, var, weight, bias = (
        getattr(norm, name).double() for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = weight / torch.sqrt(var + norm.eps)
    shift = -mean if conv.bias is None else conv.bias.double() - mean
    dtype = conv.weight.dtype
    conv.weight.copy_((conv.weight.double() * scale[:, None, None, None]).to(dtype))
    conv.bias = nn.Parameter((shift * scale + bias).to(dtype), requires_grad=False)


class _TapsPool(nn.Module):
    """torchvision's `MultiScaleRoIAlign` (not ``aligned``), as weighted sums of rows.

    A bin's value is the mean of its samples, and a sample is the bilinear mean of the four
    positions around it. A level in channels-last memory is a (B * height * width, C) table, so
    that a bin is a weighted sum of its rows. torchvision's CPU kernel gathers single numbers, on
    one core.
    """

    def __init__(self, pool: MultiScaleRoIAlign) -> None:
        super().__init__()
        self.names: list[str] = pool.featmap_names
        self.bins: int = pool.output_size[0]
        self.samples: int = pool.sampling_ratio  # in each direction of a bin
        self.scale, self.level = pool.canonical_scale, pool.canonical_level

    def forward(
        self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """
        Args:
            maps: (B, C, H, W) of each level; H = W is S over a power of two.
            boxes: (n, 4) of each image, within the view.
            image_shapes: (S, S) of each image.

        Returns:
            (n of all images, C, bins, bins), in channels-last memory.
        """
        levels = [maps[name] for name in self.names]
        strides = [image_shapes[0][0] // level.shape[-1] for level in levels]
        first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        mapper = LevelMapper(first, last, self.scale, self.level)
        level_of_box, rois = mapper(boxes), torch.cat(boxes)
        counts = torch.tensor([len(of_image) for of_image in boxes])
        image = torch.arange(len(boxes), dtype=torch.int32).repeat_interleave(counts)
        channels = levels[0].shape[1]
        pooled = rois.new_empty(len(rois), self.bins, self.bins, channels)
        for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
            here = torch.where(level_of_box == number)[0]
            side, at = level.shape[-1], rois[here] / stride
            columns, across = self._taps(at[:, 0], at[:, 2], side)
            rows, down = self._taps(at[:, 1], at[:, 3], side)
            rows = rows + image[here, None, None] * side
            # (n, bins, 1, taps, 1) and (n, 1, bins, 1, taps)
            positions = rows[:, :, None, :, None] * side + columns[:, None, :, None, :]
            weights = down[:, :, None, :, None] * across[:, None, :, None, :]
            pooled[here] = F.embedding_bag(
                positions.flatten(3).flatten(0, 2),
                level.permute(0, 2, 3, 1).reshape(-1, channels),
                per_sample_weights=weights.flatten(3).flatten(0, 2),
                mode="sum",
            ).view(-1, self.bins, self.bins, channels)
        return pooled.permute(0, 3, 1, 2)

    def _taps(self, low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return the positions along an axis that the bins of n boxes read, and their weights.

        Args:
            low, high: (n,) ends of the boxes, in positions of the level; 0 <= low <= high.
            side: number of positions along the axis.

        Returns:
            int32 and float32, both (n, bins, taps) with two taps per sample.
        """
        bin_size = (high - low).clamp(min=1) / self.bins
        starts = torch.arange(self.bins)[:, None] * bin_size[:, None, None]
        within = (torch.arange(self.samples) + 0.5) / self.samples * bin_size[:, None, None]
        at = low[:, None, None] + starts + within  # (n, bins, samples)
        before = at.int().clamp(max=side - 1)
        after = (before + 1).clamp(max=side - 1)
        share = torch.where(before == side - 1, 0.0, at - before)
        # A box counts as at least one position wide, and so may extend beyond the view.
        inside = (at <= side) / self.samples
        positions = torch.stack([before, after], dim=-1)
        weights = torch.stack([(1 - share) * inside, share * inside], dim=-1)
        return positions.flatten(2), weights.flatten(2)


class _ChannelsLastHead(nn.Module):
    """A box head whose first layer reads pooled features in the order of channels-last memory."""

    def __init__(self, head: TwoMLPHead, bins: int) -> None:
        super().__init__()
        self.fc6: nn.Linear = head.fc6
        self.fc7: nn.Linear = head.fc7
        ordered = self.fc6.weight.unflatten(1, (-1, bins, bins)).permute(0, 2, 3, 1).flatten(1)
        self.fc6.weight = nn.Parameter(ordered.contiguous(), requires_grad=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, C, bins, bins) -> (n, d)"""
        hidden = F.relu(self.fc6(pooled.permute(0, 2, 3, 1).flatten(1)))
        vectors: Tensor = F.relu(self.fc7(hidden))
        return vectors


@torch.inference_mode()
def detect(model: FasterRCNN, views: Tensor, *, whole: bool = False) -> list[Detections]:
    """Find the regions of a batch of views: the same ones as ``model`` itself.

    torchvision does not say which proposal a detection came from, and regresses its box
    afterwards. So features are pooled again at the final boxes: box and feature belong together.
    A view without any detection gets one stand-in region: the whole view, score 0, class 0.

    Args:
        model: in eval mode, built for views of this size; faster after `prepare_for_extraction`.
        views: (B, 3, S, S) float32 in [0, 1], on the model's device. All of one size: torchvision
            pads mixed sizes, and padding changes boxes and features.
        whole: also pool the vectors of the whole views, from the same feature maps. Whether this is
            done does not change the regions.

    Returns:
        B detections with 1 to ``box_detections_per_img`` regions each, on the same device.

    Raises:
        ValueError: the views do not have the model's size, or that is not a multiple of 32, to
            which torchvision would pad them.
    """
    size = _checked_side(model, views)
    # Only this part of the transform: its resize changes nothing at this size, but takes time.
    inputs = model.transform.normalize(views)
    maps = model.backbone(inputs)
    proposals = _propose(model.rpn, inputs, maps)
    heads = model.roi_heads
    logits, regression = heads.box_predictor(_vectors(heads, maps, proposals, size))
    counts = [len(of_image) for of_image in proposals]
    best = [
        _best(heads, *of_image, size)
        for of_image in zip(
            F.softmax(logits, dim=-1).split(counts),
            regression.split(counts),
            proposals,
            strict=True,
        )
    ]
    return _described(heads, maps, best, size, whole=whole)


@torch.inference_mode()
def detect_at(
    model: FasterRCNN, views: Tensor, regions: Sequence[GivenRegions], *, whole: bool = False
) -> list[Detections]:
    """Describe given regions of a batch of views with the vectors that `detect` would give them.

    The RPN and the box predictor don't run. A view without a region gets the same stand-in.

    Args:
        model, views, whole: as `detect` takes them.
        regions: of each of the B views, in [0,1] of the view, in the order in which to return them.

    Raises:
        ValueError: as `detect`.
    """
    size, device = _checked_side(model, views), views.device
    maps = model.backbone(model.transform.normalize(views))
    placed = [
        (
            torch.from_numpy(one.boxes * size).float().to(device),
            torch.from_numpy(one.scores).to(device),
            torch.from_numpy(one.classes).long().to(device),
        )
        if len(one.scores)
        else _stand_in(size, device)
        for one in regions
    ]
    return _described(model.roi_heads, maps, placed, size, whole=whole)


def _checked_side(model: FasterRCNN, views: Tensor) -> int:
    """The side S of the views; raises as `detect`."""
    size = views.shape[-1]
    if views.shape[-2:] != (size, size) or model.transform.min_size != (size,):
        raise ValueError(
            f"views of shape {tuple(views.shape)} do not fit a model of size "
            f"{model.transform.min_size}"
        )
    if size % model.transform.size_divisible:
        raise ValueError(
            f"the side of the views, {size}, is not a multiple of {model.transform.size_divisible}"
        )
    return size


def _described(
    heads: Any,
    maps: dict[str, Tensor],
    regions: list[tuple[Tensor, Tensor, Tensor]],
    size: int,
    *,
    whole: bool,
) -> list[Detections]:
    """Pool the features of each image's boxes (n, 4), scores (n,) and classes (n,)."""
    features = _vectors(heads, maps, [boxes for boxes, _, _ in regions], size)
    wholes: Iterable[Tensor | None] = [None] * len(regions)
    if whole:
        # Not pooled with the regions: their number decides how a product of matrices is rounded.
        wholes = _vectors(heads, maps, [_whole_box(size, features.device)] * len(regions), size)
    return [
        Detections((boxes / size).clamp(0, 1), scores, classes, feature, of_whole)
        for (boxes, scores, classes), feature, of_whole in zip(
            regions, features.split([len(scores) for _, scores, _ in regions]), wholes, strict=True
        )
    ]


def _whole_box(size: int, device: torch.device) -> Tensor:
    """The box of a whole view in pixels: (1, 4)."""
    return torch.tensor([[0.0, 0.0, size, size]], device=device)


def _stand_in(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Box, score and class of the region of a view without any: the whole view, 0 and 0."""
    score = torch.zeros(1, device=device)
    return _whole_box(size, device), score, torch.zeros(1, dtype=torch.int64, device=device)


def _propose(rpn: Any, views: Tensor, maps: dict[str, Tensor]) -> list[Tensor]:
    """Return the (n, 4) proposals of each image.

    Only the best anchors of each level are decoded, since no others can become proposals.
    """
    levels = list(maps.values())
    batch, size = len(views), views.shape[-1]
    all_logits, all_deltas = rpn.head(levels)
    [anchors] = rpn.anchor_generator(ImageList(views, [(size, size)]), levels)
    logits, deltas, starts, kept = [], [], [], []
    offset = 0
    for of_level, of_boxes in zip(all_logits, all_deltas, strict=True):
        # (B, A, H, W) and (B, 4A, H, W); anchors are in the order H, W, A.
        flat = of_level.permute(0, 2, 3, 1).reshape(batch, -1)
        best, positions = flat.topk(min(rpn.pre_nms_top_n(), flat.shape[1]), dim=1)
        codes = of_boxes.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        logits.append(best)
        deltas.append(codes.gather(1, positions[..., None].expand(-1, -1, 4)))
        starts.append(anchors[positions + offset])
        kept.append(positions.shape[1])
        offset += flat.shape[1]
    decoded = rpn.box_coder.decode_single(
        torch.cat(deltas, dim=1).flatten(0, 1), torch.cat(starts, dim=1).flatten(0, 1)
    )
    proposals: list[Tensor]
    proposals, _ = rpn.filter_proposals(
        decoded.view(batch, -1, 4), torch.cat(logits, dim=1), [(size, size)] * batch, kept
    )
    return proposals


def _vectors(heads: Any, maps: dict[str, Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """Return the box head's vectors, (n of all images, d), at (n, 4) boxes per image."""
    shapes = [(size, size)] * len(boxes)
    if sum(len(of_image) for of_image in boxes) <= _PIECE or boxes[0].device.type != "cpu":
        vectors: Tensor = heads.box_head(heads.box_roi_pool(maps, boxes, shapes))
        return vectors
    pieces = []
    for image, of_image in enumerate(boxes):
        own = {name: level[image : image + 1] for name, level in maps.items()}
        for piece in of_image.split(_PIECE):
            pieces.append(heads.box_head(heads.box_roi_pool(own, [piece], shapes[:1])))
    return torch.cat(pieces)


def _best(
    heads: Any, scores: Tensor, regression: Tensor, proposals: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose one image's detections as torchvision's `postprocess_detections` does.

    Whether the NMS keeps a box depends only on boxes with higher scores. So the m best survivors
    are among the T candidates with the highest scores, provided that m of these survive; T grows
    until they do or until it covers all candidates. With a score threshold of 0 every proposal is
    a candidate for every class: 90,000 for the classes of COCO, of which about 1000 are examined.

    Args:
        scores: (n, K), after the softmax.
        regression: (n, 4K)
        proposals: (n, 4)

    Returns:
        boxes (m, 4), scores (m,) and classes (m,), the best first; the stand-in region if there is
        no detection.
    """
    foreground = scores[:, 1:].flatten()
    candidates = torch.where(foreground > heads.score_thresh)[0]
    examined = _SHIFTED[scores.device.type]
    while True:
        all_examined = len(candidates) <= examined
        chosen = candidates
        if not all_examined:
            of_candidates = foreground[candidates]
            least = of_candidates.topk(examined).values[-1]
            chosen = candidates[of_candidates >= least]  # including all that tie with the last
        proposal, number = chosen // (scores.shape[1] - 1), chosen % (scores.shape[1] - 1) + 1
        codes = regression.unflatten(1, (-1, 4))[proposal, number]
        boxes = heads.box_coder.decode_single(codes, proposals[proposal])
        boxes = clip_boxes_to_image(boxes, (size, size))
        large = remove_small_boxes(boxes, SMALLEST_SIDE)
        boxes, best, number = boxes[large], foreground[chosen[large]], number[large]
        if all_examined:
            keep = batched_nms(boxes, best, number, heads.nms_thresh)
            break
        # torchvision would loop over classes here; shifting in double precision is as exact.
        keep = batched_nms(boxes.double(), best.double(), number, heads.nms_thresh)
        if len(keep) >= heads.detections_per_img:
            break
        examined *= 4
    keep = keep[: heads.detections_per_img]
    if not len(keep):
        return _stand_in(size, boxes.device)
    return boxes[keep], best[keep], number[keep]
