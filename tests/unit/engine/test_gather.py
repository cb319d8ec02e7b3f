"""parallel.gather=auto keeps weights where they are a small part of what is free, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.config.derive import count_parameters, parameter_count, parameters_of_stages
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from bigtrain.engine import gather
from bigtrain.engine.gather import SHARE_OF_FREE_MEMORY, keep_gathered
from bigtrain.topology import Topology

MODEL = ModelConfig()
CPU = torch.device("cpu")


class Runtime:
    """Of two data ranks. `worst`: what the rank with least memory votes."""

    device = CPU

    def __init__(self, parallel: ParallelConfig, worst: int = 1) -> None:
        world = 2 * parallel.tensor * parallel.pipeline
        self.topology = Topology.of(world=world, tensor=parallel.tensor, pipeline=parallel.pipeline, rank=0)
        self.worst = worst

    def all_reduce(self, tensor: torch.Tensor, *, op: Any, group: Any = None) -> torch.Tensor:
        assert op == torch.distributed.ReduceOp.MIN and group is None
        return tensor.clamp_(max=self.worst)


def decide(
    monkeypatch: pytest.MonkeyPatch, free: float, *, worst: int = 1, dtype: str = "fp32", **parallel: Any
) -> bool:
    monkeypatch.setattr(gather, "free_bytes", lambda device: free)
    config = Config(model=MODEL, parallel=ParallelConfig(**parallel), precision=PrecisionConfig(dtype))
    return keep_gathered(config, Runtime(config.parallel, worst))  # type: ignore[arg-type]


def state(numel: int, element: int) -> float:
    """Bytes of half of the weights, fp32 gradients, masters and moments: what ZeRO-3 will hold before it gathers."""
    return numel / 2 * (element + 4 + 12)


def test_auto_is_the_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * count_parameters(MODEL) / SHARE_OF_FREE_MEMORY + state(count_parameters(MODEL), 4)
    assert decide(monkeypatch, needed)
    assert not decide(monkeypatch, needed - 16)


def test_bf16_needs_half(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * count_parameters(MODEL) / SHARE_OF_FREE_MEMORY + state(count_parameters(MODEL), 2)
    assert decide(monkeypatch, needed, dtype="bf16")
    assert not decide(monkeypatch, needed)


def test_tensor_ranks_and_stages_share_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = parameter_count(MODEL).per_rank(4)
    needed = 4 * mine / SHARE_OF_FREE_MEMORY + state(mine, 4) + 64
    assert decide(monkeypatch, needed, tensor=4)
    assert not decide(monkeypatch, needed, tensor=2)
    fullest = max(stage.per_rank(2) for stage in parameters_of_stages(MODEL, ParallelConfig(tensor=2, pipeline=2)))
    needed = 4 * fullest / SHARE_OF_FREE_MEMORY + state(fullest, 4)
    assert decide(monkeypatch, needed + 64, tensor=2, pipeline=2)
    assert not decide(monkeypatch, needed - 64, tensor=2, pipeline=2)


def test_one_rank_with_little_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not decide(monkeypatch, 1e18, worst=0)


def test_what_the_user_says_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, 0, gather="step")
    assert not decide(monkeypatch, 1e18, gather="microbatch")
