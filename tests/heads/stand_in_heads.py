"""Small heads that only tests have: each says something else of regions, or of labels.

`registered` adds them to the registry, with a variant of the same name for each, and `of_head` puts
one of them, untrained, in the place of a run's network.

Letters: B images, M regions, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal
from unittest import mock

import torch
from torch import Tensor

from pipeline.api import TrainedRun
from pipeline.heads.building import build_head
from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, masked_max, masked_mean, masked_softmax, scaled_linear
from pipeline.settings import FeatureSettings, HeadSettings
from pipeline.settings.heads import HEADS, Entry, settings_class


class _Scoring(Head):
    """Base class: a linear score of every region for every label."""

    def __init__(self, sizes: HeadSizes, settings: FeatureSettings) -> None:
        super().__init__(sizes, settings)
        self.second = scaled_linear(sizes.features, sizes.labels)

    def said(self, batch: RegionBatch) -> Tensor:
        """(B, M, C)."""
        return apply(self.second, self.inputs.features(batch.features))


class PlainSettings(FeatureSettings):
    head: Literal["plain"] = "plain"


class Plain(_Scoring):
    """Reads the mean of the regions, and so tells them not apart."""

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        return HeadOutput(masked_mean(self.said(batch), batch.mask))


class WeighingSettings(FeatureSettings):
    head: Literal["weighing"] = "weighing"


class Weighing(_Scoring):
    """Reads each region by a weight that depends on the label."""

    attribution = "weights"

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        said = self.said(batch)
        weights = masked_softmax(3 * said, batch.mask)
        return HeadOutput((weights * said).sum(dim=1), weights)


class WholeWinsSettings(FeatureSettings):
    head: Literal["whole-wins"] = "whole-wins"


class WholeWins(_Scoring):
    """Scores of labels with even numbers come from the whole view, the others from a region."""

    attribution = "logits"

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        regions = self.said(batch).masked_fill(~batch.mask[..., None], -torch.inf)
        best = masked_max(regions, batch.mask)
        even = torch.arange(best.shape[1], device=best.device) % 2 == 0
        return HeadOutput(best, regions, whole=torch.where(even, best + 1, best - 1))


class OnlyWholeSettings(FeatureSettings):
    head: Literal["only-whole"] = "only-whole"

    @property
    def needs_whole(self) -> bool:
        return True


class OnlyWhole(_Scoring):
    """Reads no regions."""

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        assert batch.whole is not None
        return HeadOutput(apply(self.second, self.inputs.whole(batch.whole)))


class SetsSettings(FeatureSettings):
    ranks: ClassVar[bool] = False
    head: Literal["sets"] = "sets"


class Sets(Plain):
    """Stands for a predictor of sets."""


class RankingSettings(FeatureSettings):
    decides: ClassVar[bool] = False
    head: Literal["ranking"] = "ranking"


class Ranking(_Scoring):
    """Stands for a head that was trained with a softmax."""

    attribution = "logits"

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        regions = self.said(batch).masked_fill(~batch.mask[..., None], -torch.inf)
        return HeadOutput(masked_max(regions, batch.mask), regions)


class StubbornSettings(FeatureSettings):
    head: Literal["stubborn"] = "stubborn"


class Stubborn(_Scoring):
    """Looks at the numbers themselves, which no exporter can translate."""

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        said = masked_mean(self.said(batch), batch.mask)
        return HeadOutput(said if said.sum().item() > 0 else -said)


_CLASSES = (Plain, Weighing, WholeWins, OnlyWhole, Sets, Ranking, Stubborn)
VARIANTS: dict[str, dict[str, Any]] = {}
"""The train settings of each head's variant."""
_ENTRIES: dict[str, Entry] = {}
for _class in _CLASSES:
    _settings: Any = globals()[f"{_class.__name__}Settings"]
    _name: str = _settings.model_fields["head"].default
    VARIANTS[_name] = {"network": {"head": _name}}
    _ENTRIES[_name] = Entry("stand_in_heads", _class.__name__, (_name,))


@contextmanager
def registered() -> Iterator[None]:
    """Register the heads in the block."""
    with mock.patch.dict(HEADS, _ENTRIES):
        yield


def with_statistics(network: Head, run: TrainedRun) -> dict[str, Tensor]:
    """The state of a network, with the run's statistics of its inputs."""
    inputs = {key: value for key, value in run.checkpoint.state.items() if "inputs." in key}
    return {**network.state_dict(), **inputs}


def untrained(run: TrainedRun, network: HeadSettings) -> TrainedRun:
    """Replace the run's network by a new one with other settings, or with another head."""
    checkpoint = run.checkpoint
    settings = checkpoint.settings.model_copy(update={"network": network})
    torch.manual_seed(0)
    labels, vector_size = checkpoint.label_vectors.shape
    classes = int(checkpoint.state["inputs.classes"])
    sizes = HeadSizes(checkpoint.feature_size, labels, vector_size, classes)
    state = with_statistics(build_head(sizes, network), run)
    after = replace(checkpoint, settings=settings, state=state)
    return TrainedRun(after, run.detector, run.detector_classes, run._extract)


def of_head(run: TrainedRun, head: str) -> TrainedRun:
    """The run with an untrained head of `stand_in_heads`."""
    return untrained(run, settings_class(head)())
