"""The harness that other multi-rank tests stand on: results, failures, hangs, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, PoolFactory, RankError, RankPool


def sum_of_ranks(offset: int, *, scale: int = 1) -> tuple[int, int, float]:
    import torch
    import torch.distributed as dist

    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.tensor([scale * (dist.get_rank() + offset)], dtype=torch.float64)
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), total.item()


def leave_everything_behind() -> None:
    """Process groups, Megatron's and DeepSpeed's globals, a variable and a dtype, none of it taken down."""
    import deepspeed
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    assert deepspeed.comm.comm.cdb is None
    assert deepspeed.utils.groups._WORLD_GROUP is None
    assert not parallel_state.is_initialized()
    assert "LEFT_BEHIND" not in os.environ
    assert torch.get_default_dtype() is torch.float32
    assert megatron_random._CUDA_RNG_STATE_TRACKER is None
    deepspeed.init_distributed("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    assert parallel_state.get_tensor_model_parallel_world_size() == 2
    ones = torch.ones(1)
    deepspeed.comm.all_reduce(ones, group=deepspeed.utils.groups._get_data_parallel_group())
    assert ones.item() == 2
    megatron_random.initialize_rng_tracker()
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)


def raise_on(rank: int) -> None:
    """The others wait for it in a collective that never completes."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        print("about to raise")
        raise KeyError("the bad rank")
    dist.barrier()


def hang_on(rank: int, marker: Path | None = None) -> None:
    if int(os.environ["RANK"]) == rank:
        if marker is not None:
            marker.touch()
        time.sleep(600)


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def ranks_with_a_child() -> int:
    return subprocess.Popen(["sleep", "600"]).pid


@pytest.fixture
def small() -> Iterator[RankPool]:
    """Ranks of this test alone, with torch only."""
    pool = RankPool(2, imports=("torch",))
    yield pool
    pool.close()


def is_alive(pid: int) -> bool:
    """False for a zombie too: in a container nobody may reap an orphan."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_ranks_talk_and_are_used_again(small: RankPool) -> None:
    first = small.run(sum_of_ranks, 10)
    assert [(rank, total) for _, rank, total in first] == [(0, 21.0), (1, 21.0)]
    second = small.run(sum_of_ranks, 10, scale=2)
    assert [total for *_, total in second] == [42.0, 42.0]
    assert [pid for pid, *_ in first] == [pid for pid, *_ in second] == small.pids()


def test_nothing_is_left_for_the_next_function(pool: PoolFactory) -> None:
    pool(2).run(leave_everything_behind)
    pids = pool(2).pids()
    pool(2).run(leave_everything_behind)
    assert pool(2).pids() == pids


def test_a_rank_that_raises_is_reported_and_does_not_cost_the_timeout(small: RankPool) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError) as failure:
        small.run(raise_on, 1)
    assert time.monotonic() - begin < 60
    message = str(failure.value)
    assert "KeyError: 'the bad rank'" in message
    assert "in raise_on" in message
    assert "about to raise" in message
    assert "failed: [1]" in message
    assert len(small.run(sum_of_ranks, 0)) == 2


def test_a_rank_that_hangs_shows_its_stack_and_is_replaced(small: RankPool) -> None:
    small.run(sum_of_ranks, 0)
    pids = small.pids()
    with pytest.raises(RankError) as failure:
        small.run(hang_on, 0, timeout_s=2.0)
    message = str(failure.value)
    assert "no answer after 2 s" in message
    assert "returned: [1], failed: [], hung: [0]" in message
    assert "in hang_on" in message
    assert gone(pids)
    assert [total for *_, total in small.run(sum_of_ranks, 0)] == [1.0, 1.0]


def test_a_rank_that_dies_is_reported(small: RankPool) -> None:
    with pytest.raises(RankError, match="the process ended with status -9"):
        small.run(die_on, 1)


def test_what_ranks_started_goes_with_them(small: RankPool) -> None:
    children = small.run(ranks_with_a_child)
    pids = small.pids()
    assert all(is_alive(pid) for pid in children + pids)
    small.close()
    assert gone(children + pids)


def test_no_rank_outlives_a_killed_session(tmp_path: Path) -> None:
    marker = tmp_path / "hangs"
    code = (
        "from tests.distributed.harness import RankPool; from tests.distributed.test_harness import *\n"
        "pool = RankPool(2, imports=('torch',)); pool.run(sum_of_ranks, 0); print(*pool.pids(), flush=True)\n"
        f"pool.run(hang_on, 0, marker=Path({str(marker)!r}), timeout_s=600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        pids = [int(pid) for pid in session.stdout.readline().split()]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
        while not marker.exists():
            assert session.poll() is None
            time.sleep(0.05)
        session.kill()
        assert gone(pids)


def test_a_function_that_ranks_cannot_import_is_refused(small: RankPool) -> None:
    with pytest.raises(ValueError, match="module level"):
        small.run(lambda: None)
