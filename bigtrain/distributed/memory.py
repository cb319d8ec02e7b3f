"""Memory that a rank may still take."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take: of its GPU, or its part of the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


def free_host_bytes() -> int:
    """This rank's part of what the machine has left, within the limits that Slurm or a container set."""
    left = min(psutil.virtual_memory().available, _left_in_cgroup(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    return left // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_cgroup(own: Path, root: Path) -> int:
    """Bytes under the tightest memory limit of this process's cgroups (version 2), as Slurm and containers set them;
    without one, more than any machine has. `own`: the file that names this process's group."""
    left = 1 << 62
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    group = root / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in [group, *group.parents]:
        try:
            most, used = (
                (folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
            )
        except OSError:
            continue
        if most != "max":
            left = min(left, max(int(most) - int(used), 0))
    return left
