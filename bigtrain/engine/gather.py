"""ZeRO-3: gather each weight anew for every microbatch, or keep it until the step ends?"""

from __future__ import annotations

import os

import psutil
import torch
import torch.distributed as dist

from bigtrain.config.derive import BYTES_OF_DTYPE, parameter_count
from bigtrain.config.schema import Config
from bigtrain.distributed.start import Runtime

SHARE_OF_FREE_MEMORY = 0.25
"""`auto` keeps the weights where all of them together take no more of the free memory than this: activations and the
gradient buckets need the rest."""


def keep_gathered(config: Config, runtime: Runtime) -> bool:
    """`parallel.gather` decided. Collective: the ranks must gather alike, so one with little memory decides for all."""
    if config.parallel.gather != "auto":
        return config.parallel.gather == "step"
    weights = parameter_count(config.model).per_rank(config.parallel.tensor) // config.parallel.pipeline
    fits = weights * BYTES_OF_DTYPE[config.precision.dtype] <= SHARE_OF_FREE_MEMORY * free_bytes(runtime.device)
    vote = torch.tensor([int(fits)], device=runtime.device)
    return bool(runtime.all_reduce(vote, op=dist.ReduceOp.MIN).item())


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take: of its GPU, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
