"""Finished runs: what is read of a run once it was trained and evaluated.

The code that reads the checkout makes these values; tables and the page are made from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.decisions.decisions import Decisions
from pipeline.evaluation.entries import Entry, EntryEvaluation
from pipeline.evaluation.metrics import Evaluation
from pipeline.settings import TrainSettings
from pipeline.shards.schema import Recipe


@dataclass(frozen=True)
class Run:
    """A run that was trained and evaluated.

    Attributes:
        name: of its folder.
        settings: the variant's own.
        views: how many cached views of each training image it drew from.
        recipe: of the regions that it was trained on.
        history: one row per epoch, as its checkpoint holds them.
        parameters: how many numbers the network learns.
        evaluation: its metrics, and what they were measured on.
        checkpoint, predictions: its files.
        decisions: that it fitted; None if it fitted none.
    """

    name: str
    settings: TrainSettings
    views: int
    recipe: Recipe
    history: Sequence[Mapping[str, float]]
    parameters: int
    evaluation: Evaluation
    checkpoint: Path
    predictions: Path
    decisions: Decisions | None = None


Runs = Mapping[str, Sequence[Run]]
"""Variant -> its runs, one per seed."""

Evaluations = Mapping[str, Sequence[Evaluation | EntryEvaluation]]
"""Variant -> the evaluation of each of its runs; name of an entry -> its evaluation."""


def ranking(runs: Evaluations) -> dict[str, Sequence[Evaluation | EntryEvaluation]]:
    """The variants whose scores rank, and so have AP and mAP; a predictor of sets has none."""
    return {variant: seeds for variant, seeds in runs.items() if seeds[0].metrics.mAP is not None}


def deciding(runs: Evaluations) -> dict[str, Sequence[Evaluation | EntryEvaluation]]:
    """The variants whose scores say which labels an image has, and not only which are likelier."""
    return {variant: seeds for variant, seeds in runs.items() if seeds[0].metrics.all is not None}


def evaluations_of(
    runs: Runs, entries: Iterable[Entry] = ()
) -> dict[str, Sequence[Evaluation | EntryEvaluation]]:
    """The evaluations alone, of the runs and then of the entries beside them."""
    return {
        **{variant: [run.evaluation for run in seeds] for variant, seeds in runs.items()},
        **{entry.evaluation.name: [entry.evaluation] for entry in entries},
    }
