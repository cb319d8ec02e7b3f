"""Start one rank: its device, its process groups. The vendors' process-wide globals are set here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.topology import Topology


@dataclass(frozen=True)
class Runtime:
    """What a rank needs to know of its surroundings. Passed explicitly; no library function asks the world."""

    topology: Topology
    device: torch.device
    groups: Any
    """megatron.core.process_groups_config.ProcessGroupCollection"""

    @property
    def is_main(self) -> bool:
        """The one rank that writes metrics, the console and W&B."""
        return self.topology.rank == 0

    def all_reduce(self, tensor: torch.Tensor, *, op: Any = dist.ReduceOp.SUM, group: Any = None) -> torch.Tensor:
        """In place over `group` (default: the world); returns `tensor`."""
        dist.all_reduce(tensor, op=op, group=group)
        return tensor


def rank_of_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) from RANK, WORLD_SIZE and LOCAL_RANK, as torchrun and our launchers set them."""
    return tuple(int(os.environ.get(name, default)) for name, default in _PLACE)  # type: ignore[return-value]


_PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` takes a GPU where there is one. Raises UserError for cuda without a GPU for this rank."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:  # the cluster shows every rank its own
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"cluster.device={wanted}: local rank {local_rank} has no GPU, this machine shows {count}. "
            "Lower cluster.procs_per_node or set cluster.device=cpu."
        )
    return torch.device("cuda", local_rank)


def start(config: Config, *, timeout_s: float = 1800.0) -> Runtime:
    """Join the process group and make Megatron's groups for `config.parallel`. `timeout_s`: that a collective may take.

    Raises UserError where the layout does not divide the world, or the device is not there."""
    if config.parallel.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps by the order of launches
    rank, world, local_rank = rank_of_environment()
    device = choose_device(config.cluster.device, local_rank)
    try:
        topology = Topology.of(world=world, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline, rank=rank)
    except ValueError as error:
        raise UserError(f"parallel: {error}. Change parallel.tensor, parallel.pipeline or the ranks.") from error
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"), ("LOCAL_RANK", str(local_rank))):
        os.environ.setdefault(name, value)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes its device from it
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            store=dist.HashStore() if world == 1 else None,  # alone, no port is needed
        )
    return Runtime(topology, device, _megatron_groups(config, device, timeout_s))


def _megatron_groups(config: Config, device: torch.device, timeout_s: float) -> Any:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if device.type == "cpu":
        from bigtrain.distributed import megatron_cpu

        megatron_cpu.apply()
    virtual = config.parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # a timedelta is made of it
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def stop() -> None:
    """Leave the groups; a test starts others in the same process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
