"""The reference that every layout is held against: Hugging Face Transformers in a bare PyTorch loop.

A Llama-style model (RoPE, RMSNorm, SwiGLU) is Transformers' `LlamaForCausalLM`; a GPT-2-style one (learned positions,
LayerNorm, GELU, biases) is its `GPT2LMHeadModel`. The optimizer is torch's AdamW and clipping is torch's
`clip_grad_norm_`. From bigtrain come only the frozen config classes; no code that computes anything.

Our tensors carry Megatron-core's global names and global shapes (`to_hf` lists them). Rotary embedding needs no
permutation: Megatron's default (not interleaved) and Transformers both rotate the two halves of a head.

Dimensions: B sequences, S tokens a sequence, V vocabulary, H hidden, G query groups, D head dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bigtrain.config.schema import ModelConfig, OptimConfig

_LLAMA = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
_LLAMA_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
}
_GPT2 = {
    "embedding.word_embeddings": "transformer.wte",
    "embedding.position_embeddings": "transformer.wpe",
    "decoder.final_layernorm": "transformer.ln_f",
    "output_layer": "lm_head",
}
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}
_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_HF_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)")


class Batch(Protocol):
    """One microbatch. `targets` are already shifted; a token attends to its own document only."""

    tokens_BS: Tensor
    targets_BS: Tensor
    loss_mask_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor


@dataclass
class Trace:
    """What a training did, step by step."""

    losses: list[float] = field(default_factory=list)
    """Mean over the predicted tokens of the step's whole global batch."""
    grad_norms: list[float] = field(default_factory=list)
    """Global norm before clipping."""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each of the first `keep_gradients` steps, before clipping, by Hugging Face's names; `from_hf` gives ours."""
    final_weights: dict[str, Tensor] = field(default_factory=dict)
    """By Hugging Face's names, each tied weight once."""


def build(model: ModelConfig, *, attention: str = "sdpa") -> LlamaForCausalLM | GPT2LMHeadModel:
    """The Hugging Face model of that shape in fp32, with weights of its own; `load` puts ours in.

    Raises ValueError for a shape that neither Llama nor GPT-2 has.
    """
    return (
        build_llama(model, attention=attention) if model.position == "rope" else build_gpt2(model, attention=attention)
    )


def build_llama(model: ModelConfig, *, attention: str = "sdpa") -> LlamaForCausalLM:
    """Transformers' Llama. Raises ValueError for what Llama lacks. `attention`: sdpa or eager."""
    _require(model, position="rope", norm="rmsnorm", activation="swiglu", attention_dropout=0.0, hidden_dropout=0.0)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attention_bias=model.bias,
        mlp_bias=model.bias,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    return LlamaForCausalLM(config).float()


