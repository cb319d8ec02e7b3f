"""What DeepSpeed asks a "model parallel unit", answered from Megatron's groups.

ZeRO shards over the data-parallel group. ZeRO 0 is ZeRO 1 over a group of one rank: every rank then holds the whole
optimizer, the engine adds the gradients up itself, and all stages share one code path (DeepSpeed's own stage 0 refuses
the backward of Megatron's schedules, engine.py:3132).

The gradient norm spans `get_model_parallel_group`: tensor and pipeline ranks. There DeepSpeed counts every weight on
model-parallel rank 0, and on other ranks those marked `tensor_model_parallel`. Rank 0 of the last stage may hold a copy
of a tied weight, which ZeRO-3's norm has no mark for, so no rank is rank 0 here; the engine marks what each one counts.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from bigtrain.distributed.start import Runtime

COUNTS_ONLY_MARKED = 1
"""Any rank but 0; DeepSpeed uses it for the gradient norm, and in the names of its own checkpoints."""


class Mpu:
    """The object that `deepspeed.initialize` and `deepspeed.zero.Init` take as `mpu`."""

    def __init__(self, runtime: Runtime, *, zero_stage: int) -> None:
        self._runtime = runtime
        self.sharding_group = runtime.groups.dp if zero_stage > 0 else _group_of_one()

    def get_data_parallel_group(self) -> Any:
        return self.sharding_group

    def get_data_parallel_world_size(self) -> int:
        return self.sharding_group.size()

    def get_data_parallel_rank(self) -> int:
        return self.sharding_group.rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.sharding_group)

    def get_model_parallel_group(self) -> Any:
        return self._runtime.groups.mp

    def get_model_parallel_world_size(self) -> int:
        return self._runtime.groups.mp.size()

    def get_model_parallel_rank(self) -> int:
        return COUNTS_ONLY_MARKED

    def get_tensor_model_parallel_group(self) -> Any:
        return self._runtime.groups.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._runtime.topology.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return COUNTS_ONLY_MARKED


def _group_of_one() -> Any:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
