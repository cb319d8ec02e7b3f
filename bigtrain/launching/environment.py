"""What every rank finds in its environment, however it was started: torchrun's names, and what makes a CPU fast."""

from __future__ import annotations

import ctypes
import os
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.errors import UserError
from bigtrain.launching.machine import num_cores


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    """Ranks on this node."""
    address: str
    """Host name of rank 0."""
    port: int


def rank_environment(place: Place, device: str, user: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to add to `user`'s environment for one rank. What the user has set of the tunable ones stays."""
    names = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "PYTHONUNBUFFERED": "1",
    }
    threads = int(user.get("SLURM_CPUS_PER_TASK", "0")) or max(1, num_cores() // place.local_world)
    tunable = {"OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        tunable |= _malloc_settings()
    names |= {name: value for name, value in tunable.items() if name not in user}
    return names


def free_port() -> int:
    """A TCP port that nothing listens on, below the range that the kernel gives to outgoing connections: none of
    those can take it before rank 0 does. Random, so that two launches at once hardly meet."""
    low, high = 12000, _first_ephemeral_port()
    for _ in range(100):
        port = random.SystemRandom().randrange(low, max(high, low + 1000))
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free TCP port between {low} and {high} for the ranks to meet at. Close some listeners.")


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 32768


def _malloc_settings() -> dict[str, str]:
    """Keep freed blocks instead of giving them back to the kernel after every operator: 7 to 26 % of a CPU step.

    Older glibc ignores a mapping threshold above 32 MiB, silently, so the one that runs here is asked.
    """
    m_mmap_threshold, wanted, oldest_limit = -3, 1 << 30, 32 << 20
    try:
        taken = ctypes.CDLL(None).mallopt(m_mmap_threshold, wanted)
    except (OSError, AttributeError):  # no glibc: the variables mean nothing
        return {}
    threshold = wanted if taken else oldest_limit
    return {"MALLOC_MMAP_THRESHOLD_": str(threshold), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
