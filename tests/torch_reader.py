"""Checkpoints as torch's own tools read them, with nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp


def read_by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, whole, by ``kind.name``."""
    index: Any = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {name: torch.full(meta.size, 7, dtype=meta.properties.dtype) for name, meta in index.items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def weights_by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """The weights alone, by name."""
    found = {name.partition("."): tensor for name, tensor in read_by_torch(folder).items()}
    return {name: tensor for (kind, _, name), tensor in found.items() if kind == "weight"}
