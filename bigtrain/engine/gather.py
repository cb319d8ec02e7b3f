"""ZeRO-3: gather each weight anew for every microbatch, or keep it until the step ends?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.config.derive import state_bytes
from bigtrain.config.schema import Config
from bigtrain.distributed.memory import free_bytes
from bigtrain.distributed.start import Runtime

SHARE_OF_FREE_MEMORY = 0.25
"""`auto` keeps the weights where all of them together take no more than this of the memory that the training state
leaves free: activations and the gradient buckets need the rest."""


def keep_gathered(config: Config, runtime: Runtime) -> bool:
    """`parallel.gather` decided. Collective: the ranks must gather alike, so one with little memory decides for all."""
    if config.parallel.gather != "auto":
        return config.parallel.gather == "step"
    stages = state_bytes(config, runtime.topology.data)
    state = max(stage.weights + stage.gradients + stage.optimizer for stage in stages)
    free = free_bytes(runtime.device) - state  # none of it is there yet
    fits = max(stage.gathered for stage in stages) <= SHARE_OF_FREE_MEMORY * free
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
