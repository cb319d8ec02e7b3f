"""A pipeline stage as DeepSpeed sees it (one module of all its chunks), and each chunk as Megatron's schedule does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bigtrain.engine.tied import TiedWeight
from bigtrain.model.build import Decoder

TIED = -1
"""The chunk that is the tied weight alone (tied.py)."""


class Stage(torch.nn.Module):
    """The module under DeepSpeed: all chunks of this stage, run one at a time."""

    def __init__(self, chunks: Sequence[Decoder], tied: TiedWeight | None) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)
        self.tied = tied

    def forward(self, chunk: int, **inputs: Any) -> torch.Tensor:
        module: Any = self.tied if chunk == TIED else self.chunks[chunk]
        return module(**inputs)


class Handle(torch.nn.Module):
    """A chunk as Megatron's schedule sees it: Megatron's attributes, our forward. Holds no parameters."""

    def __init__(self, chunk: Decoder, forward: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.config = chunk.config
        self.model_type = chunk.model_type
        self.set_input_tensor = chunk.set_input_tensor
        self.vp_stage = chunk.vp_stage
        self._forward = forward
        self.__dict__["decoder"] = chunk.decoder  # an attribute, but not a submodule

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self._forward(**inputs)


def announce_backward(output: torch.Tensor, announce: Callable[[], None]) -> torch.Tensor:
    """`output`, whose backward begins with a call of `announce`: before any hook on `output` itself."""
    return _Announce.apply(output, announce)  # type: ignore[return-value]


class _Announce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, announce: Callable[[], None]) -> torch.Tensor:
        ctx.announce = announce
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.announce()
        return gradient, None
