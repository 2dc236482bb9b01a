"""`pipeline.errors`: messages stay readable, whatever they quote."""

from __future__ import annotations

import pickle

from pipeline.errors import LONGEST, InputError


def test_the_middle_of_a_long_problem_is_left_out() -> None:
    error = InputError(f"labels.csv: {'x' * 30_000_000} is too long.", "Shorten it.")
    assert len(error.problem) < LONGEST
    assert error.problem.startswith("labels.csv: xxx")
    assert error.problem.endswith("x is too long.")
    assert f" {30_000_000 + len('labels.csv:  is too long.') - 3000} " in error.problem
    assert str(error).endswith("too long. Shorten it.")
    again = pickle.loads(pickle.dumps(error))
    assert (again.problem, again.remedy) == (error.problem, error.remedy)
    whole = "y" * LONGEST
    assert InputError(whole).problem == whole
