"""Norms for Megatron's layer spec. Its own wrapper refuses sequence parallelism (torch_norm.py:32); these mark their
parameters, whose gradients are then partial sums over the tensor group, and the engine adds them up."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bigtrain.model.pointwise import RootMeanSquareNorm


def _mark(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(torch.nn.RMSNorm):
    """https://arxiv.org/abs/1910.07467"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """torch has one kernel for it on a GPU, and a dozen on a CPU."""
        return super().forward(x) if x.is_cuda else RootMeanSquareNorm.apply(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """https://arxiv.org/abs/1607.06450"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)
