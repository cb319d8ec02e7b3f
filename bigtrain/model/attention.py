"""Causal attention that stays within each document of a packed sequence.

Megatron's local attention builds the whole score matrix and knows no documents; this module takes its place in the
layer's `ModuleSpec`. Documents come as `boundaries`: where each one starts in the batch flattened to [B * S], and at
the end B * S (what flash attention calls ``cu_seqlens``). Without them every row is one document. No kernel ever sees
two documents together, so the tokens of one cannot reach another, not even by rounding.

S sequence, B batch, N query heads and G key/value heads of this rank, D head width.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from bigtrain.model.cache import KeyValueCache
from bigtrain.model.pointwise import Rotate, rotary_table, rotated


def boundaries_of(documents_BS: torch.Tensor) -> torch.Tensor:
    """Start of each document in the flattened batch, then B * S: int32 [documents + 1]. A new row is a new document."""
    batch, length = documents_BS.shape
    starts = torch.ones_like(documents_BS, dtype=torch.bool)
    starts[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([batch * length])]).to(torch.int32)


class DocumentAttention(torch.nn.Module):
    """Megatron's ``core_attention``: no parameters of its own.

    CPU: `scaled_dot_product_attention`, a call a document. CUDA: flash attention's variable-length kernel, Transformer
    Engine's where it is installed (CUDA: not yet run on a GPU)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        rope_theta: float | None,
    ) -> None:
        """`rope_theta`: base of the rotary frequencies; None: positions come otherwise."""
        super().__init__()
        self.rope_theta, self.layer_number = rope_theta, layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        # Megatron runs all layers in the sharded stream then; a second fork of it would draw the same numbers again
        self.in_sharded_region = config.sequence_parallel
        self.engine = _transformer_engine(config, layer_number, pg_collection)

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        boundaries: torch.Tensor | KeyValueCache | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[S, B, N * D]. `boundaries` arrives through Megatron's ``attention_mask`` argument; a cache in its place says
        that the tokens go on from those that it holds.

        Rotary positions count through the row: within a document only their differences matter."""
        if isinstance(boundaries, KeyValueCache):
            return self._go_on(query_SBND, key_SBGD, value_SBGD, boundaries)
        if self.rope_theta is not None:
            table = rotary_table(query_SBND.shape[0], query_SBND.shape[-1], self.rope_theta, query_SBND.device)
            query_SBND, key_SBGD = (Rotate.apply(x, *table) for x in (query_SBND, key_SBGD))
        dropout = self.dropout if self.training else 0.0
        if dropout > 0.0 and not self.in_sharded_region:
            with get_cuda_rng_tracker().fork():  # type: ignore[union-attr]  # heads are sharded, so tensor peers draw apart
                context = self._attend(query_SBND, key_SBGD, value_SBGD, boundaries, dropout)
        else:
            context = self._attend(query_SBND, key_SBGD, value_SBGD, boundaries, dropout)
        return context.flatten(2)

    def _go_on(
        self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, cache: KeyValueCache
    ) -> torch.Tensor:
        """[S, B, N * D], of documents that have a row each; without dropout."""
        if self.rope_theta is not None:
            angles = cache.angles(query_SBND.shape[-1], self.rope_theta)
            query_SBND, key_SBGD = (rotated(x, *angles) for x in (query_SBND, key_SBGD))
        keys, values = cache.extended(self.layer_number, key_SBGD, value_SBGD)
        if cache.begins:
            rows = [x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD)]
            return self._causal(rows, 0.0).permute(2, 0, 1, 3).flatten(2)
        heads, groups = query_SBND.shape[2], keys.shape[1]
        # the heads of a group are as good as more tokens, and no key is copied for each of them
        query = query_SBND.permute(1, 2, 0, 3).unflatten(1, (groups, -1)).flatten(2, 3)
        seen = cache.seen_BST().repeat(1, heads // groups, 1)[:, None]
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=self.scale)
        return context.unflatten(2, (heads // groups, -1)).flatten(1, 2).permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        if boundaries is None:
            rows = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            return self._causal(rows, dropout).permute(2, 0, 1, 3)
        length, batch = query.shape[:2]
        flat = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]  # [B * S, heads, D]
        if query.is_cuda:
            context = self._cuda_documents(flat, boundaries, length, dropout)
        else:
            cuts = boundaries.tolist()
            context = torch.cat(
                [
                    self._causal([x[start:end].transpose(0, 1)[None] for x in flat], dropout)[0].transpose(0, 1)
                    for start, end in pairwise(cuts)
                ]
            )
        return context.unflatten(0, (batch, length)).transpose(0, 1)

    def _causal(self, query_key_value: list[torch.Tensor], dropout: float) -> torch.Tensor:
        """Each [B, heads, S, D], one document a row."""
        query, key, value = query_key_value
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=dropout,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _cuda_documents(
        self, query_key_value: list[torch.Tensor], boundaries: torch.Tensor, longest: int, dropout: float
    ) -> torch.Tensor:
        """Each [B * S, heads, D]. `longest`: the sequence length, an upper bound that needs no wait for the device.

        Not yet run on a GPU."""
        query, key, value = query_key_value
        half = query.dtype in (torch.bfloat16, torch.float16)
        if self.engine is not None and half:
            context = self.engine(
                query, key, value, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries,
                max_seqlen_q=longest, max_seqlen_kv=longest,
            )  # fmt: skip
            return context.view(query.shape)
        if dropout > 0.0 or not half:
            return self._jagged(query_key_value, boundaries, longest, dropout)
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(  # type: ignore[return-value]  # a tensor, as no auxiliary output is asked for
            query, key, value, boundaries, boundaries, longest, longest,
            scale=self.scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    def _jagged(
        self, query_key_value: list[torch.Tensor], boundaries: torch.Tensor, longest: int, dropout: float
    ) -> torch.Tensor:
        """The same through nested tensors: fp32 and dropout, which the variable-length kernel has not."""
        heads = query_key_value[0].shape[1]
        nested = [
            torch.nested.nested_tensor_from_jagged(
                x.repeat_interleave(heads // x.shape[1], dim=1), boundaries.long(), max_seqlen=longest, min_seqlen=1
            ).transpose(1, 2)
            for x in query_key_value
        ]
        return self._causal(nested, dropout).transpose(1, 2).values()


def _transformer_engine(config: TransformerConfig, layer_number: int, groups: Any) -> Any | None:
    """Transformer Engine's attention for packed documents, or None on a CPU and where it is not installed.

    It gets no tracker of random states: `DocumentAttention.forward` has forked one. Not yet run on a GPU."""
    if config.use_cpu_initialization or find_spec("transformer_engine") is None:
        return None
    from transformer_engine.pytorch import DotProductAttention  # type: ignore[import-not-found]

    return DotProductAttention(
        config.num_attention_heads,
        config.kv_channels,
        num_gqa_groups=config.num_query_groups,
        attention_dropout=config.attention_dropout,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        tp_size=config.tensor_model_parallel_size,
        tp_group=groups.tp,
        layer_number=layer_number,
    )
