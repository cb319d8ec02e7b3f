"""Raw text in lanes: the order of a source whose documents are tokenised while they are streamed.

As of tokenised shards (lanes.py), a lane is an endless stream of documents end to end, and sequence j of a lane is the
tokens [j S, j S + S] of it. Each epoch draws the order of the tars, the same for all lanes. Of every tar a lane has
each L-th sample, from one on that the tar draws, in an order that the epoch draws. So a lane is found by reading the
headers of one tar, and nothing has to be known of the others.

Where sequence j lies depends on how many tokens the documents before it have. So a lane remembers where its next
sequence begins, and a checkpoint keeps that of every lane: five numbers. Asked for an earlier sequence, or a later one,
it tokenises what lies between.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data.faults import BadDocument, Faults
from bigtrain.data.lanes import Census, Piece, draws
from bigtrain.data.text_tars import TextTars

_AHEAD_BYTES_PER_TOKEN = 8
_ROTATION = 1 << 32
"""In place of an epoch, which is a smaller number."""


@dataclass(frozen=True)
class Position:
    """Where the next sequence of a lane begins."""

    row: int = 0
    """Sequences of the lane before it."""
    epoch: int = 0
    tar: int = 0
    """Place in the epoch's order of the tars."""
    document: int = 0
    """Place in the lane's documents of that tar."""
    token: int = 0


