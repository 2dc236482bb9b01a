"""The scores of a trained network, wherever they are needed: evaluation, validation, the page.

Letters: N images of a split, B images of a batch, M regions, C labels, H size of a label's node.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DamagedError
from pipeline.heads.contract import Head, HeadOutput, LabelSet, RegionBatch
from pipeline.learning.batches import Feed
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.splits import SplitData
from pipeline.tensors import best_device, computing_in, non_finite

Result = TypeVar("Result")

_RESTORE = "Restore the run's checkpoint, or train the run again."


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for the N images of a split.

    Attributes:
        logits: (N, C) float32, finite.
        regions: (N, C) int16, index of the region that says most for each label; -1 where that
            is the image as a whole.
    """

    logits: npt.NDArray[np.float32]
    regions: npt.NDArray[np.int16]


class NotFinite(DamagedError):
    """A network's weights, or what it computes for a real region, are nan or infinite."""


class Scorer:
    """A trained network on a device, which scores view 0 of images.

    Args:
        network: moved to the device and put in eval mode.
        labels: what is known of the labels.
        names: of the C labels, for errors.
        name: of the run, for errors.
        batch_size: B, images that are scored at once.
        device: None for the best one.
    """

    def __init__(
        self,
        network: Head,
        labels: LabelSet,
        names: Sequence[str],
        *,
        name: str,
        batch_size: int,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or best_device()
        self.network: Head = network.to(self.device).eval()
        self.labels = labels.to(self.device)
        self.names = names
        self.name = name
        self.batch_size = batch_size

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, name: str) -> Scorer:
        """The scorer of a run, on the best device, with as many images at once as in training."""
        return cls(
            checkpoint.network(),
            checkpoint.labels,
            checkpoint.vocabulary,
            name=name,
            batch_size=checkpoint.settings.batch_size,
        )

    def predict(
        self, images: SplitData | Feed, on_images: Callable[[int], object] = lambda images: None
    ) -> Predictions:
        """Score every image.

        Args:
            images: a split, or a feed on this device if the images are read more than once.
            on_images: called with the number of images of each batch that is scored.

        Raises:
            NotFinite, DamagedError: as `outputs`.
        """
        best, winners = [], []
        with closing(self.outputs(images)) as batches:
            for _, output in batches:
                best.append(output.image.cpu().numpy())
                winners.append(output.winners().cpu().numpy().astype(np.int16))
                on_images(len(output.image))
        return Predictions(np.concatenate(best), np.concatenate(winners))

    def outputs(self, images: SplitData | Feed) -> Generator[tuple[RegionBatch, HeadOutput]]:
        """Yield one batch of images after another, and what the network says about it.

        Raises:
            NotFinite: a logit of an image, or what is said of a real region, is nan or infinite.
            DamagedError: as `RegionCache.gather`, also for regions that are not finite.
        """

        def compute(batch: RegionBatch) -> tuple[tuple[RegionBatch, HeadOutput], Tensor]:
            output = self.network(batch, self.labels)
            return (batch, output), finite_output(output, batch.mask)

        return self.over(images, compute)

    @torch.inference_mode()
    def over(
        self,
        images: SplitData | Feed,
        compute: Callable[[RegionBatch], tuple[Result, Tensor]],
    ) -> Generator[Result]:
        """Yield what ``compute`` makes of each batch, if all of it is finite.

        Args:
            images: as `predict` takes them.
            compute: returns something, and (B, C) whether it is finite.

        Raises:
            NotFinite, DamagedError: as `outputs`.
        """
        feed = images if isinstance(images, Feed) else Feed(images, self.device, once=True)
        ids = feed.split.image_ids
        with closing(feed.in_order(self.batch_size)) as batches:
            for number, (batch, _) in enumerate(batches):
                with computing_in("float32"):
                    result, finite = compute(batch)
                first = number * self.batch_size
                check_finite(
                    finite, self.name, ids[first : first + len(finite)], self.names, self.network
                )
                yield result


def finite_output(output: HeadOutput, mask: Tensor) -> Tensor:
    """Tell whether what a head says about images and their real regions is finite.

    Args:
        output: of B images.
        mask: (B, M) bool, False for padding.

    Returns:
        (B, C) bool.
    """
    finite = output.image.isfinite()
    if output.regions is not None:
        finite &= (output.regions.isfinite() | ~mask[..., None]).all(dim=1)
    return finite


def shown_attribution(network: Head, output: HeadOutput) -> Tensor | None:
    """What each region says for each label, as people read it.

    Returns:
        (B, M, C): probabilities where the head gives regions logits, else its weights; 0 for
        padding. None for a head that does not tell regions apart.
    """
    if output.regions is None or network.attribution == "weights":
        return output.regions
    return output.regions.sigmoid()


def check_finite(
    finite: Tensor, run: str, images: Sequence[str], labels: Sequence[str], network: Head
) -> None:
    """Check the scores of a batch.

    Args:
        finite: (B, C) bool, whether what was computed for an image and a label is finite.
        run: its name.
        images: B ids or paths.
        labels: C names.
        network: that computed it.

    Raises:
        NotFinite: something is not finite.
    """
    if finite.all():
        return
    image, label = (~finite).nonzero()[0].tolist()
    weights = non_finite(network.state_dict())
    reason = "its weights are finite, but too large for the regions of this image"
    if weights:
        reason = f"{len(weights)} tensors of its weights are not, the first is {weights[0]}"
    raise NotFinite(
        f"{run}: the score of image {images[image]!r} for label {labels[label]!r} is not a finite "
        f"number; {reason}.",
        _RESTORE,
    )
