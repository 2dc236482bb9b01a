"""The vectors of boxes: feature maps are pooled at the boxes, and a box head reads what was pooled.

Letters: B images of a batch, S side of a view in pixels, n boxes, d feature size, C channels of a
pyramid level. Boxes are xyxy in pixels of the view.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

# Boxes that are pooled at once on a CPU. The result, 25 MB at full width, stays below the 32 MB
# above which glibc asks the system for new pages each time. 250 and 1000 were slower.
_PIECE = 500


def vectors_at(heads: Any, maps: dict[str, Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """Pool the maps at the boxes of each image, and let the box head read them.

    Args:
        heads: torchvision's `RoIHeads`, prepared or not.
        maps: (B, C, H, W) of each level, in the type of the views.
        boxes: (n, 4) of each of the B images.
        size: S.

    Returns:
        (n of all images, d) in the type of the maps, whatever type the box head computes in.
    """
    shapes = [(size, size)] * len(boxes)
    if sum(len(of_image) for of_image in boxes) <= _PIECE or boxes[0].device.type != "cpu":
        return _read(heads, maps, boxes, shapes)
    pieces = []
    for image, of_image in enumerate(boxes):
        own = {name: level[image : image + 1] for name, level in maps.items()}
        for piece in of_image.split(_PIECE):
            pieces.append(_read(heads, own, [piece], shapes[:1]))
    return torch.cat(pieces)


def _read(
    heads: Any, maps: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
) -> Tensor:
    pooled = heads.box_roi_pool(maps, boxes, shapes)
    vectors: Tensor = heads.box_head(pooled.to(heads.box_head.fc6.weight.dtype))
    return vectors.to(pooled.dtype)


class _Pool(nn.Module):
    """What the two ways of pooling have in common; called as torchvision's `MultiScaleRoIAlign`."""

    def __init__(self, pool: MultiScaleRoIAlign) -> None:
        super().__init__()
        self.names: list[str] = pool.featmap_names
        self.bins: int = pool.output_size[0]
        self.samples: int = pool.sampling_ratio  # in each direction of a bin
        self.scale, self.level = pool.canonical_scale, pool.canonical_level

    def _levels(
        self, maps: dict[str, Tensor], boxes: list[Tensor], size: int
    ) -> tuple[list[Tensor], list[int], Tensor]:
        """Return the maps that are pooled, their strides, and the number of each box's level."""
        levels = [maps[name] for name in self.names]
        strides = [size // level.shape[-1] for level in levels]
        first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        mapper = LevelMapper(first, last, self.scale, self.level)
        return levels, strides, mapper([torch.cat(boxes)])


class LevelPool(_Pool):
    """torchvision's pooling for accelerators, which waits for the device once.

    `MultiScaleRoIAlign` waits once for each level, to learn which boxes belong to it.
    """

    def forward(
        self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Pool as `TapsPool`, in contiguous memory."""
        levels, strides, level_of_box = self._levels(maps, boxes, image_shapes[0][0])
        order = level_of_box.argsort(stable=True)
        numbers = torch.arange(len(boxes), device=order.device).to(boxes[0]).split(1)
        image = torch.cat([n.expand(len(own)) for n, own in zip(numbers, boxes, strict=True)])
        of_levels = torch.arange(len(levels), device=order.device)
        counts = (level_of_box[:, None] == of_levels).sum(0).tolist()
        rois = torch.cat([image[:, None], torch.cat(boxes)], dim=1)[order]
        # The kernel itself: torchvision's function would take a version in Python, which it
        # compiles, where the process asks for deterministic kernels. This one is deterministic.
        pooled = [
            torch.ops.torchvision.roi_align(
                level, of_level, 1 / stride, self.bins, self.bins, self.samples, False
            )
            for level, of_level, stride in zip(levels, rois.split(counts), strides, strict=True)
        ]
        return torch.cat(pooled)[order.argsort()]


class TapsPool(_Pool):
    """torchvision's `MultiScaleRoIAlign` (not ``aligned``), as weighted sums of rows.

    A bin's value is the mean of its samples, and a sample is the bilinear mean of the four
    positions around it. A level in channels-last memory is a (B * height * width, C) table, so
    that a bin is a weighted sum of its rows. torchvision's CPU kernel gathers single numbers, on
    one core.
    """

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
        levels, strides, level_of_box = self._levels(maps, boxes, image_shapes[0][0])
        rois = torch.cat(boxes)
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


class ChannelsLastHead(nn.Module):
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
