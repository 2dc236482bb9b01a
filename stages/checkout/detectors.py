"""The description of a detector, for every stage that reads one."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.regions.detector import DetectorDescription, read_description
from stages.checkout.remedies import advising


def detector_description(folder: Path, dataset: str) -> DetectorDescription:
    """Read what `detector` wrote to ``folder`` for a data set.

    Raises:
        MissingError, DamagedError, MismatchError: as `read_description`; says which command makes
            the detector.
    """
    command = f"`gmpipe detector --dataset {dataset}`"
    with (
        advising(f"Run {command}.", MissingError, DamagedError),
        advising(
            f"Set `detector.{dataset}.source` in params.yaml and run {command}.", MismatchError
        ),
    ):
        return read_description(folder)
