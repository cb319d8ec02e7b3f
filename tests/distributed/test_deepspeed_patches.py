"""What we put in the place of DeepSpeed's functions computes what they computed, against torch's own collectives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import PoolFactory, RankError


def patched_backend() -> Any:
    """DeepSpeed's communication over gloo, with our patches."""
    import deepspeed.comm as comm

    from bigtrain.engine import deepspeed_patches

    comm.init_distributed("gloo")
    deepspeed_patches.apply(None)
    deepspeed_patches.apply_on_cpu()
    return comm


def compare_collectives(numel: int, in_place: bool) -> None:
    """Over all ranks, and over each group of every second rank."""
    import torch
    import torch.distributed as dist

    comm = patched_backend()
    rank, world = dist.get_rank(), dist.get_world_size()
    halves: list[Any] = [dist.new_group(list(range(first, world, 2))) for first in (0, 1)]
    for group in (None, halves[rank % 2]):
        size, place = dist.get_world_size(group), dist.get_rank(group)
        whole = torch.randn(size * numel, generator=torch.Generator().manual_seed(rank))
        expected, found = torch.empty(numel), torch.empty(numel)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        expected = total.chunk(size)[place]
        comm.reduce_scatter_fn(found, whole.clone(), group=group)
        torch.testing.assert_close(found, expected)

        gathered, ours = torch.empty(size * numel), torch.full((size * numel,), torch.nan)
        part = ours.narrow(0, place * numel, numel) if in_place else torch.empty(numel)
        part.copy_(whole[:numel])
        dist.all_gather_into_tensor(gathered, whole[:numel].clone(), group=group)
        comm.all_gather_into_tensor(ours, part, group=group, async_op=True).wait()
        assert torch.equal(ours, gathered)


def average() -> None:
    import torch
    from deepspeed.comm import ReduceOp

    patched_backend().reduce_scatter_fn(torch.empty(1), torch.ones(2), op=ReduceOp.AVG)


def compare_orders(group_agrees: bool) -> None:
    """Stages 0 and 1 are ranks (0, 1) and (2, 3); they run different modules, and the ranks of one run the same."""
    import torch.distributed as dist
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    from bigtrain.engine import deepspeed_patches

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    deepspeed_patches.apply(stages[rank // 2])
    coordinator.assert_ints_same_as_other_ranks([rank // 2, 7] if group_agrees else [rank, 7])


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in-place"])
@pytest.mark.parametrize("numel", [1, 1001])
def test_collectives_are_torchs(pool: PoolFactory, numel: int, in_place: bool) -> None:
    pool(4).run(compare_collectives, numel, in_place)


def test_a_reduce_scatter_that_does_not_sum_is_refused(pool: PoolFactory) -> None:
    with pytest.raises(RankError, match="only sums"):
        pool(2).run(average)


def test_stages_may_run_different_modules(pool: PoolFactory) -> None:
    pool(4).run(compare_orders, True)


def test_ranks_of_one_stage_may_not(pool: PoolFactory) -> None:
    with pytest.raises(RankError, match="different orders"):
        pool(4).run(compare_orders, False)
