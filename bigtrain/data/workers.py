"""Processes that work on items, with the results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from bigtrain.config.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_ITEMS_AHEAD = 4
"""Of each process: so none waits for the one that reads."""


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
        spawned = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(number, mp_context=spawned, initializer=_begin) if number else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self,
        work: Callable[[T], R],
        items: Iterable[T],
        *,
        bytes_of: Callable[[T], int] = lambda item: 0,
        max_bytes: int = 256 << 20,
    ) -> Iterator[R]:
        """``map(work, items)``. On their way are at most 4 items a process, and items of at most `max_bytes` by
        `bytes_of`, or a single larger one."""
        if self._pool is None:
            yield from map(work, items)
            return
        pending: deque[tuple[Future[R], int]] = deque()
        on_their_way = 0
        for item in items:
            size = bytes_of(item)
            while pending and (len(pending) >= _ITEMS_AHEAD * self._number or on_their_way + size > max_bytes):
                on_their_way -= pending[0][1]
                yield pending.popleft()[0].result()
            pending.append((self._pool.submit(work, item), size))
            on_their_way += size
        while pending:
            yield pending.popleft()[0].result()


def _begin() -> None:
    """Runs first in each process. Ctrl-C is the parent's to answer, and no process outlives it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
