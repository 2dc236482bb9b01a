"""Why an image got its labels: what each label's score becomes when something is taken away.

Nothing is estimated. The network runs again without the edges of its label graph, without those of
its instance graph, and without each single region, whose neighbours then gather from others.

Letters: M instances, C labels, n real regions of the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from pipeline.evaluation.metrics import THRESHOLD
from pipeline.inference.trained import Picture, Prediction, TrainedRun, as_picture
from pipeline.matching.graphs import InstanceBatch
from pipeline.matching.network import MatchingNetwork, image_logits


@dataclass(frozen=True, eq=False)
class LabelExplanation:
    """One label of one image. A change is the score then, less the score now.

    Attributes:
        label: its name.
        score: of the image.
        region: the one that won the max.
        label_graph: change without the label graph; None where the run has none.
        instance_graph: change without the instance graph; None where the run has none.
        region_changes: (n,) float32, change without each region; None where there is but one.
    """

    label: str
    score: float
    region: int
    label_graph: float | None
    instance_graph: float | None
    region_changes: npt.NDArray[np.float32] | None

    def most_influential(self, most: int, least: float) -> list[tuple[int, float]]:
        """The regions whose loss changes the score most, each with the change.

        Args:
            most: how many.
            least: change, of either sign, below which a region is not named.
        """
        if self.region_changes is None:
            return []
        order = np.argsort(-np.abs(self.region_changes), kind="stable")[:most].tolist()
        changes = [(region, float(self.region_changes[region])) for region in order]
        return [(region, change) for region, change in changes if abs(change) >= least]


@dataclass(frozen=True, eq=False)
class Explanation:
    """An image's predicted labels, explained.

    Attributes:
        prediction: of all labels.
        labels: the predicted ones, best first; where none is, the best one.
        predicted: False where none is.
    """

    prediction: Prediction
    labels: tuple[LabelExplanation, ...]
    predicted: bool


def explain(run: TrainedRun, image: Picture) -> Explanation:
    """What an image's predicted labels (score above 0.5) are owed to.

    Args:
        run: a trained run of any variant.
        image: a Pillow image or an (H, W, 3) uint8 array of RGB.

    Raises:
        TypeError, ValueError: the image is something else.
    """
    picture = as_picture(image)
    batch = run.instances([picture])
    [prediction] = run.read(batch, [picture.size])
    network = run.network

    def scores(batch: InstanceBatch, **graphs: bool) -> npt.NDArray[np.float32]:
        """(B, C)"""
        best, _ = image_logits(run.logits(batch, **graphs))
        array: npt.NDArray[np.float32] = best.sigmoid().cpu().numpy()
        return array

    without: dict[str, npt.NDArray[np.float32]] = {}  # (C,)
    if isinstance(network, MatchingNetwork):
        for graph in ("label_graph", "instance_graph"):
            if getattr(network.settings, graph):
                without[graph] = scores(batch, **{graph: False})[0] - prediction.scores
    changes = None  # (n, C)
    regions = len(prediction.boxes)
    if regions > 1:
        changes = scores(_without_each(batch, regions)) - prediction.scores

    order = np.argsort(-prediction.scores, kind="stable").tolist()
    chosen = [label for label in order if prediction.scores[label] > THRESHOLD]
    return Explanation(
        prediction,
        tuple(
            LabelExplanation(
                label=run.vocabulary[label],
                score=float(prediction.scores[label]),
                region=int(prediction.regions[label]),
                label_graph=_of(without.get("label_graph"), label),
                instance_graph=_of(without.get("instance_graph"), label),
                region_changes=None if changes is None else changes[:, label],
            )
            for label in chosen or order[:1]
        ),
        bool(chosen),
    )


def _without_each(batch: InstanceBatch, regions: int) -> InstanceBatch:
    """A batch of one image -> of as many as it has regions, each without one of them."""
    many = InstanceBatch(
        *(
            tensor.expand(regions, *tensor.shape[1:]).contiguous()
            for tensor in (batch.features, batch.boxes, batch.scores, batch.classes, batch.mask)
        )
    )
    taken = torch.eye(regions, many.mask.shape[1], dtype=torch.bool, device=many.mask.device)
    return replace(many, mask=many.mask & ~taken)


def _of(changes: npt.NDArray[np.float32] | None, label: int) -> float | None:
    return None if changes is None else float(changes[label])
