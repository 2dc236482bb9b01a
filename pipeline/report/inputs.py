"""What a page is made from. The caller, who knows the checkout, reads it and passes it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.manifest import Manifest
from pipeline.doubts.listing import DoubtList
from pipeline.errors import MismatchError
from pipeline.evaluation.entries import Entry
from pipeline.evaluation.predictions import Scores
from pipeline.evaluation.runs import Evaluations, Run, Runs, evaluations_of, ranking
from pipeline.evaluation.tables import default_base
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.regions.detector import DetectorDescription
from pipeline.report.sweeps import Sweep
from pipeline.shards.failures import Failure
from pipeline.shards.reader import RegionCache

Phase = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], object]]]
"""Shows a part of the work, given its name, how many things it has (None if that is not known), and
what a thing is. What its block gets is called with the number of things that were just done."""


@dataclass(frozen=True)
class PageInputs:
    """Everything that a page shows.

    Attributes:
        manifest: of the data set.
        source: kind of the data set, as its settings name it; decides how labels are grouped.
        root: the folder that the manifest's paths are relative to.
        detector: that made the regions; None if it is not known any more, or they are imported.
        cache: the regions that the runs were trained on.
        failures: the images that have no regions, by id.
        runs: those to show; every variant has the same seeds.
        scores: their predictions, and those of the entries.
        sweeps: to show.
        times: rows of the table of times: stage, what of, seconds, when it finished.
        settings: the settings that were used, as a text to show.
        images: how many test images the gallery shows at most.
        doubts: the doubtful labels; None if they were not looked for.
        given_classes: names of the class numbers of regions at given boxes; None if they are
            unknown, or a detector found the regions.
        entries: to show beside the runs.
    """

    manifest: Manifest
    source: str
    root: Path
    detector: DetectorDescription | None
    cache: RegionCache
    failures: Mapping[str, Failure]
    runs: Runs
    scores: Scores
    sweeps: Sequence[Sweep]
    times: Sequence[Sequence[str]]
    settings: str
    images: int
    doubts: DoubtList | None = None
    given_classes: Sequence[str] | None = None
    entries: Sequence[Entry] = ()

    @property
    def evaluations(self) -> Evaluations:
        """Those of the runs and of the entries."""
        return evaluations_of(self.runs, self.entries)

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the regions' class numbers; None if they are unknown."""
        if "boxes" in self.cache.recipe:
            return self.given_classes
        return None if self.detector is None else self.detector.classes

    @property
    def base(self) -> str:
        """The variant that the others are compared with: one that has a mAP, if any has."""
        return default_base(ranking(evaluations_of(self.runs)) or self.runs)

    @property
    def shown(self) -> Run:
        """The run that a figure shows where it has room for one: the first seed of `base`."""
        return self.runs[self.base][0]

    @property
    def variants(self) -> list[str]:
        """The variants in the order of figures and legends: `base` first, entries last."""
        return [self.base, *(name for name in self.evaluations if name != self.base)]


def load_evaluated(run: Run) -> Checkpoint:
    """Read the network that a run's metrics are of.

    Raises:
        MissingError, DamagedError: as `load_checkpoint`.
        MismatchError: the run was trained again since its metrics were read.
    """
    checkpoint = load_checkpoint(run.checkpoint)
    if checkpoint.sha256 != run.evaluation.checkpoint_sha256:
        raise MismatchError(
            f"{run.checkpoint} was replaced while the page was made: its sha256 is "
            f"{checkpoint.sha256}, expected {run.evaluation.checkpoint_sha256}.",
            "Wait for its training, and make the page again.",
        )
    return checkpoint


def check_same_regions(run: Run, cache: RegionCache) -> None:
    """Refuse to show a run beside regions that it was not evaluated on.

    Raises:
        MismatchError: the cache has another fingerprint.
    """
    if cache.fingerprint != run.evaluation.fingerprint:
        raise MismatchError(
            f"{cache.folder} has the fingerprint {cache.fingerprint}, but "
            f"{run.checkpoint.parent} was evaluated on {run.evaluation.fingerprint}. The page "
            "can't show which regions won.",
            "Train and evaluate again, or restore the regions.",
        )
