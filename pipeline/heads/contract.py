"""What a head is: what it reads, and what it returns.

A head turns the regions of an image into a score for each label. All that a head is given is a
`RegionBatch` and a `LabelSet`, all that it returns is a `HeadOutput`, and everything else
(training, evaluation, the page, `predict`, `explain`, export) works with these three. docs/heads.md
says how to add a head.

Letters, in all of `pipeline.heads`: B images, M regions of an image (padding included), C labels,
D feature size, W label vector size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.heads.inputs import Inputs, InputStatistics
from pipeline.settings import FeatureSettings, HeadSettings, RegionSettings


@dataclass(frozen=True)
class RegionBatch:
    """The regions of a batch of images.

    Attributes:
        features: (B, M, D) float, as extracted.
        boxes: (B, M, 4) float, xyxy in [0,1] of the view.
        scores: (B, M) float, the detector's scores.
        classes: (B, M) int, the detector's class numbers; 0 means none.
        mask: (B, M) bool, False for padding. Every image has at least one region.
        whole: (B, D) float, the feature of the whole view; None where the cache holds none.
    """

    features: Tensor
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask: Tensor
    whole: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> RegionBatch:
        """Apply a function to every tensor."""
        return RegionBatch(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names above, without `whole` where it is None."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device, dtype: torch.dtype) -> RegionBatch:
        """Copy the batch to a device and convert its floats to a precision."""
        return self.each(
            lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype, non_blocking=True)
        )

    def of_whole(self) -> Tensor:
        """`whole`, for heads that need it; runs are refused before if the cache has none."""
        assert self.whole is not None
        return self.whole

    def with_whole_region(self) -> RegionBatch:
        """Append the whole view as one more region, the last one: score 0, class 0 (none)."""
        images = self.mask.shape[0]  # `len` would fix the number where torch exports the head
        # Not a tensor of four numbers, which an accelerator would have to be sent, and waited for.
        corners = (self.boxes.new_zeros(images, 1, 2), self.boxes.new_ones(images, 1, 2))
        box = torch.cat(corners, dim=2)
        return replace(
            self,
            features=torch.cat([self.features, self.of_whole()[:, None]], dim=1),
            boxes=torch.cat([self.boxes, box], dim=1),
            scores=torch.cat([self.scores, self.scores.new_zeros(images, 1)], dim=1),
            classes=torch.cat([self.classes, self.classes.new_zeros(images, 1)], dim=1),
            mask=torch.cat([self.mask, self.mask.new_ones(images, 1)], dim=1),
        )


@dataclass(frozen=True)
class LabelSet:
    """What is known of the labels. Statistics are those of the images that are trained on.

    Attributes:
        vectors: (C, W) float, as they come from their source.
        ratio: (C,) float, r^c of equation (15): the share of the images that have the label.
        conditional: (C, C) float: row i, column j is P(j|i), the share of the images with label i
            that also have j. 0 on the diagonal, and in the row of a label that no image has. An
            ignored label counts as absent. None unless the head reads it
            (`HeadSettings.reads_conditional`).
    """

    vectors: Tensor
    ratio: Tensor
    conditional: Tensor | None = None

    def to(self, device: torch.device) -> LabelSet:
        """Copy everything to a device."""
        conditional = None if self.conditional is None else self.conditional.to(device)
        return LabelSet(self.vectors.to(device), self.ratio.to(device), conditional)


class HeadOutput(NamedTuple):
    """What a head says about a batch.

    Attributes:
        image: (B, C) logits of the images.
        regions: (B, M, C) how much each region says for each label, its attribution; None for a
            head that looks at the image as a whole. `Head.attribution` tells what the numbers are.
            For padding, a logit is -inf and a weight 0.
        whole: (B, C) the attribution of the whole view, where it was read as one more region.
        loss: the head's own loss, a scalar, the mean over the images; only in training, and only
            of heads whose settings say `own_loss`.
    """

    image: Tensor
    regions: Tensor | None = None
    whole: Tensor | None = None
    loss: Tensor | None = None

    def winners(self) -> Tensor:
        """Index of the region that says most for each label: (B, C) int64.

        It is -1 where that is no region but the image as a whole, as for a label that read none of
        the regions: its weights are all 0.
        """
        if self.regions is None:
            return torch.full_like(self.image, -1, dtype=torch.int64)
        best, winners = self.regions.max(dim=1)
        winners = winners.masked_fill((self.regions == 0).all(dim=1), -1)
        if self.whole is not None:
            winners = winners.masked_fill(self.whole > best, -1)
        return winners


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of the data that a head is built for.

    Attributes:
        features: D.
        labels: C.
        vectors: W.
        classes: one more than the largest class number of the detector among the training regions.
    """

    features: int
    labels: int
    vectors: int
    classes: int


Attribution = Literal["logits", "weights"]


class Head(nn.Module):
    """Base class of all heads: a subclass says how to score a batch in `score`.

    Attributes:
        attribution: what `HeadOutput.regions` holds: the logits that the head gives each region,
            or the weights by which it reads them; None if it does not tell regions apart.
        recordable: whether its training step can be recorded as a CUDA graph. It can't if an
            operation waits for the device, such as ``.item()``, or has a result whose size depends
            on the data.
        inputs: standardises what the head reads.
    """

    attribution: ClassVar[Attribution | None] = None
    recordable: ClassVar[bool] = True

    def __init__(self, sizes: HeadSizes, settings: HeadSettings) -> None:
        super().__init__()
        least = settings.least_deviation if isinstance(settings, FeatureSettings) else 1.0
        self.inputs = Inputs(sizes.features, least, sizes.classes)
        self.reads_whole_region = isinstance(settings, RegionSettings) and settings.whole_region

    def start(self, statistics: InputStatistics, labels: LabelSet) -> None:
        """Take over, before training, what is known of the inputs and the labels.

        Whatever a head keeps of it is a buffer, so that the checkpoint holds it.
        """
        self.inputs.set_statistics(statistics, labels.vectors)

    def forward(
        self,
        batch: RegionBatch,
        labels: LabelSet,
        truth: Tensor | None = None,
        **parts: bool,
    ) -> HeadOutput:
        """Score every image for every label.

        Args:
            batch: B images with up to M regions.
            labels: what is known of the C labels.
            truth: (B, C) in {1, 0, -1}, for heads that compute their own loss; None if it is not
                needed.
            parts: keywords of the head's own `score`.
        """
        extra = self.reads_whole_region
        output = self.score(batch.with_whole_region() if extra else batch, labels, truth, **parts)
        if extra and output.regions is not None:
            regions, whole = output.regions[:, :-1], output.regions[:, -1]
            output = output._replace(regions=regions, whole=whole)
        return output

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, in which the whole view is the last region if the settings ask for it.

        Args:
            batch, labels, truth: as `forward` takes them.
        """
        raise NotImplementedError
