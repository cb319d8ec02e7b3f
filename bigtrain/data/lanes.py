"""Documents end to end, dealt into lanes: the order of `data.pack=concat`.

The documents of a data set are dealt to L lanes, about the same number of tokens to each. A lane is an endless stream:
its documents end to end, in an order drawn anew for each epoch of that lane, shard by shard: so all lanes read from few
shards at a time, and a cache of shards serves them. Sequence j of a lane is the tokens [j S, j S + S] of its stream:
S + 1 of them, for S inputs and S targets, so each token but the very first is a target once an epoch.

How many tokens each document has is in the index, so any sequence is found by arithmetic: a running sum over the lane's
documents and a binary search.
"""

from __future__ import annotations

import functools
import heapq
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data.shards import Dataset

# So many documents, the longest, are dealt one by one (0.2 s); any number of others in a few array operations.
_LONG_DOCUMENTS = 1 << 18


class Piece(NamedTuple):
    """Part of a document in a window. A tuple, because a step makes many."""

    source: int
    """Place in the list of sources."""
    document: int
    start: int
    """First token of the document that is in the window."""
    count: int
    epoch: int = 0
    """How often the source (under concat: its lane) went through its documents before."""


@dataclass(frozen=True)
class Census:
    """All documents of a source, for an audit."""

    documents: np.ndarray
    """int64[documents], in rising order."""
    num_tokens: np.ndarray
    """int64[documents]; 0 where no piece names the document, and it may be left out."""
    epochs_ended: np.ndarray
    """int64[documents]: how often the document must have been a target, whole."""


class Lanes:
    """One data set, dealt into endless streams of tokens. Safe to use from many threads."""

    def __init__(self, dataset: Dataset, *, seed: int, num_lanes: int, sequence_length: int, source: int = 0) -> None:
        """`source`: what the pieces are to say. Raises UserError where there are fewer documents than lanes."""
        if num_lanes < 1:
            raise UserError(f"data.num_lanes is {num_lanes}: at least 1")
        if len(dataset) < num_lanes:
            raise UserError(
                f"data {dataset.name} has {len(dataset)} documents, too few for data.num_lanes={num_lanes}: each lane "
                f"needs one. Set data.num_lanes to at most {len(dataset)} (a multiple of the data-parallel size) or "
                "add text."
            )
        self._seed, self._size, self._source = seed, sequence_length, source
        self._num_tokens = dataset.num_tokens_of_documents()
        self._shards = dataset.shards_of_documents()
        self._documents = deal(self._num_tokens, num_lanes)
        self.num_tokens_of_lanes = [int(self._num_tokens[documents].sum()) for documents in self._documents]
        """Tokens of one epoch of each lane."""
        self._epochs: list[dict[int, tuple[memoryview, memoryview]]] = [{} for _ in range(num_lanes)]
        self._lock = threading.Lock()

    def pieces(self, lane: int, row: int) -> list[Piece]:
        """Where the S + 1 tokens of sequence `row` of a lane lie."""
        return self.stream(lane, row * self._size, self._size + 1)

    def epochs(self, rows: Sequence[int]) -> float:
        """How often the first `rows[lane]` sequences of each lane went through the data."""
        return sum(rows) * self._size / sum(self.num_tokens_of_lanes)

    def census(self, rows: Sequence[int], named: np.ndarray) -> Census:
        """All documents, and what the first `rows[lane]` sequences of each lane made of them."""
        ended = np.zeros(len(self._num_tokens), np.int64)
        for documents, size, count in zip(self._documents, self.num_tokens_of_lanes, rows, strict=True):
            ended[documents] = count * self._size // size
        return Census(np.arange(len(ended)), self._num_tokens, ended)

    def stream(self, lane: int, start: int, count: int) -> list[Piece]:
        """Where tokens [start, start + count) of the lane's stream lie."""
        found: list[Piece] = []
        epoch, offset = divmod(start, self.num_tokens_of_lanes[lane])
        while count:
            documents, ends = self._epochs[lane].get(epoch) or self._drawn(lane, epoch)
            place = bisect_right(ends, offset)
            begin = ends[place - 1] if place else 0
            while count and place < len(ends):
                end = ends[place]
                taken = min(count, end - offset)
                found.append(Piece(self._source, documents[place], offset - begin, taken, epoch))
                count, offset, place, begin = count - taken, offset + taken, place + 1, end
            epoch, offset = epoch + 1, 0
        return found

    def _drawn(self, lane: int, epoch: int) -> tuple[memoryview, memoryview]:
        """(documents of the lane in this epoch's order, running sum of their tokens). The newest two are kept.

        As memoryviews: one element costs Python a fifth of what it costs from an array."""
        with self._lock:
            kept = self._epochs[lane]
            if epoch not in kept:
                mine = self._documents[lane]
                documents = mine[draw_order(self._shards[mine], (self._seed, lane, epoch), (self._seed, epoch))]
                kept[epoch] = (documents.data, np.cumsum(self._num_tokens[documents]).data)
                for old in sorted(kept)[:-2]:
                    if old != epoch:
                        del kept[old]
            return kept[epoch]


def draw_order(groups: np.ndarray, seeds: tuple[int, ...], group_seeds: tuple[int, ...]) -> np.ndarray:
    """A random order of things, those of one group (a number from 0 on for each thing) together; `group_seeds` draw the
    order of the groups. Raw draws, because numpy promises to keep those of a bit generator for ever, and not what
    `permutation` makes of them."""
    place_of_group = _places(int(groups.max(initial=0)) + 1, group_seeds)
    return np.lexsort((draws(len(groups), seeds), place_of_group[groups]))


@functools.lru_cache(maxsize=4)  # all lanes of an epoch want the same
def _places(count: int, seeds: tuple[int, ...]) -> np.ndarray:
    return np.argsort(np.argsort(draws(count, seeds), kind="stable"))


def draws(count: int, seeds: tuple[int, ...]) -> np.ndarray:
    """uint64[count], a function of the seeds."""
    return np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)


def deal(num_tokens: np.ndarray, num_lanes: int) -> list[np.ndarray]:
    """Deal documents with these sizes to lanes, so that the lanes get about the same number of tokens.

    The longest first, each to the lane that has least; the short ones, where there are many, in turn. Whole numbers
    only: every machine deals the same."""
    count = len(num_tokens)
    kept_short = np.partition(num_tokens, count - _LONG_DOCUMENTS)[-_LONG_DOCUMENTS] if count > _LONG_DOCUMENTS else 0
    is_long = num_tokens > kept_short
    places = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    long, short = places[is_long], places[~is_long]
    long = long[np.argsort(-num_tokens[long], kind="stable")]

    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    loads = [(0, lane) for lane in range(num_lanes)]  # a heap
    for document, size in zip(long.tolist(), num_tokens[long].tolist(), strict=True):
        load, lane = loads[0]
        lanes[lane].append(document)
        heapq.heapreplace(loads, (load + size, lane))
    poorest_first = [lane for _, lane in sorted(loads)]
    parts = {lane: short[place::num_lanes] for place, lane in enumerate(poorest_first)}
    return [np.concatenate([np.array(lanes[lane], places.dtype), parts[lane]]) for lane in range(num_lanes)]
