"""The running state of an engine as `Fragment`s: views of DeepSpeed's flat fp32 weights and Adam moments.

Stages 1 and 2 (and so our stage 0) cut each parameter group's concatenation into equal runs, so a rank holds at most
one run of a parameter: its `_hp_mapping` (deepspeed/utils/tensor_fragment.py) tells which. Stage 3 cuts each parameter
by itself, padded to equal pieces: `grad_position` tells where a piece lies in the flat group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bigtrain.checkpoint.slices import Fragment
from bigtrain.distributed.sharding import Shard

if TYPE_CHECKING:
    from bigtrain.engine.engine import Engine

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""By optim.name: what torch keeps for each weight."""


@dataclass(frozen=True)
class _Run:
    """Where elements [start, start + numel) of a parameter lie: from `offset` on in the flat fp32 tensor `flat`."""

    start: int
    flat: torch.Tensor
    offset: int
    numel: int


def fragments(engine: Engine) -> list[Fragment]:
    """What this rank holds of every weight, moments included (made of zeros where no step was taken yet)."""
    _make_moments(engine)
    state, moments = _base(engine).state, MOMENTS[engine.config.optim.name]
    return _fragments(engine, lambda flat: {"weight": flat.detach(), **{key: state[flat][key] for key in moments}})


def adam_step(engine: Engine) -> int:
    """Updates that Adam made: steps less those that a gradient without a finite norm made it skip. 0 for SGD."""
    return max((int(state["step"].item()) for state in _base(engine).state.values() if "step" in state), default=0)


def after_load(engine: Engine, adam_step: int) -> None:
    """Spread loaded fp32 weights to the weights that the forward uses, and set Adam's step count. Collective."""
    optimizer = engine.optimizer
    for state in _base(engine).state.values():
        if "step" in state:
            state["step"].fill_(float(adam_step))
    if engine.config.parallel.zero_stage < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = optimizer.persistent_parameters
    if persistent:  # small weights stay gathered, so they are cut up and gathered anew
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


@contextmanager
def gradients_of_next_step(engine: Engine) -> Iterator[list[Fragment]]:
    """Fills the list, during the optimizer step that the block takes, with copies of the gradients before clipping
    (kind "grad"): reduced over the data ranks, fp32. It stays empty where the step is skipped for an overflow."""
    found: dict[torch.Tensor, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        for group in optimizer.param_groups:
            found.update({flat: flat.grad.detach().clone() for flat in group["params"] if flat.grad is not None})

    hook = _base(engine).register_step_pre_hook(keep)
    result: list[Fragment] = []
    try:
        yield result
    finally:
        hook.remove()
    if not found:
        return
    clip = engine.config.train.grad_clip
    clipped_by = max(1.0, (engine.grad_norm + 1e-6) / clip) if clip > 0 else 1.0
    result.extend(_fragments(engine, lambda flat: {"grad": found[flat] * clipped_by}))


def _fragments(engine: Engine, tensors_of: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> list[Fragment]:
    """A fragment a run of elements; `tensors_of`: the tensors that lie like a flat group."""
    topology, zero_stage = engine.runtime.topology, engine.config.parallel.zero_stage
    runs_of = _runs_of_stage3 if zero_stage == 3 else _runs_of_stages_1_and_2
    copy_elsewhere = zero_stage == 0 and topology.data_rank > 0
    by_flat = {flat: tensors_of(flat) for flat in _flat_groups(engine)}
    return [
        Fragment(
            shard,
            run.start,
            {kind: whole.narrow(0, run.offset, run.numel) for kind, whole in by_flat[run.flat].items()},
            owned=not copy_elsewhere and bool(parameter.tensor_model_parallel),  # type: ignore[attr-defined]
        )
        for shard, parameter in engine.shards()
        for run in runs_of(engine, shard, parameter)
    ]


def _base(engine: Engine) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return engine.optimizer.optimizer


def _flat_groups(engine: Engine) -> list[torch.Tensor]:
    """What torch's optimizer steps: a flat fp32 tensor a parameter group (stage 3: a sub-group)."""
    if engine.config.parallel.zero_stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [group["params"][0] for group in _base(engine).param_groups]


def _make_moments(engine: Engine) -> None:
    """torch makes Adam's state in the first step; a resumed run needs it before."""
    moments = MOMENTS[engine.config.optim.name]
    for flat in _flat_groups(engine) if moments else ():
        state = _base(engine).state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for key in moments:
                state[key] = torch.zeros_like(flat, requires_grad=False)


def _runs_of_stages_1_and_2(engine: Engine, shard: Shard, parameter: Any) -> Iterator[_Run]:
    mapping = parameter._hp_mapping
    if mapping is None:
        return  # all of it lies with other data ranks
    where = mapping.hp_fragment_address
    flat = _flat_groups(engine)[mapping.param_group_index]
    yield _Run(mapping.lp_fragment_address.start, flat, where.start, where.numel)


def _runs_of_stage3(engine: Engine, shard: Shard, parameter: Any) -> Iterator[_Run]:
    optimizer = engine.optimizer
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = min(engine.mpu.get_data_parallel_rank() * padded, shard.numel)
    flat = optimizer.fp32_partitioned_groups_flat[group]
    yield _Run(start, flat, offset, min(padded, shard.numel - start))
