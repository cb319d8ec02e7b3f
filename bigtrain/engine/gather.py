"""ZeRO-3: gather each weight anew for every microbatch, or keep it until the step ends?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import psutil
import torch
import torch.distributed as dist

from bigtrain.config.derive import BYTES_OF_DTYPE, parameters_of_stages
from bigtrain.config.schema import Config
from bigtrain.distributed.start import Runtime

SHARE_OF_FREE_MEMORY = 0.25
"""`auto` keeps the weights where all of them together take no more of the free memory than this: activations and the
gradient buckets need the rest."""


def keep_gathered(config: Config, runtime: Runtime) -> bool:
    """`parallel.gather` decided. Collective: the ranks must gather alike, so one with little memory decides for all."""
    if config.parallel.gather != "auto":
        return config.parallel.gather == "step"
    parallel = config.parallel
    weights = max(stage.per_rank(parallel.tensor) for stage in parameters_of_stages(config.model, parallel))
    fits = weights * BYTES_OF_DTYPE[config.precision.dtype] <= SHARE_OF_FREE_MEMORY * free_bytes(runtime.device)
    vote = torch.tensor([int(fits)], device=runtime.device)
    return bool(runtime.all_reduce(vote, op=dist.ReduceOp.MIN).item())


@contextmanager
def held(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """While the block runs, ZeRO-3 releases none of `parameters`.

    DeepSpeed's persistent parameters are meant for that, but without a recorded trace, as under 1F1B, its coordinator
    releases those too (partitioned_param_coordinator.py:498). It leaves a parameter that some module uses."""
    users: list[set[int]] = [parameter.ds_active_sub_modules for parameter in parameters]  # type: ignore[attr-defined]
    for modules in users:
        modules.add(_HOLDER)
    try:
        yield
    finally:
        for modules in users:
            modules.discard(_HOLDER)


_HOLDER = -1
"""No module's number."""


class Releases:
    """ZeRO-3's releases behind a backward, where several forwards may come before it, as under 1F1B.

    DeepSpeed releases a module's weights when a count of its inputs has come down to 0. A forward sets the count anew
    (parameter_offload.py:438), so of two forwards in a row only the first backward released; here each one begins with
    the count of a forward."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self._modules: list[Any] = list(chunk.modules())
        self._counts: list[int] = []

    def after_forward(self) -> None:
        self._counts = [getattr(module, "ds_grads_remaining", 0) for module in self._modules]

    def before_backward(self) -> None:
        for module, count in zip(self._modules, self._counts, strict=True):
            module.ds_grads_remaining = count


class GatherMeter:
    """Counts, in the collectives themselves, what ZeRO-3 gathers on this rank while the block runs.

    with GatherMeter(parameters) as meter: engine.forward_backward(...)"""

    bytes_gathered = 0
    """Of all gathered weights, this rank's own part included."""
    peak_bytes_held = 0
    """Of whole weights that were there, or on their way, at one time."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """`parameters`: those under ZeRO-3."""
        self._parameters: list[Any] = list(parameters)

    def __enter__(self) -> GatherMeter:
        self._backend: Any = import_module("deepspeed.comm.comm").cdb
        self._original = self._backend.all_gather_into_tensor
        self._backend.all_gather_into_tensor = self._gather
        self._look()
        return self

    def __exit__(self, *exception: object) -> None:
        del self._backend.all_gather_into_tensor  # the class's method is seen again

    def _gather(self, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes_gathered += output_tensor.nbytes
        handle = self._original(output_tensor, *args, **kwargs)
        self._look()
        return handle

    def _look(self) -> None:
        held = sum(p.ds_numel * p.element_size() for p in self._parameters if p.ds_status.name != "NOT_AVAILABLE")
        self.peak_bytes_held = max(self.peak_bytes_held, held)


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take: of its GPU, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
