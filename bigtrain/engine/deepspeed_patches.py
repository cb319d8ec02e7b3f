"""What DeepSpeed 0.19.8 needs to run one stage of a Megatron pipeline: every patch to it, in one place.

Each names the line that it works around. `tests/unit/test_vendor_patches.py` fails when a patch is no longer needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

KNOWN_VERSIONS = ("0.19.8",)


def apply(sharding_group: Any) -> None:
    """Patch DeepSpeed for ranks that run different modules. Applying it again replaces the group."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    # comm/torch.py:207 compiles a shared-memory all-reduce on a CPU, which only inference uses (:293); it wants a
    # compiler on every machine and takes all ranks for ranks of one machine.
    backend = import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm it is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]

    # zero/utils.py:114 compares over the whole world, so stages with different modules deadlock or fail; ZeRO needs
    # agreement only among the ranks that share parameters.
    def agree(ints: list[int]) -> None:
        _assert_same_in_group(ints, sharding_group)

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = agree


def _assert_same_in_group(ints: list[int], group: Any) -> None:
    mine = torch.tensor([len(ints), hash(tuple(ints)) & 0x7FFFFFFF], dtype=torch.int64)  # on the host: gloo
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(low, high):
        raise RuntimeError("ZeRO-3: the ranks of one data-parallel group ran their modules in different orders")
