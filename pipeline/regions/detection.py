"""Running the detector on views: torchvision's numbers, without the work whose result is dropped.

Letters: B images of a batch, S side of a view in pixels, m regions of an image, n boxes,
d feature size, C channels of a pyramid level, K classes including the background, A anchors per
position of a level.
Boxes are xyxy: in pixels of the view inside this module, in [0,1] of the view in what it returns.

A batch is detected in two steps. `convolve` depends on no data, so that an accelerator's kernels
are only queued, and the caller can do something else meanwhile. `find` or `describe` ends it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from pipeline.regions.choosing import choose, propose
from pipeline.regions.given_boxes import GivenRegions
from pipeline.regions.pooling import ChannelsLastHead, LevelPool, TapsPool, vectors_at
from pipeline.settings import Precision


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


@dataclass(frozen=True)
class BatchDetections:
    """The regions of B views, as in `Detections`; all numbers beyond a view's own are zero.

    Attributes:
        boxes: (B, m, 4) float32.
        scores: (B, m) float32.
        classes: (B, m) int64.
        features: (B, m, d) float32.
        count: (B,) int64, the regions of each view, 1 or more.
        whole: (B, d) float32, or None.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    features: Tensor
    count: Tensor
    whole: Tensor | None

    def of_views(self) -> list[Detections]:
        """The regions of each view."""
        return [
            Detections(
                self.boxes[view, :n],
                self.scores[view, :n],
                self.classes[view, :n],
                self.features[view, :n],
                None if self.whole is None else self.whole[view],
            )
            for view, n in enumerate(self.count.tolist())
        ]


@dataclass(frozen=True)
class Convolved:
    """What the detector's convolutions make of B views.

    Attributes:
        maps: (B, C, H, W) of each pyramid level, in the views' type, float32.
        logits, codes: (B, A, H, W) and (B, 4A, H, W) float32 of each level, what the RPN says of
            the anchors; empty if it was not asked.
        size: S.
    """

    maps: dict[str, Tensor]
    logits: list[Tensor]
    codes: list[Tensor]
    size: int


