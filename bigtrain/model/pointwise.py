"""The pointwise parts of a layer with few passes over memory: rotary positions, RMSNorm and SwiGLU.

On a CPU these are bound by memory, and autograd's own backward of them goes over it many times. Each function here
writes its backward by hand, in place where it can, and keeps only its inputs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F


@lru_cache(maxsize=4)
def rotary_table(length: int, width: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position x frequency, fp32 [length, width / 2] each (RoFormer, https://arxiv.org/abs/2104.09864)."""
    with torch.inference_mode(
        False
    ):  # it is kept, and a training step in the same process may save it for its backward
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
        return angles.cos().float().to(device), angles.sin().float().to(device)


class Rotate(torch.autograd.Function):
    """Rotate the two halves of each head by its position's angles; the backward rotates back.

    x [S, ..., D]; cos, sin [S, D / 2], or [S, B, D / 2] where each row has positions of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(gradients[0], cos, sin, -1.0), None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """What `Rotate` computes, without a gradient; `sign` -1 rotates back."""
    shape = (*cos.shape[:-1], *(1,) * (x.dim() - cos.dim()), x.shape[-1] // 2)
    cos, sin = cos.view(shape).to(x.dtype), sin.view(shape).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


class RootMeanSquareNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; result in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        squares = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide, gradient = x.float(), gradients[0].float()
        normed = wide * scale
        rows = x.shape[-1]
        for_weight = (gradient * normed).reshape(-1, rows).sum(0)
        for_x = gradient * weight
        along = torch.linalg.vecdot(for_x, normed).unsqueeze(-1).div_(rows)
        for_x.addcmul_(normed, along, value=-1.0).mul_(scale)
        return for_x.to(x.dtype), for_weight.to(weight.dtype), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of x = [gate, up] along the last dimension (https://arxiv.org/abs/2002.05202)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        for_gate, for_up = out.chunk(2, dim=-1)
        torch.mul(gradients[0], F.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=for_gate)
        return out
