"""Memory that a rank may still take."""

from __future__ import annotations

import torch

from bigtrain.distributed.host_memory import free_host_bytes


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take: of its GPU, or its part of the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
