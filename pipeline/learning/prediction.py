"""What a trained network predicts for a split.

Letters: N images of a split, B images of a batch, C labels, W size of a label vector.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.learning.batches import Feed
from pipeline.learning.splits import SplitData
from pipeline.matching.network import Network, image_logits


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for the N images of a split.

    Attributes:
        logits: (N, C) float32.
        regions: (N, C) int16, index of the region that won each label's max, equation (14).
    """

    logits: np.ndarray
    regions: np.ndarray


def predict_split(
    network: Network, split: SplitData, label_vectors: Tensor, batch_size: int = 64
) -> Predictions:
    """Score view 0 of every image of a split.

    Args:
        network: in eval mode, on the device of ``label_vectors``.
        split: the images.
        label_vectors: (C, W) float32.
        batch_size: B, images that are scored at once.
    """
    feed = Feed(split, label_vectors.device, once=True)
    return predict_feed(network, feed, label_vectors, batch_size)


@torch.inference_mode()
def predict_feed(
    network: Network, feed: Feed, label_vectors: Tensor, batch_size: int = 64
) -> Predictions:
    """Score view 0 of every image of a feed, as `predict_split` does.

    A feed that is read more than once keeps its regions in memory where they fit.
    """
    logits, regions = [], []
    with closing(feed.in_order(batch_size)) as batches:
        for instances, _ in batches:
            best, winners = image_logits(network(instances, label_vectors))
            logits.append(best.cpu().numpy())
            regions.append(winners.cpu().numpy().astype(np.int16))
    return Predictions(np.concatenate(logits), np.concatenate(regions))
