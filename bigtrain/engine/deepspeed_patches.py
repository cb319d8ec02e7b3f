"""What DeepSpeed 0.19.8 needs to run one stage of a Megatron pipeline: every patch to it, in one place.

Each names the line that it works around. `tests/unit/test_vendor_patches.py` fails when a patch is no longer needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist


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


def apply_on_cpu() -> None:
    """What gloo and a CPU do slowly: 5 % of a ZeRO-3 step of 10 M parameters on two ranks (docs/log.md)."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    # zero/utils.py:59: the norm of each gradient in fp64, through a copy, where fp32 gives seven digits of it
    modules: tuple[Any, ...] = (stage3, stage_1_and_2)
    for module in modules:
        module.get_norm_dtype = lambda: torch.float32
    # comm/torch.py:369, 435: gloo's reduce-scatter is an all-reduce of a copy, its all-gather goes through another
    backend: Any = import_module("deepspeed.comm.torch")
    backend.TorchBackend.reduce_scatter_tensor = _reduce_scatter
    backend.TorchBackend.all_gather_into_tensor = _all_gather


@contextmanager
def update_refused(optimizer: Any, device: torch.device) -> Iterator[None]:
    """A step() in the block finds a gradient norm that is not finite, so it drops the gradients and updates nothing.

    DeepSpeed has no call for that; its own path for an overflow clears what a step leaves behind
    (zero/stage_1_and_2.py:3050, zero/stage3.py:2891, bf16_optimizer.py:402). Each kind of optimizer gets its norm from
    another method."""
    infinite = torch.tensor(float("inf"), device=device)
    ways: dict[str, Any] = {
        "scaled_global_norm": lambda: infinite,  # stages 1 and 2
        "_get_norm_groups": lambda: [infinite],  # stage 3
        "get_grads_for_norm": lambda: ([infinite], {}),  # bf16
    }
    name = next(name for name in ways if hasattr(optimizer, name))
    setattr(optimizer, name, ways[name])
    try:
        yield
    finally:
        delattr(optimizer, name)


def _reduce_scatter(
    backend: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, op: Any = None, group: Any = None,
    async_op: bool = False,
) -> None:  # fmt: skip
    """Sum over the ranks of `group`; each keeps its part, added in the order of the ranks."""
    if op is not None and op.name != "SUM":
        raise ValueError(f"reduce-scatter on a CPU only sums; {op} was asked for")
    parts = torch.empty_like(input_tensor)
    dist.all_to_all_single(parts, input_tensor, group=group)
    torch.sum(parts.view(dist.get_world_size(group), -1), dim=0, out=output_tensor.view(-1))


def _all_gather(
    backend: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Each rank's part straight to its place."""
    parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
    mine = parts[dist.get_rank(group)]
    if mine.data_ptr() != input_tensor.data_ptr():
        mine.copy_(input_tensor.view(-1))
    works = [dist.broadcast(part, group_src=rank, group=group, async_op=True) for rank, part in enumerate(parts)]
    return _Works(works) if async_op else _Works(works).wait()


class _Works:
    """Several collectives that are waited for as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _assert_same_in_group(ints: list[int], group: Any) -> None:
    mine = torch.tensor([len(ints), hash(tuple(ints)) & 0x7FFFFFFF], dtype=torch.int64)  # on the host: gloo
    extremes = torch.stack([mine, -mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)  # the largest, and the smallest negated
    if not torch.equal(extremes[0], -extremes[1]):
        raise RuntimeError("ZeRO-3: the ranks of one data-parallel group ran their modules in different orders")
