"""The values that a search tries: `KEY=VALUE,VALUE,...` and `KEY=LOW..HIGH` -> trials.

A range has two forms: `LOW..HIGH`, from which values are drawn evenly, and `log:LOW..HIGH`, from
which their logarithms are. If both ends are whole numbers, so are the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from pipeline.errors import InputError
from pipeline.files import canonical_json
from stages.checkout.yaml_text import load_yaml

Value = object
"""A value of a setting, as params.yaml could hold it."""

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<log>log:)?(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})")
_DIGITS = 3  # significant ones of a drawn number, so that people can read and repeat it
_DRAWS = 1000  # per trial that is wanted, after which no new one is expected
_MOST = 1000  # trials that are made without `--trials`
_EXAMPLE = "Examples are `network.modules=1,2,3,4` and `learning_rate=log:0.0001..0.1`."


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included; only whole ones if both are ints.

    Attributes:
        low, high: its ends.
        log: whether the logarithms are drawn evenly, and not the numbers.
    """

    low: int | float
    high: int | float
    log: bool

    def draw(self, rng: np.random.Generator) -> Value:
        """Draw a number; one that is not whole has `_DIGITS` significant digits."""
        if self.log:
            drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = rng.uniform(self.low, self.high)
        short = round(drawn) if isinstance(self.low, int) else float(f"{drawn:.{_DIGITS}g}")
        return min(max(short, self.low), self.high)


Space = Sequence[Value] | Range
"""What a search tries of one setting."""


def read_space(setting: str) -> tuple[str, Space]:
    """Split `KEY=VALUES` into the key and its values.

    Raises:
        InputError: it has another form, a value occurs twice, or a range has no numbers.
    """
    key, equals, text = setting.partition("=")
    error = InputError(
        f"{setting}: expected KEY=VALUE,VALUE,... with a key of train.<dataset> and at least two "
        "values, or a range of numbers: KEY=LOW..HIGH or KEY=log:LOW..HIGH.",
        _EXAMPLE,
    )
    if match := _RANGE.fullmatch(text):
        return key, _range(setting, match)
    try:
        values = load_yaml(f"[{text}]", setting, _EXAMPLE)
    except InputError:
        raise error from None
    if not key or not equals or not isinstance(values, list) or len(values) < 2:
        raise error
    if any(type(value) is float and not math.isfinite(value) for value in values):
        raise InputError(f"{setting}: a value is not a finite number.", _EXAMPLE)
    if len({canonical_json(value) for value in values}) < len(values):
        raise InputError(f"{setting}: a value occurs twice.", "Remove one of the two.")
    return key, values


def _range(setting: str, match: re.Match[str]) -> Space:
    log = match["log"] is not None
    ends = match["low"], match["high"]
    low, high = map(float, ends)
    if not low < high < math.inf or (log and low == 0):
        least = "above 0 and " if log else ""
        raise InputError(
            f"{setting}: the range goes from {ends[0]} to {ends[1]}; expected a first number "
            f"{least}below the second.",
            _EXAMPLE,
        )
    if not all(end.isdigit() for end in ends):
        return Range(low, high, log)
    if log:
        return Range(int(low), int(high), log)
    return range(int(low), int(high) + 1)


def choose_trials(spaces: Mapping[str, Space], trials: int | None) -> list[tuple[Value, ...]]:
    """Choose the values to try, one of each space in a trial.

    Args:
        spaces: key -> what to try of it.
        trials: how many to draw at random. The first ones are the same for every number, so that
            a larger number continues a search. None, or at least as many as there are: all of the
            grid, in order.

    Raises:
        InputError: there are too many to try all.
    """
    lists = [space for space in spaces.values() if not isinstance(space, Range)]
    count = math.prod(map(len, lists)) if len(lists) == len(spaces) else math.inf
    if trials is None and count > _MOST:
        raise InputError(
            f"{', '.join(spaces)}: more than {_MOST} combinations to try.",
            "Add `--trials N` to draw N of them at random, or list fewer values.",
        )
    if trials is None or trials >= count:
        return list(product(*lists))
    rng = np.random.default_rng(0)
    drawn: dict[tuple[Value, ...], None] = {}
    for _ in range(trials * _DRAWS):
        if len(drawn) == trials:
            break
        drawn[tuple(_draw(space, rng) for space in spaces.values())] = None
    return list(drawn)


def _draw(space: Space, rng: np.random.Generator) -> Value:
    return space.draw(rng) if isinstance(space, Range) else space[int(rng.integers(len(space)))]
