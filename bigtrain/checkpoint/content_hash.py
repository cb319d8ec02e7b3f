"""A hash of a tensor's content that any layout can compute from the pieces that it holds.

    H = sum over (row, column) of bits[row, column] x K(column) x P(row)    mod 2^64

K and P are odd pseudo-random numbers, functions of the index alone. It is a sum: every rank adds up the rectangles that
it writes or has read, nothing is gathered, and the sums of all ranks together are the hash of the whole tensor, however
it was cut. As the factors are odd, a change of one element always changes H; others go unseen with a chance of about
2^-32. It finds accidents, not forgeries. `bits` are the elements' bit patterns, so -0.0 differs from 0.0. (Multilinear
hashing as in Lemire and Kaser, https://arxiv.org/abs/1202.4961, with factors that are products, so few are stored.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch

_BLOCK_ELEMENTS = 1 << 16
"""Summed at a time on a GPU: what its products take of its memory."""
_MASK = (1 << 64) - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def of_rectangle(values: torch.Tensor, offsets: tuple[int, ...]) -> int:
    """What a rectangle adds to the hash of its tensor. `values`: its elements, contiguous; `offsets`: of its first
    element in the whole, in as many dimensions. Runs where the values are; returns a number below 2^64."""
    if not values.numel():
        return 0
    if len(offsets) == 0:
        values, offsets = values.reshape(1), (0,)
    bits_RC = values.reshape(values.shape[0], -1).view(_BITS[values.element_size()])
    scale = bits_RC.shape[1] // max(prod(values.shape[1:]), 1)  # 8-byte elements count as two columns
    left = _column_of(offsets, values.shape) * scale
    columns_C = _factors(left + bits_RC.shape[1], 1)[left:]
    rows_R = _factors(offsets[0] + len(bits_RC), 2)[offsets[0] :]
    if bits_RC.device.type == "cpu":
        return _sum_on_host(bits_RC, columns_C, rows_R)
    return _sum_on_device(bits_RC, columns_C.to(values.device), rows_R.to(values.device))


def _sum_on_host(bits_RC: torch.Tensor, columns_C: torch.Tensor, rows_R: torch.Tensor) -> int:
    """The same in one pass over the elements, on this thread alone: half the processor time of torch's operators, whose
    threads would take the training's cores."""
    bits, columns, rows = bits_RC.numpy(), columns_C.numpy(), rows_R.numpy()
    sums: np.ndarray[Any, np.dtype[np.int64]] = np.einsum("ij,j->i", bits, columns, dtype=np.int64, casting="safe")
    return int(np.dot(sums, rows)) & _MASK


def _sum_on_device(bits_RC: torch.Tensor, columns_C: torch.Tensor, rows_R: torch.Tensor) -> int:
    step = max(1, _BLOCK_ELEMENTS // bits_RC.shape[1])
    total = torch.zeros((), dtype=torch.int64, device=bits_RC.device)
    for first in range(0, len(bits_RC), step):
        sums_R = (bits_RC[first : first + step] * columns_C).sum(1)
        total += (sums_R * rows_R[first : first + step]).sum()
    return int(total.item()) & _MASK


def total(parts: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """The hashes of the whole tensors (16 hexadecimal digits), from what every rank adds."""
    found: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = (found.get(name, 0) + value) & _MASK
    return {name: f"{value:016x}" for name, value in sorted(found.items())}


def _column_of(offsets: tuple[int, ...], shape: torch.Size) -> int:
    """The column, of the tensor as a matrix, in which a rectangle begins. Of more than two dimensions only whole rows
    have one: their columns are the flattened rest."""
    if len(offsets) <= 2:
        return offsets[1] if len(offsets) == 2 else 0
    if any(offsets[1:]):
        raise ValueError(f"a rectangle of {len(shape)} dimensions that begins at {offsets}: not whole rows")
    return 0


@lru_cache(maxsize=16)
def _table(size: int, stream: int) -> torch.Tensor:
    """int64[size]: odd numbers (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, size + 1, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64))  # pyright: ignore[reportUnknownMemberType]


def _factors(size: int, stream: int) -> torch.Tensor:
    """The first `size` factors; tables of powers of two are kept."""
    return _table(1 << max(size - 1, 1).bit_length(), stream)[:size]
