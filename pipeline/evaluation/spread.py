"""Mean and spread of one number over the seeds of a variant. Every table and figure uses this."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A number that several runs have.

    Attributes:
        mean: over the runs that have the number.
        deviation: their sample standard deviation; None for a single run.
    """

    mean: float
    deviation: float | None


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Compute mean and spread of one number per seed.

    Args:
        values: None for a seed where the number is not defined; such seeds are left out.

    Returns:
        None if the number is defined for no seed.
    """
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    deviation = statistics.stdev(defined) if len(defined) > 1 else None
    return Spread(statistics.fmean(defined), deviation)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Compute the mean alone; None if no value is defined."""
    spread = spread_of(values)
    return None if spread is None else spread.mean
