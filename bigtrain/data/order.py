"""Which tokens are in global sequence i: a pure function of (data, seed, number of lanes, sequence length).

Nothing here knows ranks, workers or steps, so nothing of them can change the order.

The documents of a data set are dealt to L lanes, about the same number of tokens to each. A lane is an endless stream:
its documents end to end, in an order drawn anew for each epoch of that lane. Sequence j of a lane is the tokens
[j S, j S + S] of its stream: S + 1 of them, for S inputs and S targets, so each token but the very first is a target
once an epoch. Global sequence i is sequence i // L of lane i % L. With several sources, a fixed pattern of their
weights says which source sequence i comes from, and each source counts its own sequences.

How many tokens each document has is in the index, so any sequence is found by arithmetic: a running sum over the lane's
documents and a binary search. The state of the whole pipeline is one number, the sequences consumed.
"""

from __future__ import annotations

import hashlib
import heapq
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.config.schema import DataConfig
from bigtrain.data import shards
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer

# So many documents, the longest, are dealt one by one (0.2 s); any number of others in a few array operations.
_LONG_DOCUMENTS = 1 << 18


@dataclass(frozen=True)
class Piece:
    """Part of a document in a window."""

    source: int
    """Place in the list of sources."""
    document: int
    start: int
    """First token of the document that is in the window."""
    count: int
    epoch: int = 0
    """Of the lane: how often it went through its documents before."""


