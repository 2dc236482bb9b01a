"""Explain the labels of an image: how each score changes when something is removed.

Nothing is estimated. The network runs again without each single region, and GM-MLIC also without
the edges of its label graph, and without those of its instance graph. What is left is read as if
the rest had never been there: neighbours of a removed region gather from others.

Letters: M instances, C labels, n real regions of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.formats.text import composed, legible
from pipeline.heads.contract import Attribution, RegionBatch
from pipeline.heads.matching.network import GmMlic
from pipeline.inference.trained import Picture, Prediction, TrainedRun, as_picture


@dataclass(frozen=True, eq=False)
class LabelExplanation:
    """One label of one image. A change is the score without something minus the score with it.

    Attributes:
        label: its name.
        score: of the image.
        region: index of the region that says most for it; None where that is the image as a whole.
        said: what that region says, as in `Prediction.region_scores`: its probability, or the
            weight by which the head reads it; None without such a region.
        label_graph: change without the label graph; None if the run has no label graph.
        instance_graph: change without the instance graph; None if the run has none.
        region_changes: (n,) float32, change without each region; None if there is only one, or the
            head reads no regions.
    """

    label: str
    score: float
    region: int | None
    said: float | None
    label_graph: float | None
    instance_graph: float | None
    region_changes: npt.NDArray[np.float32] | None

    def most_influential(self, most: int, least: float) -> list[tuple[int, float]]:
        """List the regions whose removal changes the score most, each with the change.

        Args:
            most: number of regions to list at most.
            least: leave out regions with a smaller change, of either sign.
        """
        if self.region_changes is None:
            return []
        order = np.argsort(-np.abs(self.region_changes), kind="stable")[:most].tolist()
        changes = [(region, float(self.region_changes[region])) for region in order]
        return [(region, change) for region, change in changes if abs(change) >= least]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Labels of an image, explained.

    Attributes:
        prediction: scores of all labels.
        labels: those that were asked for, or else the predicted ones, best first; if none is
            predicted, the best label.
        predicted: False if no label is predicted.
        attribution: what `LabelExplanation.said` is; None for a head that does not tell regions
            apart.
        reads_regions: False for a head whose scores stay the same without all that is known of the
            regions, since it reads only the whole view.
        asked: whether labels were asked for.
    """

    prediction: Prediction
    labels: tuple[LabelExplanation, ...]
    predicted: bool
    attribution: Attribution | None
    reads_regions: bool
    asked: bool = False


def explain(
    run: TrainedRun, image: Picture, name: str = "0", labels: Sequence[str] = ()
) -> Explanation:
    """Explain which regions and graphs produced an image's predicted labels.

    Args:
        run: a trained run with any head.
        image: as `TrainedRun.predict` takes it.
        name: of the image, for errors.
        labels: the labels to explain instead of the predicted ones, whatever their scores.

    Raises:
        TypeError, ValueError: the image is something else.
        InputError: the run has no label of such a name.
        NotFinite: as `TrainedRun.predict`.
    """
    asked = _numbers_of(labels, run)
    picture = as_picture(image)
    batch = run.instances([picture], [name])
    [prediction] = run.read(batch, [picture.size], [name])
    changes = _changes(run, batch, prediction, name)
    order, decided = prediction.order, prediction.predicted
    predicted = [label for label in order if decided[label]]
    chosen = [label for label in order if label in asked] or predicted
    return Explanation(
        prediction,
        tuple(
            LabelExplanation(
                label=run.vocabulary[label],
                score=float(prediction.scores[label]),
                region=(region := prediction.region_of(label)),
                said=prediction.said(region, label),
                label_graph=_of(changes.graphs.get("label_graph"), label),
                instance_graph=_of(changes.graphs.get("instance_graph"), label),
                region_changes=None if changes.regions is None else changes.regions[:, label],
            )
            for label in chosen or order[:1]
        ),
        bool(predicted),
        run.network.attribution,
        changes.reads_regions,
        bool(asked),
    )


class _Changes(NamedTuple):
    """Scores of all labels without something, minus those with it.

    Attributes:
        graphs: name of a graph that the network has -> (C,) without its edges.
        regions: (n, C), without each region; None as in `LabelExplanation`.
        reads_regions: as in `Explanation`.
    """

    graphs: dict[str, npt.NDArray[np.float32]]
    regions: npt.NDArray[np.float32] | None
    reads_regions: bool


def _changes(run: TrainedRun, batch: RegionBatch, prediction: Prediction, name: str) -> _Changes:
    """Run the network again without each part, for a batch of the one image ``name``."""

    def logits(batch: RegionBatch, **graphs: bool) -> Tensor:
        """Logits (B, C) of the image."""
        return run.outputs(batch, [name] * len(batch.mask), **graphs).image.cpu()

    def changed(batch: RegionBatch, **graphs: bool) -> npt.NDArray[np.float32]:
        """Changes of the scores, (B, C)."""
        scores: npt.NDArray[np.float32] = logits(batch, **graphs).sigmoid().numpy()
        return scores - prediction.scores

    graphs = {}
    if isinstance(run.network, GmMlic):
        for graph in ("label_graph", "instance_graph"):
            if getattr(run.network.settings, graph):
                graphs[graph] = changed(batch, **{graph: False})[0]
    reads_regions = bool((logits(_without_all(batch))[0].numpy() != prediction.logits).any())
    regions = len(prediction.boxes)
    of_regions = None
    if regions > 1 and reads_regions:
        of_regions = changed(_without_each(batch, regions))
    return _Changes(graphs, of_regions, reads_regions)


def _numbers_of(labels: Sequence[str], run: TrainedRun) -> set[int]:
    """Look up labels by their names, in any Unicode form."""
    numbers = {composed(name): number for number, name in enumerate(run.vocabulary)}
    for name in labels:
        if composed(name) not in numbers:
            like = get_close_matches(name, run.vocabulary, n=1, cutoff=0.5)
            raise InputError(
                f"{run.name} has no label {name!r}.",
                f"Did you mean {like[0]!r}?"
                if like
                else f"Its labels are {', '.join(map(legible, run.vocabulary))}.",
            )
    return {numbers[composed(name)] for name in labels}


def _without_each(batch: RegionBatch, regions: int) -> RegionBatch:
    """Turn a batch of one image into one copy per region, each without that region."""
    many = batch.each(lambda x: x.expand(regions, *x.shape[1:]).contiguous())
    removed = torch.eye(regions, many.mask.shape[1], dtype=torch.bool, device=many.mask.device)
    return replace(many, mask=many.mask & ~removed)


def _without_all(batch: RegionBatch) -> RegionBatch:
    """Remove all that is known of the regions, and keep the vector of the whole view.

    Of each image one region is left, about which everything is 0.
    """
    first = torch.zeros_like(batch.mask)
    first[:, 0] = True
    blank = batch.each(torch.zeros_like)
    return replace(blank, mask=first, whole=batch.whole)


def _of(changes: npt.NDArray[np.float32] | None, label: int) -> float | None:
    return None if changes is None else float(changes[label])
