"""Processes that work on items, with the results in the order of the items."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from bigtrain.config.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """The cores that this process may use, at most 32: one process reads the text for all of them."""
    return min(len(os.sched_getaffinity(0)), 32)


class Workers:
    """A pool of processes; with 0 of them, this process does the work."""

    def __init__(self, number: int) -> None:
        """Raises UserError for a number below 0."""
        if number < 0:
            raise UserError(f"workers is {number}: a number of processes, 0 for none but this one")
        self._number = number
        # Spawned: a forked child of a process with threads can hang.
        self._pool = ProcessPoolExecutor(number, mp_context=get_context("spawn")) if number else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``map(work, items)``, with a bounded number of items on their way."""
        if self._pool is None:
            yield from map(work, items)
            return
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(self._pool.submit(work, item))
            if len(pending) >= 4 * self._number:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
