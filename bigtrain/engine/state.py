"""The running state of an engine as `Fragment`s: views of DeepSpeed's flat fp32 weights and Adam moments.

Stages 1 and 2 (and so our stage 0) cut each parameter group's concatenation into equal runs, so a rank holds at most one
run of a parameter: its `_hp_mapping` (deepspeed/utils/tensor_fragment.py) tells which. Stage 3 cuts each parameter by
itself, padded to equal pieces: `grad_position` tells where a piece lies in the flat group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from bigtrain.checkpoint.slices import Fragment
from bigtrain.distributed.sharding import Shard
from bigtrain.model.build import shards_of

if TYPE_CHECKING:
    from bigtrain.engine.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def fragments(engine: Engine) -> list[Fragment]:
    """What this rank holds of every weight, moments included (made of zeros where no step was taken yet)."""
    zero_stage = engine.config.parallel.zero_stage
    _make_moments(engine.optimizer, zero_stage)
    topology = engine.runtime.topology
    copies_elsewhere = topology.data_rank > 0 and zero_stage == 0
    found: list[Fragment] = []
    for shard, parameter in shards_of(engine.decoder, topology):
        owned = not copies_elsewhere and (shard.dim is not None or topology.tensor_rank == 0)
        pieces = _piece_of_stage3 if zero_stage == 3 else _piece_of_stages_1_and_2
        found.extend(Fragment(shard, start, tensors, owned) for start, tensors in pieces(engine, shard, parameter))
    return found


def after_load(engine: Engine, adam_step: int) -> None:
    """Spread loaded fp32 weights to the weights that the forward uses, and set Adam's step count. Collective."""
    optimizer = engine.optimizer
    for state in _base(optimizer).state.values():
        state["step"].fill_(float(adam_step))
    if engine.config.parallel.zero_stage < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return optimizer.optimizer


def _flat_weights(optimizer: Any, zero_stage: int) -> list[torch.Tensor]:
    """One flat fp32 tensor a parameter group (stage 3: a sub-group): what torch's optimizer steps."""
    if zero_stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    return [group["params"][0] for group in _base(optimizer).param_groups]


def _make_moments(optimizer: Any, zero_stage: int) -> None:
    """torch makes Adam's state in the first step; a resumed run needs it before."""
    for flat in _flat_weights(optimizer, zero_stage):
        state = _base(optimizer).state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat, requires_grad=False)


def _tensors(optimizer: Any, flat: torch.Tensor, offset: int, numel: int) -> dict[str, torch.Tensor]:
    state = _base(optimizer).state[flat]
    whole = {"weight": flat.detach(), **{key: state[key] for key in MOMENTS}}
    return {kind: tensor.narrow(0, offset, numel) for kind, tensor in whole.items()}


def _piece_of_stages_1_and_2(
    engine: Engine, shard: Shard, parameter: Any
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    mapping = parameter._hp_mapping
    if mapping is None:
        return  # all of it lies with other data ranks
    flat = _flat_weights(engine.optimizer, 1)[mapping.param_group_index]
    address = mapping.hp_fragment_address
    yield mapping.lp_fragment_address.start, _tensors(engine.optimizer, flat, address.start, address.numel)


def _piece_of_stage3(engine: Engine, shard: Shard, parameter: Any) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    optimizer = engine.optimizer
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = min(engine.mpu.get_data_parallel_rank() * padded, shard.numel)
    numel = min(padded, shard.numel - start)
    yield start, _tensors(optimizer, optimizer.fp32_partitioned_groups_flat[group], offset, numel)
