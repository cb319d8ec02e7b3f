"""Documents in bins of at most S + 1 tokens, few of which stay partly empty: the order of `data.pack=best_fit`.

A document of up to S + 1 tokens is never cut; a longer one is cut into chunks that overlap in one token, so that each
of its tokens but the first is a target once. Chunks go into bins by best fit, the largest first: each into the fullest
bin that it fits. Only the sizes matter for that, and there are at most S + 1 of them, so the plan for any number of
documents takes as many array operations as there are sizes (after Krell et al., https://arxiv.org/abs/2107.02027).

Attention and positions keep to a chunk, so its neighbours in a bin do not matter, and the same bins serve every epoch.
Row r of lane l is bin r L + l of the epochs' orders, one behind the other.
Each epoch draws the order of the bins anew, those of one group of shards together: so all ranks read from few shards at
a time, and a cache of shards serves them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigtrain.data.lanes import Census, Piece, draw_order
from bigtrain.data.shards import Dataset

_GROUP_BINS = 1 << 14
"""Shards are packed together until they fill so many bins: the one that stays partly empty is then no matter."""


class PackedSequences:
    """One data set in bins, an endless order of them. Safe to use from many threads."""

    def __init__(self, dataset: Dataset, *, seed: int, num_lanes: int, sequence_length: int, source: int = 0) -> None:
        """`source`: what the pieces are to say."""
        num_tokens, shards = dataset.num_tokens_of_documents(), dataset.shards_of_documents()
        tokens_of_shards = np.bincount(shards, weights=num_tokens).astype(np.int64)
        groups_of_shards = np.cumsum(tokens_of_shards) // (_GROUP_BINS * (sequence_length + 1))
        _, groups = np.unique(groups_of_shards[shards], return_inverse=True)
        parts = [np.flatnonzero(groups == group) for group in range(int(groups.max(initial=-1)) + 1)]
        bins = [pack(num_tokens[part], sequence_length) for part in parts]
        self._bins = _joined(bins, parts)
        self._groups = np.repeat(np.arange(len(bins)), [len(each) for each in bins])
        self._seed, self._num_lanes, self._source = seed, num_lanes, source
        self._num_tokens = num_tokens
        bins = self._bins
        self._columns = (bins.documents.data, bins.starts.data, bins.sizes.data, bins.ends.data)
        """The same; as memoryviews, of which one element costs Python a fifth of what it costs from an array."""
        self._epochs: dict[int, memoryview] = {}
        self._lock = threading.Lock()
        capacity = len(self._bins) * (sequence_length + 1)
        self.padding = 1 - int(self._bins.sizes.sum()) / capacity
        """Share of all places in the bins that stay empty."""
        self.cut_documents = len(np.unique(self._bins.documents[self._bins.starts > 0]))
        """Documents that are longer than a bin."""

    def pieces(self, lane: int, row: int) -> list[Piece]:
        """What is in sequence `row` of a lane."""
        documents, starts, sizes, ends = self._columns
        epoch, place = divmod(row * self._num_lanes + lane, len(ends))
        number = (self._epochs.get(epoch) or self._drawn(epoch))[place]
        chunks = range(ends[number - 1] if number else 0, ends[number])
        return [Piece(self._source, documents[chunk], starts[chunk], sizes[chunk], epoch) for chunk in chunks]

    def epochs(self, rows: Sequence[int]) -> float:
        """How often the first `rows[lane]` sequences of each lane went through the data."""
        return sum(rows) / len(self._bins)

    def census(self, rows: Sequence[int], named: np.ndarray) -> Census:
        """All documents, and what the first `rows[lane]` sequences of each lane made of them."""
        reached = min(count * self._num_lanes + lane for lane, count in enumerate(rows))
        ended = np.full(len(self._num_tokens), reached // len(self._bins))
        return Census(np.arange(len(ended)), self._num_tokens, ended)

    def _drawn(self, epoch: int) -> memoryview:
        """The bins in this epoch's order. The newest two epochs are kept."""
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = draw_order(self._groups, (self._seed, 0, epoch), (self._seed, epoch)).data
                for old in sorted(self._epochs)[:-2]:
                    if old != epoch:
                        del self._epochs[old]
            return self._epochs[epoch]


