"""Results are made ahead of their use: in order, bounded, and without leaving threads behind."""

from __future__ import annotations

import threading
import weakref

import pytest

from pipeline.ahead import ahead, begin_ahead
from pipeline.errors import DamagedError


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_results_come_in_order_and_only_some_are_made_ahead() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    squares = []
    for square in ahead(make, range(20), most=3):
        squares.append(square)
        assert len(made) <= len(squares) + 3
    assert squares == [n * n for n in range(20)]
    assert threads_ahead() == []


def test_an_error_is_raised_where_its_result_would_come() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise DamagedError("item 2 is damaged")
        return item

    made = ahead(make, range(9))
    assert (next(made), next(made)) == (0, 1)
    assert threads_ahead() != []
    with pytest.raises(DamagedError, match="item 2"):
        next(made)
    assert threads_ahead() == []


def test_closing_ends_the_threads() -> None:
    made = ahead(lambda item: item, iter(range(10**9)))
    assert next(made) == 0
    made.close()
    assert threads_ahead() == []


def test_a_result_that_was_taken_is_not_kept() -> None:
    class Result:
        pass

    made = ahead(lambda item: Result(), range(5))
    result = weakref.ref(next(made))
    next(made)
    assert result() is None
    made.close()


def test_work_begins_before_the_first_result_is_taken() -> None:
    begun: list[int] = []

    def begin(item: int) -> str:
        begun.append(item)
        return str(item)

    taken = begin_ahead(begin, range(6), most=2)
    assert begun == [0, 1]
    assert next(taken) == "0"
    assert begun == [0, 1, 2]
    assert list(taken) == ["1", "2", "3", "4", "5"]
    assert list(begin_ahead(begin, [])) == []
