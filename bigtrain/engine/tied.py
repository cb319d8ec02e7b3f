"""Tied embeddings across pipeline stages: the first holds the word embedding, the last a copy as its output layer.

Both must take the same step, so both need the sum of both gradients. The stages run different microbatches at a time,
so no collective can stand in a backward. Instead each stage keeps its weight's gradient aside in fp32 (DeepSpeed sees
zeros); after the last backward the two are summed, and the sum goes through one more backward, the way of every
gradient: DeepSpeed reduces, partitions and scales it, whatever the ZeRO stage.

A backward carries gradients in the weight's precision. So in bf16 and fp16 the sum takes two of them, one with the sum
rounded and one with what that left: 16 and 22 bits, which DeepSpeed adds in fp32. In fp16 the two also carry up to
twice the largest number; a larger sum is an overflow, as any gradient's is.
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

        self._passing = False

    def summed(self) -> list[torch.Tensor]:
        """The gradient of all microbatches over both stages, as parts in the weight's precision that add up to it.
        Collective over the group."""
        total, self._aside = self._aside, None
        if total is None:
            raise RuntimeError("tied weight: no backward came before")
        dist.all_reduce(total, group=self._group)
        return split(total, self.weight.dtype)

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        """A scalar whose gradient for the weight is `gradient`."""
        self._passing = True
        return _WithGradient.apply(self.weight, gradient)  # type: ignore[return-value]

    def _keep_aside(self, gradient: torch.Tensor) -> torch.Tensor:
        if self._passing:
            self._passing = False
            return gradient
        if self._aside is None:
            self._aside = gradient.detach().to(torch.float32, copy=True)
        else:
            self._aside += gradient.detach()
        return torch.zeros_like(gradient)


def split(total: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """`total` (fp32) as tensors of `dtype` that add up to it, as far as two can. What is not finite stays so."""
    if dtype == torch.float32:
        return [total]
    most = torch.finfo(dtype).max
    first = torch.where(total.isfinite(), total.clamp(-most, most), total).to(dtype)
    rest = torch.where(total.isfinite(), total - first.float(), torch.zeros_like(total))
    return [first, rest.to(dtype)]


class _WithGradient(torch.autograd.Function):
    """0, with a given gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None
