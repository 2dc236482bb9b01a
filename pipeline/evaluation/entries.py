"""Entries: scores that stand beside the runs of a data set and have no checkpoint of their own.

An entry is what a model of somebody else predicts for the test images, or the average of some runs.
Its metrics.json, summary.json and predictions.parquet are like those of a run; no image's label has
a winning region.

Letters: N images, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.errors import DamagedError, MissingError, briefly
from pipeline.evaluation.metrics import Metrics
from pipeline.files import sha256_json
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.settings import TREATMENTS

Kind = Literal["probabilities", "logits", "average"]
"""What an entry is made of: a file of probabilities or of logits, or the scores of runs."""


@dataclass(frozen=True)
class EntryEvaluation:
    """The content of an entry's metrics.json.

    Attributes:
        metrics: of the split below.
        name: of the entry, among the entries and variants of its data set.
        kind: what it is made of.
        made_of: path of the file -> its sha256; or name of each run -> sha256 of its checkpoint.
        dataset, split, images, left_out, commit, uncommitted, test_sha256, difficult: as in
            `metrics.Evaluation`.
    """

    metrics: Metrics
    name: str
    kind: Kind
    made_of: Mapping[str, str]
    dataset: str
    split: str
    images: int
    left_out: int
    commit: str | None
    uncommitted: bool | None
    test_sha256: str
    difficult: Mapping[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> None:
        """No seed decides an entry's scores; tables of runs ask for one."""

    @property
    def sha256(self) -> str:
        """Of what the entry is made of; predictions.parquet holds it in place of a checkpoint's."""
        return sha256_json([self.kind, self.made_of])

    def describe(self) -> str:
        """What the entry is made of, in words."""
        names = ", ".join(self.made_of)
        return f"average of {names}" if self.kind == "average" else f"{self.kind} in {names}"

    def to_json(self) -> dict[str, Any]:
        """The value that metrics.json holds."""
        record = {name: value for name, value in asdict(self).items() if name != "metrics"}
        return {**self.metrics.to_json(), **record}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EntryEvaluation:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of the wrong kind.
        """
        names = [one.name for one in fields(cls) if one.name != "metrics"]
        entry = cls(Metrics.from_json(value), **{name: value[name] for name in names})
        texts = (entry.name, entry.dataset, entry.split, entry.test_sha256, *entry.made_of.values())
        numbers = (entry.images, entry.left_out)
        if not all(type(text) is str for text in texts) or not all(type(n) is int for n in numbers):
            raise TypeError(f"one of {texts} is no text, or one of {numbers} is no number")
        if entry.kind not in get_args(Kind):
            raise ValueError(f"`kind` is {entry.kind!r}")
        if not set(entry.difficult.values()) <= set(TREATMENTS):
            raise ValueError(f"`difficult` is {entry.difficult!r}")
        return entry


@dataclass(frozen=True)
class Entry:
    """An entry, as tables and the page show it.

    Attributes:
        evaluation: its metrics, and what they were measured on.
        logits: (N, C) float32.
    """

    evaluation: EntryEvaluation
    logits: np.ndarray


def write_entry(path: Path, evaluation: EntryEvaluation) -> None:
    """Write an entry's metrics.json, sealed, whole or not at all."""
    write_sealed_json(path, evaluation.to_json())


def read_entry(path: Path) -> EntryEvaluation:
    """Read an entry's metrics.json.

    Raises:
        MissingError: there is no such file.
        DamagedError: it was changed, or a field is missing or of the wrong kind.
    """
    try:
        return EntryEvaluation.from_json(read_sealed_json(path))
    except FileNotFoundError:
        raise MissingError(f"There are no metrics at {path}.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {briefly(error)}.") from error
