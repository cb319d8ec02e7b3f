"""Pieces of documents -> rows of tokens: copied once from the shards into one array, and where documents begin in it.

A sequence has few beginnings of documents and many tokens, so the beginnings are kept as a short list.

Shapes: B sequences, T = S + 1 tokens each: S inputs, and the target after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bigtrain.data.faults import BadDocument, Faults
from bigtrain.data.lanes import Piece
from bigtrain.data.shards import Dataset
from bigtrain.data.text_tars import TextTars


@dataclass(frozen=True)
class Rows:
    """Sequences, one a row."""

    tokens_BT: np.ndarray
    """int64"""
    starts_B: list[list[int]]
    """Of each row, rising: where a document begins, or a part of one that was packed, or the padding: no token before
    is of any use there."""
    num_tokens_B: list[int]
    """Of each row: tokens that are data; behind them is padding."""
    prompts_B: list[list[tuple[int, int]]] = field(default_factory=list[list[tuple[int, int]]])
    """Of each row, rising: [begin, end) of the tokens of prompts, which are read and never predicted. Empty: no row has
    any."""


@dataclass(frozen=True)
class Window:
    """One sequence, and what it is made of."""

    tokens: np.ndarray
    """int64[T]"""
    starts: np.ndarray
    """bool[T]: `Rows.starts_B`."""
    num_tokens: int
    """`Rows.num_tokens_B`."""
    prompts: Sequence[tuple[int, int]]
    """`Rows.prompts_B`."""
    pieces: tuple[Piece, ...]

    @property
    def predicted(self) -> np.ndarray:
        """bool[T]: which tokens are predicted. Not the first, as nothing stands before it, nor first tokens of
        documents, prompts and padding."""
        predicted = ~self.starts
        predicted[0] = False
        predicted[self.num_tokens :] = False
        for begin, end in self.prompts:
            predicted[begin:end] = False
        return predicted


def read(
    datasets: Sequence[Dataset | TextTars],
    pieces_B: Sequence[Sequence[Piece]],
    sequence_length: int,
    *,
    apart: bool = False,
    faults: Faults | None = None,
) -> Rows:
    """Copy the pieces of each row into it; what they do not fill is padded with token 0, as a document of its own.

    `apart`: each piece begins anew, also where it is the rest of a document. Pieces of bad documents are 0, and each
    place of them a beginning, so that none is a target. Raises UserError where `faults` allow none."""
    parts: list[np.ndarray] = []
    starts_B: list[list[int]] = []
    num_tokens_B: list[int] = []
    prompts_B: list[list[tuple[int, int]]] = []
    prompted = [dataset.has_prompts for dataset in datasets]
    for pieces in pieces_B:
        starts: list[int] = []
        prompts: list[tuple[int, int]] = []
        filled = 0
        for source, document, first, count, _ in pieces:
            try:
                parts.append(datasets[source].tokens(document, first, first + count))
                if apart or not first:
                    starts.append(filled)
                if prompted[source] and (left := datasets[source].prompt_tokens(document) - first) > 0:
                    prompts.append((filled, filled + min(left, count)))
            except BadDocument as bad:
                if faults is None:
                    raise
                faults.skip(source, document, bad, datasets[source].name)
                parts.append(np.zeros(count, np.uint16))
                starts += range(filled, filled + count)
            filled += count
        if filled <= sequence_length:
            parts.append(np.zeros(sequence_length + 1 - filled, np.uint16))
            starts.append(filled)
        starts_B.append(starts)
        num_tokens_B.append(filled)
        prompts_B.append(prompts)
    tokens_BT = np.concatenate(parts, dtype=np.int64).reshape(len(starts_B), sequence_length + 1)
    return Rows(tokens_BT, starts_B, num_tokens_B, prompts_B)


def window(rows: Rows, pieces: Sequence[Piece]) -> Window:
    """The only row of `rows`."""
    (tokens,), (places,), (num_tokens,) = rows.tokens_BT, rows.starts_B, rows.num_tokens_B
    (prompts,) = rows.prompts_B
    starts = np.zeros(len(tokens), np.bool_)
    starts[places] = True
    return Window(tokens, starts, num_tokens, prompts, tuple(pieces))
