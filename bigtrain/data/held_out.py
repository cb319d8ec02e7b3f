"""The sequences of an evaluation: held-out documents, once through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from bigtrain.config import evaluation_sets
from bigtrain.config.errors import UserError
from bigtrain.config.schema import DataConfig
from bigtrain.data import rows, shards
from bigtrain.data.faults import BadDocument
from bigtrain.data.folders import Places
from bigtrain.data.lanes import Piece
from bigtrain.data.mixture import Pattern
from bigtrain.data.rows import Rows, Window
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer


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

    def rows(self, numbers: Iterable[int]) -> Rows:
        """These sequences, one a row; those from `num_sequences` on are empty."""
        pieces_B = [self.pieces(number) if number < self.num_sequences else [] for number in numbers]
        return rows.read(self.datasets, pieces_B, self.sequence_length)

    def sequence(self, number: int) -> Window:
        """Sequence `number`, and what it is made of."""
        pieces = self.pieces(number)
        return rows.window(rows.read(self.datasets, [pieces], self.sequence_length), pieces)

    def pieces(self, number: int) -> list[Piece]:
        """What is in sequence `number`, below `num_sequences`."""
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
        return pieces

    def check(self) -> None:
        """Raises UserError where a document on a disk is damaged: better at the start than in the first evaluation, on
        one rank. Remote ones are checked when they are fetched."""
        try:
            for number in range(self.num_sequences):
                for piece in self.pieces(number):
                    dataset = self.datasets[piece.source]
                    if not dataset.is_remote:
                        dataset.tokens(piece.document, 0, 0)
        except BadDocument as bad:
            raise UserError(f"{bad} It is evaluated, so it cannot be skipped. See tools/shards.py verify.") from bad

    def predicted_tokens(self) -> np.ndarray:
        """int64[n]: every token that the evaluation predicts: no first token of a document, prompt or padding."""
        windows = map(self.sequence, range(self.num_sequences))
        parts = [window.tokens[window.predicted] for window in windows]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def held_out(
    data: DataConfig, *, sequence_length: int, max_sequences: int | None = None, tokenizer: Tokenizer | None = None
) -> dict[str, HeldOut]:
    """The held-out sequences of each evaluation set of data.valid by its name ("": the only one, without a name), at
    most `max_sequences` of each. Raises UserError for data that are missing, too few, or of a tokenizer whose ids mean
    something else than those of `tokenizer`."""
    sets = evaluation_sets.by_name(data.valid)
    paths = list(dict.fromkeys(source.path for source in data.valid))
    opened = shards.open_all(paths, what="data.valid", tokenizer=tokenizer, places=Places.of(data), by_meaning=True)
    of_path = dict(zip(paths, opened, strict=True))
    return {
        name: HeldOut(
            [of_path[source.path] for source in sources], sequence_length=sequence_length, max_sequences=max_sequences
        )
        for name, sources in sets.items()
    }
