"""Work that is done in threads before its result is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_AHEAD = 3  # items that are begun while the caller works on one

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Begun = TypeVar("_Begun")


def begin_ahead(
    begin: Callable[[_Item], _Begun], items: Iterable[_Item], *, most: int = _AHEAD
) -> Iterator[_Begun]:
    """Begin work on the first items at once, and on each further one when an earlier one is taken.

    Args:
        begin: starts the work on an item, and returns what stands for it, e.g. a future.
        items: in the order in which they are wanted.
        most: items that are begun besides the one that the caller works on.

    Returns:
        what ``begin`` returned, in order.
    """
    remaining = iter(items)
    begun = deque(begin(item) for item in islice(remaining, most))

    def taken() -> Iterator[_Begun]:
        while begun:
            begun.extend(begin(item) for item in islice(remaining, 1))
            yield begun.popleft()

    return taken()


def ahead(
    make: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int = 1,
    most: int = _AHEAD,
) -> Generator[_Result]:
    """Make the result of each item in threads, at most ``most`` items ahead; yield them in order.

    An error in ``make`` is raised where its result would come. Closing the generator ends the
    threads: what has not begun then is never made.

    Args:
        make: makes the result of an item.
        items: in the order in which their results are wanted.
        threads: items that are worked on at once.
        most: items that are begun besides the one that the caller works on.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        # `map` keeps no reference to a result that was handed out; a loop variable would.
        yield from map(
            Future.result, begin_ahead(lambda item: pool.submit(make, item), items, most=most)
        )
    finally:
        pool.shutdown(cancel_futures=True)
