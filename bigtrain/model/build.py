"""The decoder: Megatron-core's GPTModel with our attention, norms and loss, built from a `ModelConfig`.

Parameters come out uninitialised; `bigtrain.model.initial` fills them by name. Tensor parallelism is Megatron's:
`shards_of` says for every parameter which part of which global tensor this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from bigtrain.config.derive import layers_of_chunks
from bigtrain.config.schema import Config, ModelConfig
from bigtrain.distributed.sharding import Shard
from bigtrain.distributed.start import Runtime
from bigtrain.model.attention import DocumentAttention
from bigtrain.model.cache import KeyValueCache
from bigtrain.model.norms import LayerNorm, RMSNorm
from bigtrain.model.pointwise import SwiGLU
from bigtrain.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Decoder(GPTModel):
    """A chunk of the model: some layers, with the embedding in front of the first and the output layer behind the last.

    A GPTModel whose loss over an unsplit vocabulary is one kernel instead of Megatron's dozen."""

    copies_embedding = False
    """Its output layer is a copy of the word embedding that another stage holds."""
    num_tokens: int | None = None
    """Rows of the vocabulary that stand for tokens, where the others are padding: those then get no probability. In
    training they get what they learn."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, fp32 [B, S], of `labels` [B, S] under `logits` [S, B, V / tensor]."""
        tensor = self.pg_collection.tp
        self._hide_padding(logits, first_row=tensor.rank() * logits.shape[-1])
        if tensor.size() > 1:
            return super().compute_language_model_loss(labels, logits)
        labels_SB = labels.transpose(0, 1)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels_SB.flatten(), reduction="none")
        return losses.view(labels_SB.shape).transpose(0, 1)

    def hidden(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """What the output layer reads, [S, B, H], of a whole model. A row is one document; with a `cache` the tokens go
        on from those that it holds, and it holds them too afterwards."""
        mask: Any = None if cache is None else cache.at(positions_BS)
        return self.decoder(hidden_states=self.embedding(tokens_BS, positions_BS), attention_mask=mask)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """fp32 [N, V] of some of the places of `hidden`, the same on every tensor rank. Collective."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_N1V, _ = self.output_layer(hidden_NH[:, None], weight=weight, runtime_gather_output=True)
        self._hide_padding(logits_N1V, first_row=0)
        return logits_N1V[:, 0].float()

    def _hide_padding(self, logits: torch.Tensor, *, first_row: int) -> None:
        """In place. `first_row`: of the vocabulary that the last dimension begins with."""
        if self.num_tokens is not None:
            logits[..., max(self.num_tokens - first_row, 0) :] = -torch.inf


class FeedForward(MLP):
    """Megatron's, with SwiGLU in few passes over memory."""

    def __init__(self, config: TransformerConfig) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        if not self.config.gated_linear_unit:
            return super().forward(hidden_states, *args, **kwargs)
        both, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(SwiGLU.apply(both if bias is None else both + bias))


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """Megatron's config for ours. `train.recompute` maps to its granularities; the loss is a sum over tokens."""
    model, parallel = config.model, config.parallel
    on_gpu = device.type == "cuda"
    swiglu = model.activation == "swiglu"
    dtype = DTYPES[config.precision.dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.hidden_size // model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=swiglu,
        activation_func=F.silu if swiglu else partial(F.gelu, approximate="tanh"),
        add_bias_linear=model.bias,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(config) if parallel.pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # at pipeline size 2 batched p2p swaps the messages of both neighbours, who are one peer
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        # Megatron's fusions are torch.compile's, which wants a compiler on every node
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **_RECOMPUTE[config.train.recompute],
    )


def _pipeline_layout(config: Config) -> Any:
    """Which layers each chunk has, in Megatron's terms: chunk by chunk in the order of the model."""
    chunks = [["decoder"] * count for count in layers_of_chunks(config.model, config.parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def layer_spec(model: ModelConfig) -> ModuleSpec:
    """Pre-norm attention and feed-forward; every layer is alike."""
    norm = _norm(model)
    theta = model.rope_theta if model.position == "rope" else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(DocumentAttention, rope_theta=theta),
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]  # a function is what it calls
            pre_mlp_layernorm=norm,
            mlp=FeedForward,
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        ),
    )


def _norm(model: ModelConfig) -> type[torch.nn.Module]:
    return RMSNorm if model.norm == "rmsnorm" else LayerNorm


def build(config: Config, runtime: Runtime) -> list[Decoder]:
    """This pipeline stage's chunks of the model on `runtime.device`, parameters uninitialised.

    Megatron would tie the embeddings of two stages with collectives on whole weights while it builds; here they are two
    parameters of one name, which start alike because all of that name do, and the engine keeps them alike."""
    megatron = transformer_config(config, runtime.device)
    chunks = config.parallel.virtual_pipeline
    return [_build_chunk(config, runtime, megatron, chunk if chunks > 1 else None) for chunk in range(chunks)]


def _build_chunk(config: Config, runtime: Runtime, megatron: TransformerConfig, chunk: int | None) -> Decoder:
    model, parallel, stage = config.model, config.parallel, runtime.topology.stage
    place = (chunk or 0) * parallel.pipeline + stage
    is_first, is_last = place == 0, place == parallel.pipeline * parallel.virtual_pipeline - 1
    layers = TransformerBlockSubmodules(
        layer_specs=[layer_spec(model)] * get_num_layers_to_build(megatron, vp_stage=chunk, pp_rank=stage),
        layer_norm=_norm(model),  # type: ignore[arg-type]
    )
    decoder = Decoder(
        megatron,
        layers,  # type: ignore[arg-type]  # it takes a block's submodules as well
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_positions,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=model.tie_embeddings and parallel.pipeline == 1,
        position_embedding_type="none" if model.position == "rope" else "learned_absolute",  # rope: in the attention
        pg_collection=runtime.groups,
        vp_stage=chunk,
    )
    decoder.copies_embedding = model.tie_embeddings and is_last and not is_first
    return decoder


def shards_of(chunk: Decoder, topology: Topology) -> Iterator[tuple[Shard, torch.nn.Parameter]]:
    """Every parameter of a chunk with its place in the whole model, in registration order.

    Under ZeRO-3 a parameter may be empty at the moment; its shape is then the one that DeepSpeed remembers."""
    for path, module in chunk.named_modules():
        for field, parameter in module.named_parameters(recurse=False):
            name = _global_name(chunk, f"{path}.{field}")
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            dim = _split_dimension(module, field)
            parts = 2 if dim == 0 and name.rsplit(".", 2)[-2] == "linear_fc1" and chunk.config.gated_linear_unit else 1
            yield (
                Shard.of(name, shape, dim=dim, rank=topology.tensor_rank, size=topology.tensor, parts=parts),
                parameter,
            )


def _split_dimension(module: torch.nn.Module, field: str) -> int | None:
    """Which dimension Megatron splits over the tensor ranks."""
    if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
        return 0
    return 1 if isinstance(module, RowParallelLinear) and field == "weight" else None


EMBEDDING = "embedding.word_embeddings.weight"
VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Weights that have a row a token."""


def _global_name(chunk: Decoder, name: str) -> str:
    """Layers are numbered within the chunk in Megatron's module names; Megatron's `layer_number` counts from 1
    through the whole model."""
    if name == "output_layer.weight" and chunk.copies_embedding:
        return EMBEDDING
    if not name.startswith("decoder.layers."):
        return name
    _, _, index, rest = name.split(".", 3)
    layer: Any = chunk.decoder.layers[int(index)]
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"
