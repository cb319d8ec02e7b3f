"""Norms for Megatron's layer spec. Its own wrapper refuses sequence parallelism (torch_norm.py:33); these mark their
parameters, whose gradients are then partial sums over the tensor group, and the engine adds them up."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def _mark(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(torch.nn.RMSNorm):
    """https://arxiv.org/abs/1910.07467"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """https://arxiv.org/abs/1607.06450"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)
