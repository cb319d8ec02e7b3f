"""Randomness inside a step (dropout) as a function of (seed, step, place in the layout).

Nothing of it is state: each step seeds anew, so a resumed run draws what the uninterrupted one drew, and a checkpoint
holds no generator states.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from bigtrain.topology import Topology

REPLICATED = "data-parallel-rng"
SHARDED = "model-parallel-rng"


def derive(seed: int, *what: object) -> int:
    """A 63-bit seed for one use of `seed`, named by `what`. SHA-256, so that names never collide by arithmetic."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_step(seed: int, step: int, topology: Topology) -> None:
    """Seed the generators for `step`: tensor peers draw alike where activations are replicated (the default
    generator) and apart where they are sharded (Megatron's tracker); data ranks and stages always draw apart."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    place = ("step", step, "data", topology.data_rank, "stage", topology.stage)
    torch.manual_seed(derive(seed, *place))  # seeds every device
    tracker: Any = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(REPLICATED, derive(seed, *place))
    tracker.add(SHARDED, derive(seed, *place, "tensor", topology.tensor_rank))
