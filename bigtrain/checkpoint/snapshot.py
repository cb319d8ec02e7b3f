"""A copy of what a rank owns in host memory, so that training goes on while it is written.

The memory is taken once, in the first save, and used again: as many bytes as the rank owns, 12 a parameter with Adam.
On a GPU it is pinned, so the copies run at the speed of the bus, and may be up to twice as much.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from bigtrain.checkpoint.slices import Fragment

_ALIGNMENT = 64
_PIECE_BYTES = 16 << 20


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
        self.reserve(owned)
        device = _device_of(owned)
        copies: list[Fragment] = []
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        at = 0
        for fragment in owned:
            tensors: dict[str, torch.Tensor] = {}
            for kind, flat in fragment.tensors.items():
                place = self._memory[at : at + flat.nbytes].view(flat.dtype)
                pairs.append((place, flat.detach()))
                tensors[kind] = place
                at += _room(flat)
            copies.append(replace(fragment, tensors=tensors))
        if device.type == "cpu":
            _copy_on_host(pairs)
        else:
            for place, flat in pairs:
                place.copy_(flat, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return copies

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Take the memory that `take` of these will need, and touch it: the first copy is as fast as the others.

        Raises RuntimeError where there is none."""
        every = list(fragments)
        num_bytes = room(every)
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # let go of the old first
            is_on_gpu = _device_of(every).type == "cuda"
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_on_gpu).zero_()


def _copy_on_host(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Threads that take piece after piece, and meet once: torch's own meet after every tensor, which on a busy machine
    takes three times as long."""

    def copy(piece: tuple[torch.Tensor, torch.Tensor]) -> None:
        target, source = piece
        np.copyto(cast("Any", target.numpy()), cast("Any", source.numpy()))

    flats = ((place.view(torch.uint8), flat.view(torch.uint8)) for place, flat in pairs)
    pieces = (
        (place[at : at + _PIECE_BYTES], flat[at : at + _PIECE_BYTES])
        for place, flat in flats
        for at in range(0, len(flat), _PIECE_BYTES)
    )
    with ThreadPoolExecutor(torch.get_num_threads(), "checkpoint-copy") as pool:
        list(pool.map(copy, pieces))


def room(fragments: Iterable[Fragment]) -> int:
    """Bytes that a copy of these takes: of those that the rank owns."""
    return sum(_room(flat) for fragment in fragments if fragment.owned for flat in fragment.tensors.values())


def room_on_host(fragments: Iterable[Fragment]) -> int:
    """Bytes that the machine gives for that copy."""
    every = list(fragments)
    return allocated_bytes(room(every), is_pinned=_device_of(every).type == "cuda")


def allocated_bytes(num_bytes: int, *, is_pinned: bool) -> int:
    """Pinned memory comes in powers of two (torch 2.13, ATen/core/CachingHostAllocator.h)."""
    return 1 << (num_bytes - 1).bit_length() if is_pinned and num_bytes else num_bytes


def _room(flat: torch.Tensor) -> int:
    return -(-flat.nbytes // _ALIGNMENT) * _ALIGNMENT


def _device_of(fragments: Iterable[Fragment]) -> torch.device:
    flats = (flat for fragment in fragments for flat in fragment.tensors.values())
    return next((flat.device for flat in flats), torch.device("cpu"))
