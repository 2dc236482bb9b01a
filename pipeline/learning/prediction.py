"""The scores of a trained network, wherever they are needed: evaluation, validation, the page.

Letters: N images of a split, B images of a batch, M instances, C labels, W size of a label vector,
H size of a label's node.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DamagedError
from pipeline.learning.batches import Feed
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.splits import SplitData
from pipeline.matching.graphs import InstanceBatch
from pipeline.matching.network import MatchingNetwork, Network, image_logits
from pipeline.tensors import best_device, non_finite

_RESTORE = "Restore the run's checkpoint, or train the run again."


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for the N images of a split.

    Attributes:
        logits: (N, C) float32, finite.
        regions: (N, C) int16, index of the region that won each label's max, equation (14).
    """

    logits: npt.NDArray[np.float32]
    regions: npt.NDArray[np.int16]


class NotFinite(DamagedError):
    """A network's weights, or what it computes for a real region, are nan or infinite."""


class Scorer:
    """A trained network on a device, which scores view 0 of images.

    Args:
        network: moved to the device and put in eval mode.
        label_vectors: (C, W) float32.
        labels: C names, for errors.
        name: of the run, for errors.
        batch_size: B, images that are scored at once.
        device: None for the best one.
    """

    def __init__(
        self,
        network: Network,
        label_vectors: Tensor,
        labels: Sequence[str],
        *,
        name: str,
        batch_size: int,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or best_device()
        self.network: Network = network.to(self.device).eval()
        self.label_vectors = label_vectors.to(self.device)
        self.labels = labels
        self.name = name
        self.batch_size = batch_size

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, name: str) -> Scorer:
        """The scorer of a run, on the best device, with as many images at once as in training."""
        return cls(
            checkpoint.network(),
            checkpoint.label_vectors,
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
            NotFinite, DamagedError: as `logits`.
        """
        best, winners = [], []
        with closing(self.logits(images)) as batches:
            for logits in batches:
                of_images, regions = image_logits(logits)
                best.append(of_images.cpu().numpy())
                winners.append(regions.cpu().numpy().astype(np.int16))
                on_images(len(logits))
        return Predictions(np.concatenate(best), np.concatenate(winners))

    def logits(self, images: SplitData | Feed) -> Generator[Tensor]:
        """Yield the (B, M, C) logits of one batch of images after another; -inf for padding.

        Raises:
            NotFinite: a logit of a real region is nan or infinite.
            DamagedError: as `RegionCache.gather`, also for regions that are not finite.
        """

        def compute(batch: InstanceBatch) -> tuple[Tensor, Tensor]:
            logits = self.network(batch, self.label_vectors)
            return logits, finite_logits(logits, batch.mask)

        return self._over(images, compute)

    def label_nodes(self, images: SplitData | Feed) -> Generator[Tensor]:
        """Yield what one batch of images after another makes of the labels: (B, C, H).

        Raises:
            NotFinite, DamagedError: as `logits`.
        """

        def compute(batch: InstanceBatch) -> tuple[Tensor, Tensor]:
            assert isinstance(self.network, MatchingNetwork)
            nodes = self.network.label_nodes(batch, self.label_vectors)
            return nodes, nodes.isfinite().all(dim=-1)

        return self._over(images, compute)

    @torch.inference_mode()
    def _over(
        self,
        images: SplitData | Feed,
        compute: Callable[[InstanceBatch], tuple[Tensor, Tensor]],
    ) -> Generator[Tensor]:
        """Yield what ``compute`` makes of each batch, if all of it is finite.

        Args:
            compute: returns something, and (B, C) whether it is finite.
        """
        feed = images if isinstance(images, Feed) else Feed(images, self.device, once=True)
        ids = feed.split.image_ids
        with closing(feed.in_order(self.batch_size)) as batches:
            for number, (batch, _) in enumerate(batches):
                result, finite = compute(batch)
                first = number * self.batch_size
                check_finite(
                    finite, self.name, ids[first : first + len(finite)], self.labels, self.network
                )
                yield result


def finite_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Tell whether the logits of all real regions are finite.

    Args:
        logits: (B, M, C), of any value for padding.
        mask: (B, M) bool, False for padding.

    Returns:
        (B, C) bool.
    """
    return (logits.isfinite() | ~mask[..., None]).all(dim=1)


def check_finite(
    finite: Tensor, run: str, images: Sequence[str], labels: Sequence[str], network: Network
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
