"""What DeepSpeed asks a "model parallel unit", answered from Megatron's groups.

ZeRO shards over the data-parallel group. ZeRO 0 is ZeRO 1 over a group of one rank: every rank then holds the whole
optimizer, the engine adds the gradients up itself, and all stages share one code path (DeepSpeed's own stage 0 refuses
the backward of Megatron's schedules, engine.py:3132).

The gradient norm spans `get_model_parallel_group`: tensor and pipeline ranks. `get_model_parallel_rank` decides who
counts a replicated weight: the first tensor rank of every stage.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from bigtrain.distributed.start import Runtime


class Mpu:
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
        return self._runtime.topology.tensor_rank

    def get_tensor_model_parallel_group(self) -> Any:
        return self._runtime.groups.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._runtime.topology.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._runtime.topology.tensor_rank


def _group_of_one() -> Any:
    group, _ = dist.new_subgroups(group_size=1)
    return group
