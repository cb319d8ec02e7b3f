"""Copies of a rank's state in host memory."""

from __future__ import annotations

import pytest
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
    assert memory.num_bytes == snapshot.room(fragments) == snapshot.room_on_host(fragments) == 448
    place = memory._memory.data_ptr()
    assert memory.take(fragments)[0].tensors["weight"].data_ptr() == place


@pytest.mark.parametrize(
    ("num_bytes", "pinned"), [(0, 0), (64, 64), (65, 128), (33 << 30, 64 << 30), (64 << 30, 64 << 30)]
)
def test_pinned_memory_comes_in_powers_of_two(num_bytes: int, pinned: int) -> None:
    assert snapshot.allocated_bytes(num_bytes, is_pinned=True) == pinned
    assert snapshot.allocated_bytes(num_bytes, is_pinned=False) == num_bytes


def test_memory_for_a_copy_of_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_device_of", lambda fragments: torch.device("cuda"))
    assert snapshot.room_on_host([Fragment(Shard("a", (100,)), 0, {"weight": torch.randn(100)}, True)]) == 512
