"""A command on several ranks of this machine: it starts itself once a rank."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bigtrain.config.errors import UserError
from bigtrain.launching import local, machine
from bigtrain.launching.environment import Place, free_port, rank_environment
from bigtrain.launching.local import Command


def is_rank() -> bool:
    """Whether this process was started as a rank: by `run`, torchrun or srun with torchrun's names."""
    return "RANK" in os.environ


def check_gpu(device: str) -> None:
    """Raise UserError where a GPU is asked for and the driver shows none, or PyTorch is built without."""
    if device == "cuda" and (machine.torch_is_cpu_build() or not machine.count_gpus()):
        raise UserError("device=cuda: PyTorch sees no GPU here. Set device=cpu or leave it out.")


def run(module: str, argv: Sequence[str], *, world: int, device: str) -> int:
    """``python -m MODULE ARGV`` on `world` ranks; returns the exit status. Rank 0 speaks on the terminal; what the
    others say is shown where one fails, and is kept in a folder that is named then."""
    if device == "auto":
        device = "cuda" if machine.count_gpus() and not machine.torch_is_cpu_build() else "cpu"
    port, logs = free_port(), Path(tempfile.mkdtemp(prefix="bigtrain-ranks-"))
    status = local.run(
        [
            Command(
                label=f"rank {rank}",
                arguments=[sys.executable, "-m", module, *argv],
                environment=rank_environment(Place(rank, rank, world, world, "127.0.0.1", port), device),
                log=logs / f"rank-{rank}.log" if rank else None,
            )
            for rank in range(world)
        ]
    )
    if status in (0, 2, 130):
        shutil.rmtree(logs, ignore_errors=True)
    return status
