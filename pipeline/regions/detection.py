"""Running the detector on views: torchvision's numbers, without the work whose result is dropped.

Letters: B images of a batch, S side of a view in pixels, m regions of an image, n boxes,
d feature size, C channels of a pyramid level, K classes with the background, A anchors of a place.
Boxes are xyxy; in pixels of the view inside this module, in [0,1] of the view in what it returns.
"""

from __future__ import annotations

import copy
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

_SMALLEST_SIDE = 1e-2  # of a detection, in pixels; torchvision drops smaller ones
# Boxes that are pooled at once on a CPU: what they are pooled to, 25 MB at full width, stays below
# the 32 MB from which glibc asks the system for new pages each time. 250 and 1000 were slower.
_PIECE = 500
# Up to so many boxes, torchvision keeps classes apart in the NMS by shifting their boxes, which
# rounds coordinates; above, by a loop over classes, which does not (its `batched_nms`).
_SHIFTED = {"cpu": 1000, "cuda": 25_000}


@dataclass(frozen=True)
class Detections:
    """The regions of one view, best score first.

    Attributes:
        boxes: (n, 4) float32, xyxy in [0,1] of the view.
        scores: (n,) float32, descending.
        classes: (n,) int64, the detector's class numbers; 0 only for the stand-in region.
        features: (n, d) float32, the box head's vector, pooled at these very boxes.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    features: Tensor


def prepare_for_extraction(model: FasterRCNN) -> FasterRCNN:
    """A copy that computes the same faster, up to rounding, and can't be trained.

    Batch norms are folded into their convolutions. On a CPU, moreover, convolutions work on
    channels-last memory, and the pooling is one that uses all cores and vector instructions;
    elsewhere torchvision's own is good.

    Args:
        model: in eval mode, on the device on which it will run.

    Raises:
        ValueError: the model is in training mode, in which batch norms have no fixed statistics.
    """
    if model.training:
        raise ValueError("a model in training mode can't be prepared; call its eval() first")
    model = copy.deepcopy(model).requires_grad_(False)
    for module in list(model.modules()):
        # In ResNets a norm is defined, and called, next after its convolution.
        for (_, conv), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                _fold(conv, norm)
                setattr(module, name, nn.Identity())
    heads = model.roi_heads
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and isinstance(heads.box_roi_pool, MultiScaleRoIAlign):
        model.to(memory_format=torch.channels_last)
        heads.box_head = _ChannelsLastHead(heads.box_head, heads.box_roi_pool.output_size[0])
        heads.box_roi_pool = _TapsPool(heads.box_roi_pool)
    return model


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Make ``conv`` compute what ``norm`` makes of it:
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

    A bin's value is the mean of its samples, a sample the bilinear mean of the four places about
    it: a bin is a weighted sum of rows of the (B * height * width, C) table that a level in
    channels-last memory is. torchvision's CPU kernel gathers single numbers, on one core.
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
            (n of all images, C, bins, bins), channels last in memory.
        """
        levels = [maps[name] for name in self.names]
        strides = [image_shapes[0][0] // level.shape[-1] for level in levels]
        first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        mapper = LevelMapper(first, last, self.scale, self.level)
        of_box, rois = mapper(boxes), torch.cat(boxes)
        counts = torch.tensor([len(of_image) for of_image in boxes])
        image = torch.arange(len(boxes), dtype=torch.int32).repeat_interleave(counts)
        channels = levels[0].shape[1]
        pooled = rois.new_empty(len(rois), self.bins, self.bins, channels)
        for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
            here = torch.where(of_box == number)[0]
            side, at = level.shape[-1], rois[here] / stride
            columns, across = self._taps(at[:, 0], at[:, 2], side)
            rows, down = self._taps(at[:, 1], at[:, 3], side)
            rows = rows + image[here, None, None] * side
            # (n, bins, 1, taps, 1) and (n, 1, bins, 1, taps)
            places = rows[:, :, None, :, None] * side + columns[:, None, :, None, :]
            weights = down[:, :, None, :, None] * across[:, None, :, None, :]
            pooled[here] = F.embedding_bag(
                places.flatten(3).flatten(0, 2),
                level.permute(0, 2, 3, 1).reshape(-1, channels),
                per_sample_weights=weights.flatten(3).flatten(0, 2),
                mode="sum",
            ).view(-1, self.bins, self.bins, channels)
        return pooled.permute(0, 3, 1, 2)

    def _taps(self, low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Which places of an axis the bins of n boxes read, and their weights.

        Args:
            low, high: (n,) ends of the boxes, in places of the level; 0 <= low <= high.
            side: places that the axis has.

        Returns:
            int32 and float32, both (n, bins, taps) with two taps a sample.
        """
        bin_size = (high - low).clamp(min=1) / self.bins
        starts = torch.arange(self.bins)[:, None] * bin_size[:, None, None]
        within = (torch.arange(self.samples) + 0.5) / self.samples * bin_size[:, None, None]
        at = low[:, None, None] + starts + within  # (n, bins, samples)
        before = at.int().clamp(max=side - 1)
        after = (before + 1).clamp(max=side - 1)
        share = torch.where(before == side - 1, 0.0, at - before)
        # A box is taken to be a whole place wide at least, and so may reach out of the view.
        inside = (at <= side) / self.samples
        places = torch.stack([before, after], dim=-1)
        weights = torch.stack([(1 - share) * inside, share * inside], dim=-1)
        return places.flatten(2), weights.flatten(2)


class _ChannelsLastHead(nn.Module):
    """A box head whose first layer takes what is pooled in the order in which it lies in memory."""

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
def detect(model: FasterRCNN, views: Tensor) -> list[Detections]:
    """The regions of a batch of views, on the model's device: those that ``model`` itself finds.

    torchvision does not tell which proposal a detection came from, and regresses its box
    afterwards. So features are pooled again at the final boxes: box and feature belong together.
    A view without any detection gets one stand-in region: the whole view, score 0, class 0.

    Args:
        model: in eval mode, built for views of this size; faster after `prepare_for_extraction`.
        views: (B, 3, S, S) float32 in [0, 1], on the model's device. All of one size: torchvision
            pads mixed sizes, and padding changes boxes and features.

    Returns:
        B detections with 1 to ``box_detections_per_img`` regions each, on the same device.

    Raises:
        ValueError: the views are not of the model's size, or that is no multiple of 32, to which
            torchvision would pad them.
    """
    size = views.shape[-1]
    if views.shape[-2:] != (size, size) or model.transform.min_size != (size,):
        raise ValueError(
            f"views of {tuple(views.shape)} for a model of size {model.transform.min_size}"
        )
    if size % model.transform.size_divisible:
        raise ValueError(
            f"views of side {size}, which is no multiple of {model.transform.size_divisible}"
        )
    # Not the whole transform: its resize changes nothing at this size, but takes time.
    inputs = model.transform.normalize(views)
    maps = model.backbone(inputs)
    proposals = _propose(model.rpn, inputs, maps)
    heads = model.roi_heads
    logits, regression = heads.box_predictor(_vectors(heads, maps, proposals, size))
    counts = [len(of_image) for of_image in proposals]
    found = [
        _best(heads, *of_image, size)
        for of_image in zip(
            F.softmax(logits, dim=-1).split(counts),
            regression.split(counts),
            proposals,
            strict=True,
        )
    ]
    features = _vectors(heads, maps, [boxes for boxes, _, _ in found], size)
    return [
        Detections((boxes / size).clamp(0, 1), scores, classes, feature)
        for (boxes, scores, classes), feature in zip(
            found, features.split([len(scores) for _, scores, _ in found]), strict=True
        )
    ]


def _propose(rpn: Any, views: Tensor, maps: dict[str, Tensor]) -> list[Tensor]:
    """The (n, 4) proposals of each image; of all anchors, only those that can become one are
    decoded: the best of each level."""
    levels = list(maps.values())
    batch, size = len(views), views.shape[-1]
    all_logits, all_deltas = rpn.head(levels)
    [anchors] = rpn.anchor_generator(ImageList(views, [(size, size)]), levels)
    logits, deltas, starts, kept = [], [], [], []
    offset = 0
    for of_level, of_boxes in zip(all_logits, all_deltas, strict=True):
        # (B, A, H, W) and (B, 4A, H, W); anchors are in the order H, W, A.
        flat = of_level.permute(0, 2, 3, 1).reshape(batch, -1)
        best, places = flat.topk(min(rpn.pre_nms_top_n(), flat.shape[1]), dim=1)
        codes = of_boxes.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        logits.append(best)
        deltas.append(codes.gather(1, places[..., None].expand(-1, -1, 4)))
        starts.append(anchors[places + offset])
        kept.append(places.shape[1])
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
    """(n of all images, d): what the box head makes of the boxes, given as (n, 4) an image."""
    shapes = [(size, size)] * len(boxes)
    if sum(len(of_image) for of_image in boxes) <= _PIECE or boxes[0].device.type != "cpu":
        vectors: Tensor = heads.box_head(heads.box_roi_pool(maps, boxes, shapes))
        return vectors
    pieces = []
    for place, of_image in enumerate(boxes):
        own = {name: level[place : place + 1] for name, level in maps.items()}
        for piece in of_image.split(_PIECE):
            pieces.append(heads.box_head(heads.box_roi_pool(own, [piece], shapes[:1])))
    return torch.cat(pieces)


def _best(
    heads: Any, scores: Tensor, regression: Tensor, proposals: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One image's detections, as torchvision's `postprocess_detections` chooses them.

    Whether the NMS keeps a box depends on boxes of higher scores alone. So the m best survivors
    are found among the T candidates of the highest scores, if these have m; T grows until they
    have, or are all there are. With a score threshold of 0 every proposal is a candidate for
    every class: 90,000 of them for COCO's, of which some 1000 are looked at.

    Args:
        scores: (n, K), after the softmax.
        regression: (n, 4K)
        proposals: (n, 4)

    Returns:
        boxes (m, 4), scores (m,) and classes (m,), the best first; the stand-in if none is found.
    """
    foreground = scores[:, 1:].flatten()
    candidates = torch.where(foreground > heads.score_thresh)[0]
    looked_at = _SHIFTED[scores.device.type]
    while True:
        everything = len(candidates) <= looked_at
        chosen = candidates
        if not everything:
            of_candidates = foreground[candidates]
            least = of_candidates.topk(looked_at).values[-1]
            chosen = candidates[of_candidates >= least]  # with all that tie with the last
        place, number = chosen // (scores.shape[1] - 1), chosen % (scores.shape[1] - 1) + 1
        codes = regression.unflatten(1, (-1, 4))[place, number]
        boxes = heads.box_coder.decode_single(codes, proposals[place])
        boxes = clip_boxes_to_image(boxes, (size, size))
        large = remove_small_boxes(boxes, _SMALLEST_SIDE)
        boxes, best, number = boxes[large], foreground[chosen[large]], number[large]
        if everything:
            keep = batched_nms(boxes, best, number, heads.nms_thresh)
            break
        # torchvision would loop over classes; shifting them in double precision is as exact.
        keep = batched_nms(boxes.double(), best.double(), number, heads.nms_thresh)
        if len(keep) >= heads.detections_per_img:
            break
        looked_at *= 4
    keep = keep[: heads.detections_per_img]
    if not len(keep):
        stand_in = boxes.new_tensor([[0.0, 0.0, size, size]])
        return stand_in, best.new_zeros(1), number.new_zeros(1)
    return boxes[keep], best[keep], number[keep]
