"""parallel.gather=auto keeps weights where they are a small part of what is free, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bigtrain.config.derive import count_parameters, parameter_count, parameters_of_stages
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from bigtrain.engine import gather
from bigtrain.engine.gather import SHARE_OF_FREE_MEMORY, free_bytes, keep_gathered
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


def test_ranks_share_a_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_bytes(CPU) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 250


def test_a_memory_limit_of_the_job_counts(tmp_path: Path) -> None:
    """The tightest of the groups that the process is in."""
    own, job = tmp_path / "cgroup", tmp_path / "fs" / "slurm" / "job"
    own.write_text("1:name=systemd:/elsewhere\n0::/slurm/job\n")
    job.mkdir(parents=True)
    assert gather._left_in_cgroup(own, tmp_path / "fs") > 1 << 60
    assert gather._left_in_cgroup(tmp_path / "none", tmp_path / "fs") > 1 << 60
    for folder, most in ((job, "max"), (job.parent, "5000"), (tmp_path / "fs", "9000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("1000\n")
    assert gather._left_in_cgroup(own, tmp_path / "fs") == 4000
