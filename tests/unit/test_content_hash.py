"""The hash of a tensor does not depend on how it is cut, and depends on every bit."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint import content_hash
from bigtrain.checkpoint.slices import Fragment, state_dict_of
from bigtrain.distributed.sharding import Shard


def oracle(tensor: torch.Tensor) -> int:
    """The formula with Python's whole numbers."""

    def factor(index: int, stream: int) -> int:
        mask = (1 << 64) - 1
        z = ((index + 1 + (stream << 40)) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return (z ^ (z >> 31)) | 1

    kind = {2: np.int16, 4: np.int32, 8: np.int32}[tensor.element_size()]
    view = tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int32}[tensor.element_size()])
    bits = view.numpy().astype(kind).reshape(tensor.shape[0], -1)
    cells = itertools.product(range(bits.shape[0]), range(bits.shape[1]))
    return sum(int(bits[r, c]) * factor(c, 1) * factor(r, 2) for r, c in cells) & ((1 << 64) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(7,), (1,), (5, 9), (3, 1), (4, 3, 5)])
def test_it_is_the_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    assert content_hash.of_rectangle(tensor, (0,) * len(shape)) == oracle(tensor)


def cut(whole: torch.Tensor, tensor_size: int, data_size: int, dim: int | None, parts: int) -> list[list[Fragment]]:
    """As that many ranks would hold a matrix: one list a rank."""
    found: list[list[Fragment]] = []
    for rank in range(tensor_size):
        local_shape = list(whole.shape)
        if dim is not None:
            local_shape[dim] //= tensor_size
        shard = Shard.of("w", tuple(local_shape), dim=dim, rank=rank, size=tensor_size, parts=parts)
        rows = [whole[b.start : b.start + b.length] for b in shard.blocks] if dim == 0 else [whole]
        local = torch.cat(rows) if dim != 1 else whole[:, shard.blocks[0].start :][:, : shard.blocks[0].length]
        flat = local.reshape(-1)
        piece = -(-len(flat) // data_size)
        for data in range(data_size):
            start = min(data * piece, len(flat))
            part = flat[start : start + piece].clone()
            found.append([Fragment(shard, start, {"weight": part}, owned=dim is not None or rank == 0)])
    return found


def added_by(rank: list[Fragment]) -> dict[str, int]:
    """What a rank adds to the hash: the rectangles that it owns, as it writes them."""
    tensors = state_dict_of(rank, only_owned=True)
    return {
        name: sum(content_hash.of_rectangle(values, offsets) for offsets, values in tensor.chunks.items())
        for name, tensor in tensors.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    tensor_size=st.sampled_from([1, 2, 4]),
    data_size=st.integers(1, 7),
    dim=st.sampled_from([0, 1, None]),
    swiglu=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_cut_adds_up_to_the_same(
    tensor_size: int, data_size: int, dim: int | None, swiglu: bool, seed: int
) -> None:
    parts = 2 if swiglu and dim == 0 else 1
    whole = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    expected = content_hash.total([{"weight.w": content_hash.of_rectangle(whole, (0, 0))}])
    ranks = [added_by(rank) for rank in cut(whole, tensor_size, data_size, dim, parts)]
    assert content_hash.total(ranks) == expected


def test_every_bit_counts() -> None:
    tensor = torch.randn(6, 5)
    expected = content_hash.of_rectangle(tensor, (0, 0))
    for element, bit in itertools.product(range(30), range(32)):
        changed = tensor.clone()
        bits = changed.view(torch.int32).view(-1)
        bits[element] ^= (1 << bit) if bit < 31 else -(1 << 31)
        assert content_hash.of_rectangle(changed, (0, 0)) != expected


def test_what_accidents_do_is_seen() -> None:
    """Rows or elements in another order, signs that flip together, zeros for a block, a shift by one."""
    rng = random.Random(3)
    tensor = torch.randn(64, 48)
    expected = content_hash.of_rectangle(tensor, (0, 0))
    changes = [tensor.roll(1, 0), tensor.roll(1, 1), tensor.flip(0), -tensor, tensor.T.contiguous().view(64, 48)]
    for _ in range(500):
        changed = tensor.clone()
        a, b = (rng.randrange(64), rng.randrange(48)), (rng.randrange(64), rng.randrange(48))
        if a == b:
            continue
        changed[a], changed[b] = -tensor[a], -tensor[b]
        changes.append(changed)
        swapped = tensor.clone()
        swapped[a], swapped[b] = tensor[b], tensor[a]
        changes.append(swapped)
    zeroed = tensor.clone()
    zeroed[8:16] = 0
    changes.append(zeroed)
    assert all(content_hash.of_rectangle(changed, (0, 0)) != expected for changed in changes)
    minus = torch.zeros(3, 3)
    assert content_hash.of_rectangle(-minus, (0, 0)) != content_hash.of_rectangle(minus, (0, 0))


def test_a_device_adds_up_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(100, 33)
    expected = content_hash.of_rectangle(tensor, (5, 7))
    monkeypatch.setattr(content_hash, "_sum_on_host", content_hash._sum_on_device)
    assert content_hash.of_rectangle(tensor, (5, 7)) == expected
    monkeypatch.setattr(content_hash, "_BLOCK_ELEMENTS", 50)
    assert content_hash.of_rectangle(tensor, (5, 7)) == expected
