"""Memory of this machine, within the limits that Slurm or a container set. No torch: the launcher asks too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

OWN_GROUP = Path("/proc/self/cgroup")
"""The file that names this process's group."""
GROUPS = Path("/sys/fs/cgroup")


def host_bytes() -> int:
    """What all processes together may take here."""
    return min([psutil.virtual_memory().total, *(most for most, _ in limits(OWN_GROUP, GROUPS))])


def free_host_bytes() -> int:
    """This rank's part of what the machine has left."""
    left = [max(most - used, 0) for most, used in limits(OWN_GROUP, GROUPS)]
    return min([psutil.virtual_memory().available, *left]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def limits(own: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(most, used) in bytes for each memory limit of this process's cgroups (version 2), as Slurm and containers set
    them. `own`, `root`: as OWN_GROUP and GROUPS."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    group = root / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in [group, *group.parents]:
        try:
            most, used = (
                (folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
            )
        except OSError:
            continue
        if most != "max":
            yield int(most), int(used)
