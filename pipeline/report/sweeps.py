"""The numbers of a sweep: what `sweep` writes for the page, and its figure.

A sealed JSON file (`pipeline.formats.sealed`) with the fields of `SweepResults` or, if it was a
search over several settings, of `SearchResults`.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DamagedError
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.names import Name
from pipeline.report.figures import sweep_figure
from pipeline.report.searches import Key, Percent, SearchResults


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SweepRun(_Strict):
    """One run of a sweep. Numbers are in percent.

    Attributes:
        value, seed: of the run.
        mAP, CF1, OF1: on the test split; None where the metric is not defined.
        validation_mAP: on the validation part, after the epoch whose weights are the result; None
            if the run had no such part.
    """

    value: str
    seed: int
    mAP: Percent | None = None
    CF1: Percent | None = None
    OF1: Percent | None = None
    validation_mAP: Percent | None = None


class SweepResults(_Strict):
    """A finished sweep.

    Attributes:
        dataset, split, variant: of its runs.
        setting: the key that it varies, below `train.<dataset>`.
        numeric: whether the values are numbers.
        fingerprint, train_sha256, test_sha256: of its runs' regions and labels, as in `Evaluation`.
        runs: in the order of the values.
    """

    dataset: str
    split: str
    variant: Name
    setting: Key
    numeric: bool
    fingerprint: str
    train_sha256: str
    test_sha256: str
    runs: Annotated[list[SweepRun], Field(min_length=1)]

    def rows(self) -> list[dict[str, Any]]:
        """One row of a table per run; without the validation mAP if no run has one."""
        same = {"variant": self.variant, "setting": self.setting}
        without = {"validation_mAP"} if all(run.validation_mAP is None for run in self.runs) else ()
        return [same | run.model_dump(exclude=set(without)) for run in self.runs]

    def texts(self) -> list[str]:
        """The user's texts that the figure shows."""
        return [run.value for run in self.runs]

    @property
    def metric(self) -> str:
        """What figures show of the test split: `mAP`, or `OF1` if no run has an mAP."""
        return "OF1" if all(run.mAP is None for run in self.runs) else "mAP"

    def numbers(self) -> dict[str, list[float | None]]:
        """Value -> `metric` of its runs on the test split; None where it is not defined."""
        numbers: dict[str, list[float | None]] = {}
        for run in self.runs:
            numbers.setdefault(run.value, []).append(getattr(run, self.metric))
        return numbers

    def validation_maps(self) -> dict[str, list[float]]:
        """Value -> validation mAP of its runs; empty if a run has none, or other images for it."""
        maps: dict[str, list[float]] = {}
        if self.setting.rpartition(".")[2] == "validation":
            return maps
        for run in self.runs:
            if run.validation_mAP is None:
                return {}
            maps.setdefault(run.value, []).append(run.validation_mAP)
        return maps

    def best(self) -> list[str]:
        """The value with the best mean validation mAP, several if they tie.

        Empty if `validation_maps` is.
        """
        means = {value: fmean(maps) for value, maps in self.validation_maps().items()}
        return [value for value, mean in means.items() if mean == max(means.values())]

    def draw(self, stem: Path) -> None:
        """Draw `metric` against the values, as <stem>.svg and <stem>.png."""
        title = f"{self.dataset}, {self.variant}, split {self.split}"
        sweep_figure(
            stem,
            self.setting,
            self.numbers(),
            self.validation_maps(),
            title=title,
            numeric=self.numeric,
            metric=self.metric,
        )


Sweep = SweepResults | SearchResults


def write_sweep(path: Path, results: Sweep) -> None:
    """Write the numbers of a sweep, whole or not at all."""
    write_sealed_json(path, results.model_dump())


def read_sweep(path: Path) -> Sweep:
    """Read the numbers of a sweep.

    Raises:
        DamagedError: they are not what `write_sweep` writes, or were changed.
        InputError, OSError: as `read_sealed_json`.
    """
    content = read_sealed_json(path)
    try:
        if isinstance(content, dict) and "settings" in content:
            return SearchResults.model_validate(content)
        results = SweepResults.model_validate(content)
        if results.numeric and not all(math.isfinite(float(value)) for value in results.numbers()):
            raise ValueError("a value is not finite")
    except (ValidationError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error}).") from error
    return results