@dataclass(frozen=True)
class Window:
    """One sequence: S + 1 tokens, the inputs and the target after the last."""

    tokens: np.ndarray
    """int64[S + 1]"""
    starts: np.ndarray
    """bool[S + 1]: the first token of a document."""
    num_tokens: int
    """Tokens that are data; behind them is padding (only in the last window of held-out data)."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Cursor:
    """How far the training data are consumed. It says nothing about ranks, so any layout can go on from it."""

    num_sequences: int
    """Global sequences consumed."""
    order: str
    """Which order it counts in: `Order.fingerprint`."""

    def to_dict(self) -> dict[str, Any]:
        return {"num_sequences": self.num_sequences, "order": self.order}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cursor:
        return Cursor(int(values["num_sequences"]), str(values["order"]))


class Lanes:
    """One data set, dealt into endless streams of tokens. Safe to use from many threads."""

    def __init__(self, dataset: Dataset, *, seed: int, num_lanes: int) -> None:
        """Raises UserError where there are fewer documents than lanes."""
        if num_lanes < 1:
            raise UserError(f"data.num_lanes is {num_lanes}: at least 1")
        if len(dataset) < num_lanes:
            raise UserError(
                f"data {dataset.path} has {len(dataset)} documents, too few for data.num_lanes={num_lanes}: each lane "
                f"needs one. Set data.num_lanes to at most {len(dataset)} (a multiple of the data-parallel size) or "
                "add text."
            )
        self.dataset = dataset
        self._seed = seed
        self._num_tokens = dataset.num_tokens_of_documents()
        self._documents = deal(self._num_tokens, num_lanes)
        self.num_tokens_of_lanes = [int(self._num_tokens[documents].sum()) for documents in self._documents]
        """Tokens of one epoch of each lane."""
        self._epochs: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._lock = threading.Lock()

    def pieces(self, lane: int, start: int, count: int, source: int = 0) -> list[Piece]:
        """Where tokens [start, start + count) of the lane's stream lie."""
        found: list[Piece] = []
        epoch, offset = divmod(start, self.num_tokens_of_lanes[lane])
        while count:
            documents, ends = self._epoch(lane, epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            while count and place < len(documents):
                document = int(documents[place])
                skipped = offset - int(ends[place]) + int(self._num_tokens[document])
                taken = min(count, int(ends[place]) - offset)
                found.append(Piece(source, document, skipped, taken, epoch))
                count, offset, place = count - taken, offset + taken, place + 1
            epoch, offset = epoch + 1, 0
        return found

    def _epoch(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents of the lane in this epoch's order, running sum of their tokens). The newest two are kept."""
        with self._lock:
            kept = self._epochs.setdefault(lane, {})
            if epoch not in kept:
                mine = self._documents[lane]
                documents = mine[draw_order(len(mine), self._seed, lane, epoch)]
                kept[epoch] = (documents, np.cumsum(self._num_tokens[documents]))
                for old in sorted(kept)[:-2]:
                    if old != epoch:
                        del kept[old]
            return kept[epoch]


class Order:
    """The endless order of the training sequences."""

    def __init__(
        self, sources: Sequence[tuple[Dataset, float]], *, seed: int, num_lanes: int, sequence_length: int
    ) -> None:
        """`sources` are (data set, weight). Raises UserError for too few documents or a weight that is not positive."""
        if not sources:
            raise UserError("data.train is empty: give it shard folders, [{path: FOLDER, weight: 1}]")
        self.datasets = [dataset for dataset, _ in sources]
        self.num_lanes = num_lanes
        self.sequence_length = sequence_length
        weights = [_weight(dataset, weight) for dataset, weight in sources]
        self._pattern = Pattern(weights)
        self._lanes = [Lanes(dataset, seed=seed, num_lanes=num_lanes) for dataset in self.datasets]
        parts = [f"{dataset.fingerprint} {weight}" for dataset, weight in zip(self.datasets, weights, strict=True)]
        data = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self.fingerprint = f"data={data} seed={seed} num_lanes={num_lanes} sequence_length={sequence_length}"
        """All that the order depends on, readable."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all sources, once through."""
        return sum(dataset.index.num_tokens for dataset in self.datasets)

    def start(self) -> Cursor:
        """Nothing consumed yet."""
        return Cursor(0, self.fingerprint)

    def check(self, cursor: Cursor) -> None:
        """Raises UserError where the cursor counts in another order than this one."""
        if cursor.order != self.fingerprint:
            raise UserError(
                "the data are not those of the checkpoint, so its place in them means nothing. Its order was:\n"
                f"  {cursor.order}\nthis run's is:\n  {self.fingerprint}\n"
                "Set what differs back, or start another run."
            )

    def sequence(self, number: int) -> Window:
        """Global sequence `number`. Random access; costs a binary search and a copy."""
        source, own = self._pattern.locate(number)
        row, lane = divmod(own, self.num_lanes)
        size = self.sequence_length
        return cut(self.datasets, self._lanes[source].pieces(lane, row * size, size + 1, source), size)


class HeldOut:
    """The held-out documents, once through, in a fixed order. The last window of a source is padded.

    Several sources are interleaved evenly, so that the first sequences are a fair sample of all of them."""

    def __init__(self, datasets: Sequence[Dataset], *, sequence_length: int, max_sequences: int | None = None) -> None:
        """Keep the first `max_sequences` sequences; None: all."""
        self.datasets = list(datasets)
        self.sequence_length = sequence_length
        self._ends = [np.cumsum(dataset.num_tokens_of_documents()) for dataset in self.datasets]
        counts = [-(-(int(ends[-1]) - 1) // sequence_length) for ends in self._ends]
        self._pattern = Pattern([Fraction(count) for count in counts])
        self.num_sequences = min(sum(counts), max_sequences if max_sequences is not None else sum(counts))

    def sequence(self, number: int) -> Window:
        """Sequence `number`, below `num_sequences`."""
        if not 0 <= number < self.num_sequences:
            raise IndexError(f"sequence {number} of {self.num_sequences}")
        source, own = self._pattern.locate(number)
        ends, size = self._ends[source], self.sequence_length
        start, stop = own * size, min(own * size + size + 1, int(ends[-1]))
        pieces: list[Piece] = []
        document = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            first = int(ends[document - 1]) if document else 0
            end = min(stop, int(ends[document]))
            pieces.append(Piece(source, document, start - first, end - start))
            start, document = end, document + 1
        return cut(self.datasets, pieces, size)

    def predicted_tokens(self) -> np.ndarray:
        """int64[n]: every token that the evaluation predicts: targets but padding and first tokens of documents."""
        parts: list[np.ndarray] = []
        for number in range(self.num_sequences):
            window = self.sequence(number)
            targets, starts = window.tokens[1 : window.num_tokens], window.starts[1 : window.num_tokens]
            parts.append(targets[~starts])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class Pattern:
    """Which source sequence i comes from: each gets its share, spread as evenly as whole numbers allow, with no state.

    Source 0 takes sequence i where ``floor((i + 1) w)`` is above ``floor(i w)``; the others share the rest likewise."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        left = sum(weights, Fraction(0))
        self._shares: list[Fraction] = []
        for weight in weights:
            self._shares.append(weight / left if left else Fraction(1))
            left -= weight

    def locate(self, number: int) -> tuple[int, int]:
        """(source, how many sequences of that source come before) of sequence `number`."""
        for source, share in enumerate(self._shares):
            before = number * share.numerator // share.denominator
            if (number + 1) * share.numerator // share.denominator > before:
                return source, before
            number -= before
        raise AssertionError("the last source takes what is left")


def cut(datasets: Sequence[Dataset], pieces: Sequence[Piece], sequence_length: int) -> Window:
    """Copy the pieces into one window; what they do not fill is padded with token 0, as a document of its own."""
    tokens = np.zeros(sequence_length + 1, np.int64)
    starts = np.zeros(sequence_length + 1, np.bool_)
    filled = 0
    for piece in pieces:
        stop = piece.start + piece.count
        tokens[filled : filled + piece.count] = datasets[piece.source].tokens(piece.document, piece.start, stop)
        starts[filled] = piece.start == 0
        filled += piece.count
    if filled <= sequence_length:
        starts[filled] = True
    return Window(tokens, starts, filled, tuple(pieces))


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


def draw_order(count: int, *seeds: int) -> np.ndarray:
    """A random order of `count` things. Raw draws, because numpy promises to keep those of a bit generator for ever,
    and not what `permutation` makes of them."""
    draws = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(draws, kind="stable")


def training_order(data: DataConfig, *, seed: int, sequence_length: int, tokenizer: Tokenizer | None = None) -> Order:
    """The order of data.train. Raises UserError for data that are missing, of another tokenizer, or too few."""
    datasets = shards.open_all([source.path for source in data.train], what="data.train", tokenizer=tokenizer)
    weights = [source.weight for source in data.train]
    sources = list(zip(datasets, weights, strict=True))
    return Order(sources, seed=seed, num_lanes=data.num_lanes, sequence_length=sequence_length)


def held_out(
    data: DataConfig, *, sequence_length: int, max_sequences: int | None = None, tokenizer: Tokenizer | None = None
) -> HeldOut:
    """The held-out sequences of data.valid, at most `max_sequences`. Raises UserError as `training_order` does."""
    datasets = shards.open_all([source.path for source in data.valid], what="data.valid", tokenizer=tokenizer)
    return HeldOut(datasets, sequence_length=sequence_length, max_sequences=max_sequences)


def _weight(dataset: Dataset, weight: float) -> Fraction:
    if not 0 < weight < float("inf"):
        raise UserError(f"data.train: the weight of {dataset.path} is {weight}: a number above 0")
    return Fraction(str(weight))
