"""Mean and spread over seeds."""

from __future__ import annotations

from pipeline.evaluation.spread import Spread, mean_of, spread_of


def test_several_numbers_have_mean_and_sample_standard_deviation() -> None:
    # 10, 12, 17: mean 13; deviations -3, -1, 4; (9 + 1 + 16) / (3 - 1) = 13.
    assert spread_of([10, 12, 17]) == Spread(13, 13**0.5)
    assert mean_of([10, 12, 17]) == 13


def test_seeds_without_the_number_are_left_out() -> None:
    assert spread_of([None, 10, 12]) == Spread(11, 2**0.5)
    assert spread_of([None, 10]) == Spread(10, None)
    assert mean_of([None, 10]) == 10


def test_a_number_that_no_seed_has_is_absent_and_not_0() -> None:
    assert spread_of([None, None]) is spread_of([]) is mean_of([None]) is None
