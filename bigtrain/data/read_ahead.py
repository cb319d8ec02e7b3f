"""Remote shards on their way before they are needed: a thread looks at what later steps read, and fetches it.

One thread, one shard at a time, and no further ahead than about one shard's worth of tokens: so the cache holds what is
in use and what comes next. It changes nothing but the time at which a shard comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from bigtrain.config.errors import UserError
from bigtrain.data.order import Order
from bigtrain.data.remote import Cancelled
from bigtrain.data.shards import Dataset

T = TypeVar("T")
_LOOKS = 32
"""Steps that are looked at in the way ahead: enough to meet every shard well before it is read."""


def with_read_ahead(
    steps: Iterator[T], order: Order, numbers: Callable[[int], Iterable[int]], tokens_per_step: int
) -> Iterator[T]:
    """`steps`, with the remote shards of later ones fetched meanwhile. `numbers`: the global sequences that this rank
    reads in a step; `tokens_per_step`: of all ranks. The order is not streamed: its sequences are looked up twice."""
    datasets = [dataset for dataset in order.datasets if isinstance(dataset, Dataset)]
    largest = max(shard.num_tokens for dataset in datasets for shard in dataset.index.shards)
    scout = _Scout(order, numbers, ahead=max(1, largest // tokens_per_step))
    scout.start()
    try:
        for step, batch in enumerate(steps):
            scout.step = step
            yield batch
    finally:
        scout.stop()
        close = getattr(steps, "close", None)
        if close:
            close()


class _Scout(threading.Thread):
    def __init__(self, order: Order, numbers: Callable[[int], Iterable[int]], *, ahead: int) -> None:
        # A daemon: a server that stalls does not keep the process from ending.
        super().__init__(name="read-ahead", daemon=True)
        self._order, self._numbers, self._ahead = order, numbers, ahead
        self._stopped = threading.Event()
        self.step = 0
        """The step that was taken last."""

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        seen: set[tuple[int, int]] = set()
        looked_at, stride = 0, max(1, self._ahead // _LOOKS)
        while not self._stopped.is_set():
            if looked_at > self.step + self._ahead:
                self._stopped.wait(0.05)
                continue
            looked_at = max(looked_at, self.step)
            here = self._shards(looked_at)
            for source, shard in here - seen:
                self._fetch(source, shard)
            seen = here  # a shard that comes up again later may have left the cache meanwhile
            looked_at += stride

    def _shards(self, step: int) -> set[tuple[int, int]]:
        """(source, shard) of everything that a step reads."""
        datasets = self._order.datasets
        pieces = [piece for number in self._numbers(step) for piece in self._order.pieces(number)]
        return {(piece.source, datasets[piece.source].shard_of(piece.document)) for piece in pieces}

    def _fetch(self, source: int, shard: int) -> None:
        dataset = self._order.datasets[source]
        if not isinstance(dataset, Dataset) or not dataset.is_remote or self._stopped.is_set():
            return
        try:
            dataset.tar(shard, self._stopped)
        except (UserError, Cancelled):
            return  # who reads the shard will be told
