"""Work spread over threads, with the results in order and memory bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


@contextmanager
def workers(threads: int) -> Iterator[Executor]:
    """A pool of threads; on an error or Ctrl-C what has not begun is dropped rather than waited for."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: Executor, function: Callable[[T], Result], items: Iterable[T], *, ahead: int) -> Iterator[Result]:
    """``map`` over a pool with at most ``ahead`` calls that are under way or whose results wait to be taken."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()
