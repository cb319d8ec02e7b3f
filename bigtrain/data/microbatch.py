"""What one forward pass eats.

A sequence has few beginnings of documents and many tokens, so a microbatch is its tokens and those few places.
Positions, masks and document numbers follow from them, and are made when they are first asked for: not every user wants
all.

Shapes: B sequences of S tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Microbatch:
    """All tensors are [B, S], on the CPU, but the boundaries."""

    tokens_BS: torch.Tensor
    """int64. It may share its memory with the targets."""
    targets_BS: torch.Tensor
    """int64: the token after each."""
    starts_B: Sequence[Sequence[int]]
    """Of each row, rising, from 0 to S: where in its tokens and the target after the last a document begins, or what
    counts as one: no token before is of any use there."""
    num_tokens_B: Sequence[int]
    """Of each row: how many of those S + 1 are data; behind them is padding."""
    prompts_B: Sequence[Sequence[tuple[int, int]]] = ()
    """Of each row, rising: [begin, end) of those S + 1 that are prompts: read, and never predicted. Empty: no row has
    any."""

    @property
    def single_document(self) -> bool:
        """Every row is part of one document: causal attention needs no other mask."""
        return len(self.boundaries) == len(self.starts_B) + 1

    @functools.cached_property
    def boundaries(self) -> torch.Tensor:
        """int32 [documents + 1]: where each document begins in the batch flattened to [B * S], and at the end B * S.
        Each row begins one. What flash attention calls ``cu_seqlens``."""
        return torch.from_numpy(np.array(self._bounds, np.int32))

    @functools.cached_property
    def loss_mask_BS(self) -> torch.Tensor:
        """bool: False where the target is the first token of another document, part of a prompt, or padding."""
        num_rows, length = self.tokens_BS.shape
        mask_BS = np.ones((num_rows, length), np.bool_)
        first_targets: list[int] = []  # in the flat batch
        for row, (starts, num_tokens) in enumerate(zip(self.starts_B, self.num_tokens_B, strict=True)):
            first_targets += [row * length + start - 1 for start in starts if start]
            mask_BS[row, num_tokens:] = False  # the place before is a start's: that of the padding
        mask_BS.reshape(-1)[first_targets] = False
        for mask_S, prompts in zip(mask_BS, self.prompts_B, strict=False):
            for begin, end in prompts:
                mask_S[max(begin - 1, 0) : end - 1] = False
        return torch.from_numpy(mask_BS)

    @functools.cached_property
    def positions_BS(self) -> torch.Tensor:
        """int64: 0 at the beginning of each document and of each row, counting on."""
        counting = _counting(self.tokens_BS.shape[1])
        parts = [counting[: end - begin] for begin, end in itertools.pairwise(self._bounds)]
        return torch.from_numpy(np.concatenate(parts).reshape(self.tokens_BS.shape))

    @functools.cached_property
    def documents_BS(self) -> torch.Tensor:
        """int32: 0, 1, ... along each row; tokens of the same document have the same number."""
        numbers_BS = np.zeros(self.tokens_BS.shape, np.int32)
        numbers_BS.reshape(-1)[self._bounds[:-1]] = 1
        return torch.from_numpy(numbers_BS.cumsum(axis=1, dtype=np.int32) - 1)

    @functools.cached_property
    def _bounds(self) -> list[int]:
        """`boundaries`."""
        num_rows, length = self.tokens_BS.shape
        bounds: list[int] = []
        for row, starts in zip(range(0, num_rows * length, length), self.starts_B, strict=True):
            bounds.append(row)
            bounds += [row + start for start in starts if 0 < start < length]
        bounds.append(num_rows * length)
        return bounds


@functools.cache
def _counting(size: int) -> np.ndarray:
    """0, 1, ..."""
    return np.arange(size)
