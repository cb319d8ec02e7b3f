"""Tied embeddings across pipeline stages: the first holds the word embedding, the last a copy as its output layer.

Both must take the same step, so both need the sum of both gradients. The stages run different microbatches at a time,
so no collective can stand in a backward. Instead each stage keeps its weight's gradient aside (DeepSpeed sees zeros);
after the last backward the two are summed, and the sum goes through one more backward, the way of every gradient:
DeepSpeed reduces, partitions and scales it, whatever the ZeRO stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class TiedWeight(torch.nn.Module):
    """The weight that this stage shares with another. `group`: the ranks of both stages that hold the same shard."""

    def __init__(self, weight: torch.nn.Parameter, group: Any) -> None:
        super().__init__()
        self.weight = weight
        self._group = group
        self._aside: torch.Tensor | None = None
        weight.register_hook(self._keep_aside)

    def forward(self) -> torch.Tensor:
        """A scalar whose gradient for the weight is the sum over both stages. Collective over the group."""
        total, self._aside = self._aside, None
        if total is None:
            raise RuntimeError("tied weight: no backward came before")
        dist.all_reduce(total, group=self._group)
        self._passing = True
        return _WithGradient.apply(self.weight, total)  # type: ignore[return-value]

    _passing = False

    def _keep_aside(self, gradient: torch.Tensor) -> torch.Tensor:
        if self._passing:
            self._passing = False
            return gradient
        if self._aside is None:
            self._aside = gradient.detach().to(torch.float32, copy=True)
        else:
            self._aside += gradient.detach()
        return torch.zeros_like(gradient)


class _WithGradient(torch.autograd.Function):
    """0, with a given gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(upstream.dtype), None
