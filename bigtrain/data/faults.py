"""Documents that cannot be used: named, counted by reason, and skipped only as far as `data.max_bad_fraction` allows.

Every rank that reads a document finds the same in it, so all layouts skip the same ones. No part of a bad document
becomes a target: of tokenised shards, where each document has its place in the order, the place is masked; of raw text
the next document takes it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bigtrain.config.errors import UserError


class BadDocument(UserError):
    """A document that cannot be used."""

    def __init__(self, data: str, shard: str, sample: str, reason: str, size_bytes: int) -> None:
        """`size_bytes`: what is lost with it."""
        super().__init__(f"data {data}: {shard}: sample {sample}: {reason}.")
        self.shard, self.sample, self.reason, self.size_bytes = shard, sample, reason, size_bytes


@dataclass(frozen=True)
class Skipped:
    """A document that was passed over."""

    source: int
    """Place in the list of sources."""
    data: str
    shard: str
    sample: str
    reason: str
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Faults:
    """The bad documents that a run meets. Safe to use from many threads."""

    def __init__(self, max_fraction: float = 0.0) -> None:
        """`max_fraction`: the share of a source's bytes that may be bad; 0: none."""
        self.max_fraction = max_fraction
        self._lost: Counter[int] = Counter()
        self._seen: set[tuple[int, int]] = set()
        self._new: list[Skipped] = []
        self._lock = threading.Lock()

    def skip(self, source: int, document: int, bad: BadDocument, data: str) -> None:
        """Pass over a bad document that this process met; counted once however often it is met. Raises UserError where
        none is allowed."""
        if not self.max_fraction:
            raise UserError(f"{bad} To skip such documents and count them, set data.max_bad_fraction=0.001.") from bad
        with self._lock:
            if (source, document) not in self._seen:
                self._seen.add((source, document))
                self._new.append(Skipped(source, data, bad.shard, bad.sample, bad.reason, bad.size_bytes))

    def take(self) -> tuple[Skipped, ...]:
        """Those that this process met since the last call."""
        if not self._new:
            return ()
        with self._lock:
            taken, self._new = tuple(self._new), []
        return taken

    def allow(self, skipped: Iterable[Skipped], size_bytes: Callable[[int], int]) -> None:
        """Count what all data ranks passed over. `size_bytes`: of a source. Raises UserError where it is too much."""
        for each in skipped:
            self._lost[each.source] += each.size_bytes
            lost, whole = self._lost[each.source], size_bytes(each.source)
            if lost > self.max_fraction * whole:
                raise UserError(
                    f"data {each.data}: {each.shard}: sample {each.sample}: {each.reason}. With it {lost:,} bytes of "
                    f"{whole:,} are bad, more than data.max_bad_fraction={self.max_fraction:g}. Repair the data "
                    "(tools/shards.py verify), or raise the limit."
                )
