"""Memory that a rank may still take."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from bigtrain.distributed import memory
from bigtrain.distributed.memory import free_bytes

CPU = torch.device("cpu")


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
    assert memory._left_in_cgroup(own, tmp_path / "fs") > 1 << 60
    assert memory._left_in_cgroup(tmp_path / "none", tmp_path / "fs") > 1 << 60
    for folder, most in ((job, "max"), (job.parent, "5000"), (tmp_path / "fs", "9000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("1000\n")
    assert memory._left_in_cgroup(own, tmp_path / "fs") == 4000
