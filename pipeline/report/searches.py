"""The numbers of a search over several settings: what `sweep` writes for the page, and its figure.

A *trial* is one choice of values, and a *round* trains the trials that are left with one more seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.files import sha256_json
from pipeline.formats.text import legible, printable
from pipeline.names import Name
from pipeline.report.figures import AXES, COLOURS, drawing_to

_LONGEST = 100  # letters of a search's name, since a folder is named by it
_PER_ROW = 3  # panels of the figure
_WIDE = 20  # quotient of the largest and the smallest value, from which an axis is logarithmic

Percent = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Values = tuple[str, ...]
"""The values of a trial, in the order of the settings."""


class SearchRun(BaseModel):
    """One run of a search. Numbers are in percent.

    Attributes:
        values, seed: of the run.
        validation_mAP: on the validation part, after the epoch whose weights are the result; None
            if the training failed.
        mAP, CF1, OF1: on the test split; None for all trials but the best, and where the metric is
            not defined.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: Values
    seed: int
    validation_mAP: Percent | None
    mAP: Percent | None = None
    CF1: Percent | None = None
    OF1: Percent | None = None


class SearchResults(BaseModel):
    """A search, as far as its budget went.

    Attributes:
        dataset, split, variant: of its runs.
        settings: the keys that it varies, below `train.<dataset>`.
        fingerprint, train_sha256, test_sha256: of its runs' regions and labels, as in `Evaluation`.
        runs: round by round, those of a round in the order of the trials.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    split: str
    variant: Name
    settings: Annotated[list[Key], Field(min_length=1)]
    fingerprint: str
    train_sha256: str
    test_sha256: str
    runs: Annotated[list[SearchRun], Field(min_length=1)]

    @property
    def setting(self) -> str:
        """The name of the search: its keys and `search`, joined by `+`.

        A sweep of one key has the key as its name. If the keys are long, a hash shortens them.
        """
        keys = "+".join(self.settings)
        if len(keys) > _LONGEST:
            keys = f"{self.settings[0][:_LONGEST]}+{sha256_json(self.settings)[:8]}"
        return f"{keys}+search"

    def texts(self) -> list[str]:
        """The user's texts that the figure shows."""
        return [value for run in self.runs for value in run.values]

    def rows(self) -> list[dict[str, Any]]:
        """One row of a table per run."""
        return [
            {
                "variant": self.variant,
                **dict(zip(self.settings, run.values, strict=True)),
                **run.model_dump(exclude={"values"}),
            }
            for run in self.runs
        ]

    def trials(self) -> dict[Values, list[SearchRun]]:
        """The runs of each trial."""
        trials: dict[Values, list[SearchRun]] = {}
        for run in self.runs:
            trials.setdefault(run.values, []).append(run)
        return trials

    def ranking(self) -> dict[Values, float | None]:
        """Trial -> its mean validation mAP, None if a run of it failed; the best first.

        Trials of more rounds come first. Of trials that tie, the one that was tried first does.
        """
        trials = self.trials()
        means = {}
        for values, runs in trials.items():
            maps = [run.validation_mAP for run in runs if run.validation_mAP is not None]
            means[values] = fmean(maps) if len(maps) == len(runs) else None

        def place(values: Values) -> tuple[bool, int, float]:
            mean = means[values]
            return mean is None, -len(trials[values]), -(mean or 0.0)

        return {values: means[values] for values in sorted(means, key=place)}

    def best(self) -> Values:
        """The trial with the best mean validation mAP among those of all rounds."""
        return next(iter(self.ranking()))

    def draw(self, stem: Path) -> None:
        """Draw the trials' mean validation mAP against each setting, as <stem>.svg and .png."""
        known = {values: mean for values, mean in self.ranking().items() if mean is not None}
        columns = min(len(self.settings), _PER_ROW)
        lines = -(-len(self.settings) // columns)
        with drawing_to(stem, 0.6 + 3.0 * columns, 0.4 + 2.9 * lines) as figure:
            grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
            for axes, (number, key) in zip(grid, enumerate(self.settings), strict=False):
                _panel(axes, key, {values: values[number] for values in known}, known)
            for axes in grid[len(self.settings) :]:
                axes.set_visible(False)
            figure.suptitle(printable(f"{self.dataset}, {self.variant}, validation mAP (%)"))


def in_words(settings: Sequence[str], values: Values) -> str:
    """A trial as `key=value, key=value`."""
    return ", ".join(f"{key}={one}" for key, one in zip(settings, values, strict=True))


def _panel(axes: Any, key: str, shown: dict[Values, str], means: dict[Values, float]) -> None:
    """Draw the trials against one setting, the best of them, which comes first, with a ring.

    Args:
        axes: of matplotlib.
        key: of the setting.
        shown: trial -> its value of the setting.
        means: trial -> its mean validation mAP in percent.
    """
    try:
        places = {value: float(value) for value in shown.values()}
    except ValueError:
        places = {value: float(n) for n, value in enumerate(dict.fromkeys(shown.values()))}
        axes.set_xticks(list(places.values()), list(map(legible, places)))
    else:
        if min(places.values()) > 0 and max(places.values()) >= _WIDE * min(places.values()):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    x = [places[value] for value in shown.values()]
    axes.plot(x, list(means.values()), "o", color=COLOURS[0])
    ring = {"color": COLOURS[3], "fillstyle": "none", "markersize": 13}
    axes.plot(x[:1], list(means.values())[:1], "o", **ring)
    axes.set_xlabel(AXES.get(key, printable(key)))
    axes.grid(axis="y")
