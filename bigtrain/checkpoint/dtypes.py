"""The number formats that weights are written in."""

from __future__ import annotations

import torch

from bigtrain.config.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def converted(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`values` in `dtype`. Raises UserError, with the tensor's `name`, for finite numbers that fp16 cannot hold."""
    found = values.to(dtype)
    if dtype == torch.float16 and bool((found.isinf() & values.isfinite()).any()):
        largest = float(values.abs().max())
        raise UserError(f"{name} has numbers up to {largest:.3g}, which fp16 cannot hold. Take bf16 or fp32.")
    return found