def build_gpt2(model: ModelConfig, *, attention: str = "sdpa") -> GPT2LMHeadModel:
    """Transformers' GPT-2. Raises ValueError for what GPT-2 lacks. `attention`: sdpa or eager."""
    _require(
        model,
        position="learned",
        norm="layernorm",
        activation="gelu",
        bias=True,
        num_query_groups=model.num_attention_heads,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_positions,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        n_inner=model.ffn_hidden_size,
        activation_function="gelu_new",  # the tanh approximation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=model.norm_eps,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    return GPT2LMHeadModel(config).float()


def load(hf_model: nn.Module, state: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Copies our global tensors into the Hugging Face model. Raises RuntimeError where names or shapes differ."""
    missing, unexpected = hf_model.load_state_dict(to_hf(state, model), strict=False)
    absent = ["lm_head.weight"] if model.tie_embeddings else []  # one tensor under two names, given once
    if unexpected or missing != absent:
        raise RuntimeError(f"weights do not match the model: missing {missing}, unexpected {unexpected}")


def to_hf(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our global tensors (or their gradients) under Hugging Face's names and in its shapes.

    Ours, `N` a layer, each with `.weight` and, where the model has biases, `.bias`:
    `embedding.word_embeddings` [V, H], `embedding.position_embeddings` [P, H],
    `decoder.layers.N.input_layernorm` [H], `decoder.layers.N.self_attention.linear_qkv` [G (heads/G + 2) D, H]
    (for each group its query heads, its key head, its value head), `decoder.layers.N.self_attention.linear_proj`
    [H, heads D], `decoder.layers.N.pre_mlp_layernorm` [H], `decoder.layers.N.mlp.linear_fc1` (SwiGLU: gate rows, then
    up rows), `decoder.layers.N.mlp.linear_fc2`, `decoder.final_layernorm` [H], `output_layer` [V, H] (untied).

    Raises KeyError for a name that the model does not have.
    """
    translate = _to_llama if model.position == "rope" else _to_gpt2
    hf: dict[str, Tensor] = {}
    for name, tensor in state.items():
        hf.update(translate(name, tensor, model))
    return hf


def from_hf(hf: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`, for weights and for gradients. Raises KeyError for an unknown or a missing name."""
    rest = dict(hf)
    state: dict[str, Tensor] = {}
    while rest:
        name = next(iter(rest))
        state.update(_from_llama(name, rest, model) if model.position == "rope" else _from_gpt2(name, rest, model))
    return state


def document_mask(documents_BS: Tensor) -> Tensor:
    """Additive attention mask, [B, 1, S, S]: 0 where query and key are of one document and the key is not later."""
    length = documents_BS.shape[1]
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    seen_BSS = same_BSS & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(seen_BSS.shape).masked_fill(~seen_BSS, torch.finfo(torch.float32).min)[:, None]


def logits(hf_model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a microbatch, [B, S, V], attention within documents."""
    output = hf_model(
        input_ids=batch.tokens_BS, attention_mask=document_mask(batch.documents_BS), position_ids=batch.positions_BS
    )
    return output.logits


def loss_sum(hf_model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the cross-entropy over the predicted tokens, in nats."""
    mask_N = batch.loss_mask_BS.reshape(-1).bool()
    logits_NV = logits(hf_model, batch).flatten(0, 1)[mask_N]
    return nn.functional.cross_entropy(logits_NV.float(), batch.targets_BS.reshape(-1)[mask_N], reduction="sum")


def train(
    hf_model: nn.Module,
    steps: Iterable[Sequence[Batch]],
    *,
    optim: OptimConfig,
    lr_of_step: Callable[[int], float],
    grad_clip: float,
    keep_gradients: int = 1,
) -> Trace:
    """Trains in place, one optimizer step for each item of `steps`: all the microbatches of a global batch, in any
    order and cut in any way. `lr_of_step` takes the step from 0; `grad_clip` 0 is no clipping.
    """
    parameters = list(hf_model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=optim.lr)
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    trace = Trace()
    hf_model.train()
    for step, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_of_step(step)
        num_predicted = sum(int(batch.loss_mask_BS.sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            mean = loss_sum(hf_model, batch) / num_predicted
            mean.backward()
            loss += mean.item()
        if step < keep_gradients:
            named = hf_model.named_parameters()
            trace.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        norm = nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append(loss)
        trace.grad_norms.append(norm.item())
    trace.final_weights = {name: p.detach().clone() for name, p in hf_model.named_parameters()}
    return trace


def _require(model: ModelConfig, **wanted: object) -> None:
    have = {key: getattr(model, key) for key in wanted}
    wrong = [f"{key} is {have[key]!r}, not {value!r}" for key, value in wanted.items() if have[key] != value]
    if wrong:
        raise ValueError(f"Transformers has no such model: {'; '.join(wrong)}")


def _split_qkv(rows: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped rows [G (heads/G + 2) D, ...] into query [heads D, ...], key and value [G D, ...]."""
    per_group = model.num_attention_heads // model.num_query_groups
    grouped = rows.unflatten(0, (model.num_query_groups, per_group + 2, -1))
    q, k, v = grouped.split([per_group, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def _join_qkv(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    groups, per_group = model.num_query_groups, model.num_attention_heads // model.num_query_groups
    parts = q.unflatten(0, (groups, per_group, -1)), k.unflatten(0, (groups, 1, -1)), v.unflatten(0, (groups, 1, -1))
    return torch.cat(parts, dim=1).flatten(0, 2)


def _to_llama(name: str, tensor: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    layer = _OUR_LAYER.fullmatch(name)
    if not layer:
        stem, _, kind = name.rpartition(".")
        return {f"{_LLAMA[stem]}.{kind}": tensor}
    index, part, kind = layer.groups()
    base = f"model.layers.{index}"
    if part == "self_attention.linear_qkv":
        q, k, v = _split_qkv(tensor, model)
        return {f"{base}.self_attn.{x}_proj.{kind}": rows for x, rows in (("q", q), ("k", k), ("v", v))}
    if part == "mlp.linear_fc1":
        gate, up = tensor.chunk(2)
        return {f"{base}.mlp.gate_proj.{kind}": gate, f"{base}.mlp.up_proj.{kind}": up}
    return {f"{base}.{_LLAMA_LAYER[part]}.{kind}": tensor}


def _from_llama(name: str, rest: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Takes `name`, and what belongs into one tensor of ours with it, out of `rest`."""
    layer = _HF_LAYER.fullmatch(name)
    if not layer:
        stem, _, kind = name.rpartition(".")
        return {f"{_key(_LLAMA, stem)}.{kind}": rest.pop(name)}
    index, part, kind = layer.groups()
    base, hf = f"decoder.layers.{index}", f"model.layers.{index}"
    if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        q, k, v = (rest.pop(f"{hf}.self_attn.{x}_proj.{kind}") for x in "qkv")
        return {f"{base}.self_attention.linear_qkv.{kind}": _join_qkv(q, k, v, model)}
    if part in ("mlp.gate_proj", "mlp.up_proj"):
        halves = [rest.pop(f"{hf}.mlp.{x}_proj.{kind}") for x in ("gate", "up")]
        return {f"{base}.mlp.linear_fc1.{kind}": torch.cat(halves)}
    return {f"{base}.{_key(_LLAMA_LAYER, part)}.{kind}": rest.pop(name)}


def _to_gpt2(name: str, tensor: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    layer = _OUR_LAYER.fullmatch(name)
    if not layer:
        stem, _, kind = name.rpartition(".")
        return {f"{_GPT2[stem]}.{kind}": tensor}
    index, part, kind = layer.groups()
    base = f"transformer.h.{index}"
    if part == "self_attention.linear_qkv":
        part, tensor = "attn.c_attn", torch.cat(_split_qkv(tensor, model))
    else:
        part = _GPT2_LAYER[part]
    # GPT-2's Conv1D keeps its weight as [in, out].
    return {f"{base}.{part}.{kind}": tensor.t() if tensor.ndim == 2 else tensor}


def _from_gpt2(name: str, rest: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    layer = _HF_LAYER.fullmatch(name)
    tensor = rest.pop(name)
    if not layer:
        stem, _, kind = name.rpartition(".")
        return {f"{_key(_GPT2, stem)}.{kind}": tensor}
    index, part, kind = layer.groups()
    rows = tensor.t() if tensor.ndim == 2 else tensor
    if part == "attn.c_attn":
        q, k, v = rows.chunk(3)
        return {f"decoder.layers.{index}.self_attention.linear_qkv.{kind}": _join_qkv(q, k, v, model)}
    return {f"decoder.layers.{index}.{_key(_GPT2_LAYER, part)}.{kind}": rows}


def _key(table: Mapping[str, str], value: str) -> str:
    for key, candidate in table.items():
        if candidate == value:
            return key
    raise KeyError(value)
