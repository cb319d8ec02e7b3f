"""ZeRO-3's gather policies do what they say, counted in the collectives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch

from bigtrain.config.schema import Config
from tests.distributed import small
from tests.distributed.harness import PoolFactory

MODEL = replace(small.LLAMA, num_layers=12, hidden_size=256, ffn_hidden_size=704)
"""Matrices far above DeepSpeed's threshold, below which a weight stays gathered whatever the policy."""


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


@dataclass(frozen=True)
class Measured:
    gathered: int
    peak: int
    whole: int
    """Bytes of the weights of this stage."""
    microbatches: int


def measure(config: Config) -> Measured:
    """On a rank: the second step, when every step is like it."""
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    mine = small.share_of(small.global_batch(0), engine.runtime.topology)
    engine.forward_backward(mine)
    engine.optimizer_step(1e-3)
    parameters: list[Any] = [parameter for _, parameter in engine.shards()]
    with GatherMeter(parameters) as meter:
        engine.forward_backward(mine)
        engine.optimizer_step(1e-3)
    whole = sum(p.ds_numel * p.element_size() for p in parameters)
    return Measured(meter.bytes_gathered, meter.peak_bytes_held, whole, len(mine))


@pytest.mark.parametrize("pipeline", [1, 2])
def test_step_gathers_once_and_microbatch_holds_little(pool: PoolFactory, pipeline: int) -> None:
    def run(gather: str) -> list[Measured]:
        config = small.config(MODEL, zero_stage=3, pipeline=pipeline, gather=gather)
        return pool(2 * pipeline).run(measure, config)

    for once, often in zip(run("step"), run("microbatch"), strict=True):
        assert once.gathered == pytest.approx(once.whole, rel=0.02), "each weight once"
        assert once.peak == once.whole
        # in the forward and in the backward; what lies at the turn is still there
        assert 1.3 * often.microbatches < often.gathered / often.whole <= 2.02 * often.microbatches
        assert often.peak < 0.6 * often.whole
