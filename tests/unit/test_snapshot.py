"""Copies of a rank's state in host memory."""

from __future__ import annotations

import torch

from bigtrain.checkpoint import snapshot
from bigtrain.checkpoint.slices import Fragment
from bigtrain.distributed.sharding import Shard


def test_a_copy_is_equal_and_stays_as_it_was() -> None:
    memory = snapshot.Snapshot()
    for numel in (0, 1, 5, (snapshot._PIECE_BYTES >> 2) + 3):  # the last one in more than a piece
        tensors = {"weight": torch.randn(numel + 1)[1:], "exp_avg": torch.randn(numel).bfloat16()}
        before = {kind: tensor.clone() for kind, tensor in tensors.items()}
        owned = Fragment(Shard("a", (numel,)), 0, tensors, owned=True)
        (copy,) = memory.take([owned, Fragment(Shard("b", (numel,)), 0, tensors, owned=False)])
        for tensor in tensors.values():
            tensor.zero_()
        assert all(torch.equal(copy.tensors[kind], before[kind]) for kind in before)


def test_memory_is_taken_once() -> None:
    memory, flat = snapshot.Snapshot(), torch.randn(100)
    first, second = (memory.take([Fragment(Shard("a", (100,)), 0, {"weight": flat}, True)])[0] for _ in range(2))
    assert first.tensors["weight"].data_ptr() == second.tensors["weight"].data_ptr()
    assert memory.num_bytes == 448


def test_memory_is_there_before_the_first_copy() -> None:
    memory, fragments = snapshot.Snapshot(), [Fragment(Shard("a", (100,)), 0, {"weight": torch.randn(100)}, True)]
    memory.reserve(fragments)
    assert memory.num_bytes == snapshot.room(fragments) == 448
    place = memory._memory.data_ptr()
    assert memory.take(fragments)[0].tensors["weight"].data_ptr() == place
