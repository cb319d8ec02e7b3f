"""A Llama-style decoder as one would write it by hand in PyTorch: the yardstick of tools/bench/step.py.

Fused query-key-value and gate-up projections, `F.rms_norm`, causal `scaled_dot_product_attention`; nothing else.

Dimensions: B sequences, S tokens, H hidden, N heads, G key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config.schema import ModelConfig


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, dim = model.hidden_size, model.hidden_size // model.num_attention_heads
        self.heads, self.groups, self.dim, self.eps = (
            model.num_attention_heads, model.num_query_groups, dim, model.norm_eps
        )  # fmt: skip
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.groups) * dim, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * model.ffn_hidden_size, bias=False)
        self.down = nn.Linear(model.ffn_hidden_size, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        x_BSH = x_BSH + self._attention(
            F.rms_norm(x_BSH, x_BSH.shape[-1:], self.attention_norm, self.eps), cos_SD, sin_SD
        )
        gate, up = self.gate_up(F.rms_norm(x_BSH, x_BSH.shape[-1:], self.ffn_norm, self.eps)).chunk(2, dim=-1)
        return x_BSH + self.down(F.silu(gate) * up)

    def _attention(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        heads_BNSD = self.qkv(x_BSH).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads_BNSD.split([self.heads, self.groups, self.groups], dim=1)
        q, k = rotate(q, cos_SD, sin_SD), rotate(k, cos_SD, sin_SD)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        return self.out(y.transpose(1, 2).flatten(-2))


class PlainLlama(nn.Module):
    """Tokens [B, S] to logits [B, S, V]. Raises ValueError for a shape that it does not have."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        if (model.position, model.norm, model.activation, model.bias) != ("rope", "rmsnorm", "swiglu", False):
            raise ValueError("PlainLlama is Llama: rope, rmsnorm, swiglu, no biases")
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.norm = nn.Parameter(torch.ones(model.hidden_size))
        self.eps = model.norm_eps
        self.output = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=model.init_std)
        if model.tie_embeddings:
            self.output.weight = self.embedding.weight
        dim = model.hidden_size // model.num_attention_heads
        frequency = model.rope_theta ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.outer(torch.arange(model.max_positions), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens_BS)
        length = tokens_BS.shape[1]
        for block in self.blocks:
            x_BSH = block(x_BSH, self.cos[:length], self.sin[:length])
        return self.output(F.rms_norm(x_BSH, x_BSH.shape[-1:], self.norm, self.eps))


def rotate(x: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotary position embedding of the two halves of each head; `x` is [B, N, S, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos_SD + torch.cat((-b, a), dim=-1) * sin_SD
