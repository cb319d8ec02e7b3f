"""A step that is not taken changes nothing, on any rank, to the bit, and what follows is what follows without it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bigtrain.config.schema import Config
from tests.distributed import small
from tests.distributed.harness import PoolFactory

LR = 1e-3


def poisoned(engine: Any) -> Any:
    """Until it is removed: what this rank's model puts out is not a number."""

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan

    return engine.chunks[-1].register_forward_hook(spoil)


def state_of(engine: Any) -> tuple[list[torch.Tensor], int]:
    from bigtrain.engine import state

    flats = [flat.clone() for each in state.fragments(engine) for flat in each.tensors.values()]
    return flats, state.adam_step(engine)


def take_step(engine: Any, number: int, *, skip: bool = False) -> tuple[float, float]:
    loss = engine.forward_backward(small.share_of(small.global_batch(number), engine.runtime.topology))
    return loss.mean.item(), engine.optimizer_step(LR, skip=skip)


@dataclass
class Found:
    unchanged: bool
    adam_steps: tuple[int, int]
    loss: float
    grad_norm: float
    later: list[float]


def skip_one(config: Config, *, nan_on: int | None, skip: bool) -> Found:
    """On a rank: two steps, one that must change nothing, and the losses of the two that follow."""
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    for number in range(2):
        take_step(engine, number)
    before, adam_before = state_of(engine)
    hook = poisoned(engine) if nan_on == engine.runtime.topology.rank else None
    loss, norm = take_step(engine, 7, skip=skip)
    if hook is not None:
        hook.remove()
    after, adam_after = state_of(engine)
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    later = [take_step(engine, number)[0] for number in (2, 3, 4)]
    return Found(same, (adam_before, adam_after), loss, norm, later)


def never_skip(config: Config) -> list[float]:
    """On a rank: the losses of a run that never had that step."""
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    return [take_step(engine, number)[0] for number in range(5)][2:]


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    *((dtype, {"zero_stage": stage}) for dtype in ("fp32", "bf16") for stage in range(4)),
    ("fp32", {"zero_stage": 3, "gather": "step"}),
    ("fp32", {"zero_stage": 1, "pipeline": 2}),
    ("fp32", {"zero_stage": 3, "tensor": 2}),
]


@pytest.mark.parametrize(("dtype", "layout"), LAYOUTS, ids=str)
def test_a_step_that_is_not_taken_changes_nothing(pool: PoolFactory, dtype: str, layout: dict[str, Any]) -> None:
    """Not a number on the last rank alone; that, and the step refused for its loss; and a sound step refused.

    A tensor rank that alone has it is at fault by itself: its peers see a loss. The gradient norm tells them."""
    ranks = pool(2)
    config = small.config(dtype=dtype, **layout)
    expected = ranks.run(never_skip, config)
    for nan_on, skip in ((1, False), (1, True), (None, True)):
        results = ranks.run(skip_one, config, nan_on=nan_on, skip=skip)
        assert len({str(found.loss) for found in results}) == 1, "all ranks are told the same"
        for found, later in zip(results, expected, strict=True):
            assert found.unchanged and found.adam_steps == (2, 2)
            assert found.later == later, "as if it had never been"
            assert math.isnan(found.loss) == (nan_on is not None and "tensor" not in layout)
            assert math.isnan(found.grad_norm) if skip else math.isinf(found.grad_norm)


def overflow(config: Config, *, nan_on: int | None, skip: bool) -> tuple[bool, bool, float]:
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    take_step(engine, 0)
    before, _ = state_of(engine)
    hook = poisoned(engine) if nan_on == engine.runtime.topology.rank else None
    take_step(engine, 7, skip=skip)
    if hook is not None:
        hook.remove()
    after, _ = state_of(engine)
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return same, engine.overflowed, engine.loss_scale.value


@pytest.mark.parametrize("stage", range(4))
def test_fp16_tells_an_overflow_from_trouble(pool: PoolFactory, stage: int) -> None:
    """A step that was refused says nothing about the loss scale."""
    ranks, config = pool(2), small.config(dtype="fp16", zero_stage=stage)
    scale = config.precision.initial_loss_scale
    for scaled in ranks.run(overflow, config, nan_on=1, skip=False):
        assert scaled == (True, True, scale / 2)
    for refused in ranks.run(overflow, config, nan_on=None, skip=True):
        assert refused == (True, False, scale)