@dataclass(frozen=True)
class Bins:
    """Chunks, in the order of the bins that hold them."""

    documents: np.ndarray
    """int64[chunks]"""
    starts: np.ndarray
    """int64[chunks]: first token of the document that is in the chunk."""
    sizes: np.ndarray
    """int64[chunks]: tokens."""
    ends: np.ndarray
    """int64[bins]: chunks up to the end of each bin."""

    def __len__(self) -> int:
        return len(self.ends)

    def chunks(self, number: int) -> slice:
        """Where the chunks of a bin stand in the arrays above."""
        return slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))


def _joined(parts: list[Bins], documents: list[np.ndarray]) -> Bins:
    """Bins of parts of a data set as bins of the whole; `documents`: which are in each part."""
    chunks = np.cumsum([0, *(len(part.sizes) for part in parts)])
    return Bins(
        np.concatenate([of_part[part.documents] for part, of_part in zip(parts, documents, strict=True)]),
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.ends + before for part, before in zip(parts, chunks[:-1], strict=True)]),
    )


def pack(num_tokens: np.ndarray, sequence_length: int) -> Bins:
    """Pack documents with these sizes, int64[documents], into bins of `sequence_length` + 1 tokens."""
    documents, starts, sizes = cut_to_size(num_tokens, sequence_length)
    bins = best_fit(sizes, sequence_length + 1)
    order = np.argsort(bins, kind="stable")
    ends = np.cumsum(np.bincount(bins)) if len(bins) else np.zeros(0, np.int64)
    return Bins(documents[order], starts[order], sizes[order], ends)


def cut_to_size(num_tokens: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, size) of every chunk, int64[chunks] each."""
    counts = np.maximum(-(-(num_tokens - 1) // sequence_length), 1)
    documents = np.repeat(np.arange(len(num_tokens)), counts)
    place = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = place * sequence_length
    return documents, starts, np.minimum(num_tokens[documents] - starts, sequence_length + 1)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, int64[items]. No item is larger than `capacity`."""
    bins = np.zeros(len(sizes), np.int64)
    by_size = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(-sizes, return_counts=True)
    open_bins: dict[int, list[np.ndarray]] = {}  # space left -> bins with that much
    spaces = _Spaces(capacity)
    num_bins, done = 0, 0
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        while count:
            space = spaces.smallest_from(size)
            if space is None:  # as many new bins as all that is left of this size needs
                space, new = capacity, -(-count // (capacity // size))
                found = np.arange(num_bins, num_bins + new)
                num_bins += new
            else:
                found = np.concatenate(open_bins.pop(space))
                spaces.discard(space)
            each = space // size  # best fit goes on with a bin that it has begun: nothing else is as full
            filled = min(len(found), -(-count // each))
            placed = min(count, filled * each)
            bins[by_size[done : done + placed]] = np.repeat(found[:filled], each)[:placed]
            in_last = placed - (filled - 1) * each
            for group, left in (
                (found[: filled - 1], space - each * size),
                (found[filled - 1 : filled], space - in_last * size),
                (found[filled:], space),
            ):
                if left and len(group):
                    open_bins.setdefault(left, []).append(group)
                    spaces.add(left)
            done, count = done + placed, count - placed
    return bins


class _Spaces:
    """A set of whole numbers up to `most`, as the bits of one."""

    def __init__(self, most: int) -> None:
        self._bits, self._most = 0, most

    def add(self, space: int) -> None:
        self._bits |= 1 << space

    def discard(self, space: int) -> None:
        self._bits &= ~(1 << space)

    def smallest_from(self, least: int) -> int | None:
        above = self._bits >> least
        return least + (above & -above).bit_length() - 1 if above else None
