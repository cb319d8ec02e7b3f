"""Memory that a rank may still take, and that a machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from bigtrain.distributed import host_memory
from bigtrain.distributed.host_memory import host_bytes
from bigtrain.distributed.memory import free_bytes

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 9,500 bytes, 9,000 of them free; returns the folder of this process's group, in which there is no
    limit yet."""
    own, job = tmp_path / "cgroup", tmp_path / "fs" / "slurm" / "job"
    own.write_text("1:name=systemd:/elsewhere\n0::/slurm/job\n")
    job.mkdir(parents=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 9000, "total": 9500}))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(host_memory, "OWN_GROUP", own)
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "fs")
    return job


def test_ranks_share_a_machines_memory(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(CPU) == 9000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 2250
    assert host_bytes() == 9500, "what all of them have"


def test_a_memory_limit_of_the_job_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of the groups that the process is in."""
    for folder, most in ((machine, "max"), (machine.parent, "5000"), (machine.parent.parent, "8000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("1000\n")
    assert (host_bytes(), free_bytes(CPU)) == (5000, 4000)
    monkeypatch.setattr(host_memory, "OWN_GROUP", machine / "none")
    assert (host_bytes(), free_bytes(CPU)) == (9500, 9000)