def prepare_for_extraction(model: FasterRCNN, precision: Precision = "float32") -> FasterRCNN:
    """Return a copy that computes the same faster, up to rounding, and can't be trained.

    Batch norms are folded into their convolutions. On a CPU, pooling uses all cores and vector
    instructions; elsewhere it waits for the device once instead of once per level. Convolutions
    work on channels-last memory, except in float32 on accelerators.

    Args:
        model: in eval mode, on the device on which it will run.
        precision: in which convolutions and the box head compute. What decides boxes and scores
            stays in float32: the predictors' outputs, anchors, and everything that is done with
            boxes, pooling included.

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
    heads, transform = model.roi_heads, model.transform
    device = next(model.parameters()).device
    if isinstance(heads.box_roi_pool, MultiScaleRoIAlign):  # else it was prepared before
        if device.type == "cpu":
            heads.box_head = ChannelsLastHead(heads.box_head, heads.box_roi_pool.output_size[0])
            heads.box_roi_pool = TapsPool(heads.box_roi_pool)
        else:
            heads.box_roi_pool = LevelPool(heads.box_roi_pool)
        model.rpn.anchor_generator = _KnownAnchors(model.rpn.anchor_generator)
    # As lists, they would be copied to the device for each batch, which waits for it.
    transform.image_mean, transform.image_std = (
        torch.as_tensor(values, device=device)
        for values in (transform.image_mean, transform.image_std)
    )
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    if dtype != torch.float32:
        for part in (model.backbone, model.rpn.head, heads.box_head):
            part.to(dtype)
    if device.type == "cpu" or precision != "float32":
        model.to(memory_format=torch.channels_last)
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
    model.roi_heads.box_roi_pool = TapsPool(pool)
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


class _KnownAnchors(nn.Module):
    """torchvision's generator of anchors, which is asked once: they depend on sizes alone."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.known: dict[object, Tensor] = {}

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image: (n, 4)."""
        key = (images.tensors.shape[-2:], maps[0].dtype, maps[0].device)
        if key not in self.known:
            self.known[key] = self.generator(
                ImageList(images.tensors, images.image_sizes[:1]), maps
            )[0]
        return [self.known[key]] * len(images.image_sizes)


def detect(model: FasterRCNN, views: Tensor, *, whole: bool = False) -> list[Detections]:
    """Find the regions of a batch of views: the same ones as ``model`` itself; see `find`.

    Args:
        model, views: as `convolve` takes them.
        whole: as `find` takes it.

    Returns:
        B detections with 1 to ``box_detections_per_img`` regions each, on the same device.

    Raises:
        ValueError: as `convolve`.
    """
    return find(model, convolve(model, views), whole=whole).of_views()


@torch.inference_mode()
def convolve(model: FasterRCNN, views: Tensor, *, rpn: bool = True) -> Convolved:
    """Begin the detection of a batch of views.

    Args:
        model: in eval mode, built for views of this size; faster after `prepare_for_extraction`.
        views: (B, 3, S, S) float32 in [0, 1], on the model's device. All of one size: torchvision
            pads mixed sizes, and padding changes boxes and features.
        rpn: whether to ask the RPN, which `find` needs and `describe` does not.

    Raises:
        ValueError: the views do not have the model's size, or that is not a multiple of 32, to
            which torchvision would pad them.
    """
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
    # Only this part of the transform: its resize changes nothing at this size, but takes time.
    inputs = model.transform.normalize(views)
    dtype = model.roi_heads.box_head.fc6.weight.dtype
    if not _on_cpu(model) and dtype == torch.float32:
        inputs = inputs.contiguous()  # views of bytes come in channels-last memory
    maps = model.backbone(inputs.to(dtype))
    logits, codes = model.rpn.head(list(maps.values())) if rpn else ([], [])
    return Convolved(
        {name: level.to(views.dtype) for name, level in maps.items()},
        [of_level.to(views.dtype) for of_level in logits],
        [of_level.to(views.dtype) for of_level in codes],
        size,
    )


@torch.inference_mode()
def find(model: FasterRCNN, convolved: Convolved, *, whole: bool) -> BatchDetections:
    """Find the regions of views.

    torchvision does not say which proposal a detection came from, and regresses its box
    afterwards. So features are pooled again at the final boxes: box and feature belong together.
    A view without any detection gets one stand-in region: the whole view, score 0, class 0.

    Args:
        model: that `convolve` was called with.
        convolved: what it returned.
        whole: also pool the vectors of the whole views, from the same feature maps. Whether this is
            done does not change the regions.
    """
    maps, heads, size = convolved.maps, model.roi_heads, convolved.size
    levels = list(maps.values())
    images = ImageList(levels[0].new_empty(1, 3, size, size, device="meta"), [(size, size)])
    [anchors] = model.rpn.anchor_generator(images, levels)
    proposals, valid = propose(model.rpn, convolved.logits, convolved.codes, anchors, size)
    proposed = _real(proposals, valid.sum(1))
    logits, codes = heads.box_predictor(vectors_at(heads, maps, proposed, size))
    scores, codes = _padded(proposed, F.softmax(logits, dim=-1), codes)
    places = slice(scores.shape[1])
    chosen = choose(heads, scores, codes, proposals[:, places], valid[:, places], size)
    return _described(model, convolved, *chosen, whole=whole)


@torch.inference_mode()
def describe(
    model: FasterRCNN, convolved: Convolved, regions: Sequence[GivenRegions], *, whole: bool
) -> BatchDetections:
    """Describe given regions of views with the vectors that `find` would give them.

    The box predictor does not run. A view without a region gets the same stand-in.

    Args:
        model, convolved, whole: as `find` takes them.
        regions: of each of the B views, in [0,1] of the view, in the order in which to return them.
    """
    most = max(1, *(len(one.scores) for one in regions))
    boxes = np.zeros((len(regions), most, 4), dtype=np.float32)
    scores = np.zeros((len(regions), most), dtype=np.float32)
    classes = np.zeros((len(regions), most), dtype=np.int64)
    for view, one in enumerate(regions):
        boxes[view, : len(one.scores)] = one.boxes * convolved.size
        scores[view, : len(one.scores)] = one.scores
        classes[view, : len(one.scores)] = one.classes
    counts = np.array([len(one.scores) for one in regions])
    device = next(iter(convolved.maps.values())).device
    placed = (torch.from_numpy(part).to(device) for part in (boxes, scores, classes, counts))
    return _described(model, convolved, *placed, whole=whole)


def _described(
    model: FasterRCNN,
    convolved: Convolved,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    count: Tensor,
    *,
    whole: bool,
) -> BatchDetections:
    """Pool the features of the first ``count`` of m boxes (B, m, 4) of each view."""
    heads, maps, size = model.roi_heads, convolved.maps, convolved.size
    whole_box = boxes.new_zeros(1, 4)
    whole_box[:, 2:] = size
    # The stand-in has score and class 0, as they are already where there is no region.
    boxes[:, :1] = torch.where(count[:, None, None] == 0, whole_box, boxes[:, :1])
    count = count.clamp(min=1)
    placed = _real(boxes, count)
    [features] = _padded(placed, vectors_at(heads, maps, placed, size))
    missing = boxes.shape[1] - features.shape[1]
    features = F.pad(features, (0, 0, 0, missing))
    blank = torch.arange(boxes.shape[1], device=count.device) >= count[:, None]
    features = features.masked_fill(blank[..., None], 0)
    wholes = None
    if whole:
        # Not pooled with the regions: their number decides how a product of matrices is rounded.
        wholes = vectors_at(heads, maps, [whole_box] * len(boxes), size)
    return BatchDetections((boxes / size).clamp(0, 1), scores, classes, features, count, wholes)


def _real(boxes: Tensor, count: Tensor) -> list[Tensor]:
    """The boxes (n, 4) of each image that are pooled: the first ``count`` of (B, n, 4).

    On accelerators all of them, since to learn the number, one would have to wait for the device.
    """
    if boxes.device.type != "cpu":
        return list(boxes.unbind())
    return [of_image[:n] for of_image, n in zip(boxes, count.tolist(), strict=True)]


def _padded(boxes: list[Tensor], *of_boxes: Tensor) -> list[Tensor]:
    """Turn what is known of each box of all images, (n of all, ...), into (B, most n, ...)."""
    counts = [len(of_image) for of_image in boxes]
    if len(set(counts)) == 1:
        return [part.unflatten(0, (len(counts), counts[0])) for part in of_boxes]
    return [pad_sequence(part.split(counts), batch_first=True) for part in of_boxes]
