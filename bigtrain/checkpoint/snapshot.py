"""A copy of what a rank owns in host memory, so that training goes on while it is written.

The memory is taken once, in the first save, and used again: as many bytes as the rank owns, 12 a parameter with Adam.
On a GPU it is pinned, so the copies run at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from bigtrain.checkpoint.slices import Fragment

_ALIGNMENT = 64


class Snapshot:
    """Host memory for one copy. A second `take` overwrites the first."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return self._memory.numel()

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments that this rank owns, as they are now. Returns once they are copied."""
        owned = [fragment for fragment in fragments if fragment.owned]
        flats = [flat for fragment in owned for flat in fragment.tensors.values()]
        device = next((flat.device for flat in flats), torch.device("cpu"))
        self._reserve(sum(map(_room, flats)), device)
        copies: list[Fragment] = []
        at = 0
        for fragment in owned:
            tensors: dict[str, torch.Tensor] = {}
            for kind, flat in fragment.tensors.items():
                place = self._memory[at : at + flat.nbytes].view(flat.dtype)
                place.copy_(flat.detach(), non_blocking=True)
                tensors[kind] = place
                at += _room(flat)
            copies.append(replace(fragment, tensors=tensors))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _reserve(self, num_bytes: int, device: torch.device) -> None:
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # let go of the old first
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _room(flat: torch.Tensor) -> int:
    return -(-flat.nbytes // _ALIGNMENT) * _ALIGNMENT