class TextLanes:
    """One source of raw text in endless streams of tokens. Safe to use from many threads."""

    def __init__(
        self,
        data: TextTars,
        *,
        seed: int,
        num_lanes: int,
        sequence_length: int,
        source: int = 0,
        faults: Faults | None = None,
    ) -> None:
        """`source`: what the pieces are to say."""
        if num_lanes < 1:
            raise UserError(f"data.num_lanes is {num_lanes}: at least 1")
        self._data, self._seed, self._size, self._source = data, seed, sequence_length, source
        self._num_lanes, self._faults = num_lanes, faults or Faults()
        self._rotations = draws(len(data.files), (seed, _ROTATION)) % np.uint64(num_lanes)
        self._positions: dict[int, Position] = {}
        self._epochs: dict[int, np.ndarray] = {}
        self._mine: dict[int, tuple[int, int, np.ndarray]] = {}
        self._locks = [threading.Lock() for _ in range(num_lanes)]
        self._last: dict[int, tuple[int, list[Piece]]] = {}

    def pieces(self, lane: int, row: int) -> list[Piece]:
        """Where the S + 1 tokens of sequence `row` of a lane lie. At once for the next row of the lane and the last one
        that was asked for. Raises UserError where the lane has no documents, or too many are bad."""
        with self._locks[lane]:
            if lane in self._last and self._last[lane][0] == row:
                return self._last[lane][1]
            position = self._positions.get(lane, Position())
            if position.row > row:
                position = Position()
            found: list[Piece] = []
            while position.row <= row:
                found, position = self._window(lane, position)
            self._positions[lane], self._last[lane] = position, (row, found)
            self._data.use(lane, found[-1].document)
            self._look_ahead(lane, position)
            return found

    def epochs(self, rows: Sequence[int]) -> float:
        """About how often the data was gone through in the first `rows[lane]` sequences of each lane, from the lanes
        that this process read, and how far they are."""
        found = [
            self._epochs_of(lane, position) * rows[lane] / position.row
            for lane, position in self.positions.items()
            if position.row
        ]
        return float(np.mean(found)) if found else 0.0

    def census(self, rows: Sequence[int], named: np.ndarray) -> Census:
        """All documents, and what the first `rows[lane]` sequences of each lane made of them. Opens every tar, and
        tokenises the documents that are `named` or must have been."""
        numbers, sizes, ended, is_named = [], [], [], set(named.tolist())
        positions = [self._at(lane, row) for lane, row in enumerate(rows)]
        for tar in range(len(self._data.files)):
            for sample in range(self._data.num_documents(tar)):
                position = positions[(sample - int(self._rotations[tar])) % self._num_lanes]
                document = tar << 32 | sample
                numbers.append(document)
                sizes.append(self._num_tokens(document) if position.epoch or document in is_named else 0)
                ended.append(position.epoch)
        return Census(np.array(numbers, np.int64), np.array(sizes, np.int64), np.array(ended, np.int64))

    @property
    def positions(self) -> dict[int, Position]:
        """Of the lanes that were read here, or restored."""
        return dict(self._positions)

    def restore(self, positions: Mapping[int, Position]) -> None:
        """Go on from there."""
        self._positions, self._last = dict(positions), {}

    def _epochs_of(self, lane: int, position: Position) -> float:
        """Up to a position; to a part of a tar where the reader has not left that tar meanwhile."""
        epoch, tar, documents = self._mine.get(lane, (-1, -1, np.zeros(0)))
        is_here = (epoch, tar) == (position.epoch, position.tar) and len(documents)
        tars = position.tar + (position.document / len(documents) if is_here else 0)
        return position.epoch + tars / len(self._data.files)

    def _at(self, lane: int, row: int) -> Position:
        if row:
            self.pieces(lane, row - 1)
        return self._positions.get(lane, Position()) if row else Position()

    def _window(self, lane: int, position: Position) -> tuple[list[Piece], Position]:
        """The pieces of the sequence that begins at `position`, and where the next one begins: with its last token."""
        found: list[Piece] = []
        left, at, empty = self._size + 1, position, 0
        while True:
            documents = self._documents(lane, at.epoch, at.tar)
            if at.document >= len(documents):
                empty += 1
                if empty > len(self._data.files):
                    raise self._no_documents(lane)
                is_last = at.tar + 1 == len(self._data.files)
                at = replace(at, epoch=at.epoch + is_last, tar=0 if is_last else at.tar + 1, document=0, token=0)
                continue
            document = int(documents[at.document])
            size = self._num_tokens(document)
            count = min(left, size - at.token)
            if count > 0:
                empty = 0
                found.append(Piece(self._source, document, at.token, count, at.epoch))
                left -= count
                if not left:
                    return found, replace(at, row=position.row + 1, token=at.token + count - 1)
            at = replace(at, document=at.document + 1, token=0)

    def _num_tokens(self, document: int) -> int:
        """0 of a bad one."""
        try:
            return len(self._data.tokens(document))
        except BadDocument as bad:
            self._faults.skip(self._source, document, bad, self._data.name)
            return 0

    def _documents(self, lane: int, epoch: int, place: int) -> np.ndarray:
        """int64: the lane's documents of a tar, in the epoch's order. Those of the last tar are kept."""
        kept = self._mine.get(lane)
        if kept is not None and kept[:2] == (epoch, place):
            return kept[2]
        tar = int(self._tars(epoch)[place])
        first = (lane + int(self._rotations[tar])) % self._num_lanes
        mine = np.arange(first, self._data.num_documents(tar), self._num_lanes)
        order = np.argsort(draws(len(mine), (self._seed, epoch, tar, lane)), kind="stable")
        documents = mine[order] + (tar << 32)
        self._mine[lane] = (epoch, place, documents)
        return documents

    def _tars(self, epoch: int) -> np.ndarray:
        """The tars in the epoch's order. The newest two epochs are kept."""
        found = self._epochs.get(epoch)
        if found is None:
            found = np.argsort(draws(len(self._data.files), (self._seed, epoch)), kind="stable")
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1} | {epoch: found}
        return found

    def _look_ahead(self, lane: int, position: Position) -> None:
        """Have tokenised what the next sequence needs, and the next tar opened."""
        documents = self._documents(lane, position.epoch, position.tar)[position.document + 1 :]
        wanted = self._size * _AHEAD_BYTES_PER_TOKEN
        sizes = itertools.accumulate(self._data.text_bytes(int(document)) for document in documents)
        count = 1 + sum(1 for _ in itertools.takewhile(lambda size: size < wanted, sizes))
        self._data.prefetch(documents[:count].tolist())
        if position.tar + 1 < len(self._data.files):
            self._data.prefetch_tar(int(self._tars(position.epoch)[position.tar + 1]))

    def _no_documents(self, lane: int) -> UserError:
        return UserError(
            f"data {self._data.name}: lane {lane} of data.num_lanes={self._num_lanes} has no documents: there are too "
            "few. Lower data.num_lanes (a multiple of the data-parallel size), or add text."
        )


def to_json(positions: Mapping[int, Position]) -> dict[str, list[int]]:
    return {str(lane): list(astuple(position)) for lane, position in sorted(positions.items())}


def from_json(values: Mapping[str, Sequence[int]]) -> dict[int, Position]:
    """Raises ValueError or TypeError for what `to_json` did not write."""
    return {int(lane): Position(*map(int, numbers)) for lane, numbers in values.items()}
