"""Documents that cannot be used: named, counted by reason, and skipped only as far as `data.max_bad_fraction` allows.

Every rank that reads a document finds the same in it, so all layouts skip the same ones. No part of a bad document
becomes a target: of tokenised shards, where each document has its place in the order, the place is masked; of raw text
the next document takes it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
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

    data: str
    shard: str
    sample: str
    reason: str
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Faults:
    """The bad documents that this process met. Safe to use from many threads."""

    def __init__(self, max_fraction: float = 0.0) -> None:
        """`max_fraction`: the share of a source's bytes that may be bad; 0: none."""
        self.max_fraction = max_fraction
        self.share = 1
        """Of how many data ranks this process is one: it meets that share of the documents."""
        self.counts: Counter[str] = Counter()
        """Documents by reason."""
        self._lost: Counter[int] = Counter()
        self._seen: set[tuple[int, int]] = set()
        self._new: list[Skipped] = []
        self._lock = threading.Lock()

    def skip(self, source: int, document: int, bad: BadDocument, data: str, size_bytes: Callable[[], int]) -> None:
        """Count a bad document, once however often it is met. `size_bytes`: of all of `source`.

        Raises UserError where it is one too many."""
        if not self.max_fraction:
            raise UserError(f"{bad} To skip such documents and count them, set data.max_bad_fraction=0.001.") from bad
        with self._lock:
            if (source, document) in self._seen:
                return
            self._seen.add((source, document))
            self._lost[source] += bad.size_bytes
            self.counts[bad.reason] += 1
            self._new.append(Skipped(data, bad.shard, bad.sample, bad.reason, bad.size_bytes))
            lost, whole = self._lost[source], size_bytes() // self.share
        if lost > self.max_fraction * whole:
            raise UserError(
                f"{bad} With it {lost:,} bytes of {whole:,} are bad, more than data.max_bad_fraction="
                f"{self.max_fraction:g}. Repair the data (tools/shards.py verify), or raise the limit."
            ) from bad

    def take(self) -> tuple[Skipped, ...]:
        """Those since the last call."""
        if not self._new:
            return ()
        with self._lock:
            taken, self._new = tuple(self._new), []
        return taken
