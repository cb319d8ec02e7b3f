"""A model's settings as Transformers' config.json, and back. Pure.

Llama: rotary positions, RMSNorm, SwiGLU, any groups, biases everywhere or nowhere. GPT-2: learned positions, LayerNorm,
GELU (tanh), biases. What one side has and the other has not is refused by name: nothing is dropped silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig

Json = Mapping[str, Any]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Transformers' names of precision.dtype."""

_LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu"}
_GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True}
# Fields of config.json that do not change what the model computes from tokens.
_HARMLESS = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "chunk_size_feed_forward", "return_dict"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "output_attentions", "output_hidden_states"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "name_or_path", "torchscript"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("gradient_checkpointing", "n_ctx", "tokenizer_class"),
}


def architecture(model: ModelConfig) -> Literal["llama", "gpt2"]:
    """Raises UserError for a model that is neither, with the settings that have no counterpart."""
    name, wanted = ("Llama", _LLAMA) if model.position == "rope" else ("GPT-2", _GPT2)
    other = [
        f"model.{key}={_text(getattr(model, key))}" for key, value in wanted.items() if getattr(model, key) != value
    ]
    if name == "GPT-2" and model.num_query_groups != model.num_attention_heads:
        other.append(f"model.num_query_groups={model.num_query_groups} with {model.num_attention_heads} heads")
    if other:
        has = ", ".join(f"{key}={_text(value)}" for key, value in wanted.items())
        raise UserError(
            f"{' and '.join(other)}: no counterpart in Transformers. With model.position={model.position} it is "
            f"{name}, which has {has}{', and as many groups as heads' if name == 'GPT-2' else ''}."
        )
    return "llama" if name == "Llama" else "gpt2"


def to_theirs(
    model: ModelConfig, *, dtype: str, vocab_size: int, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The config.json of LlamaForCausalLM or GPT2LMHeadModel. `dtype`: fp32, bf16 or fp16. Raises UserError for a model
    that is neither."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": DTYPES[dtype],  # Transformers 5 calls it dtype, and reads this
        "use_cache": True,
    }
    if architecture(model) == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "head_dim": model.hidden_size // model.num_attention_heads,
            "max_position_embeddings": model.max_positions,
            "rope_theta": model.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": model.norm_eps,
            "hidden_act": "silu",
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
            "attention_dropout": model.attention_dropout,
            **common,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new",
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        **common,
    }


def lost_in_theirs(model: ModelConfig) -> list[str]:
    """Settings that only matter in training, and that Transformers' model has not: a line each for the user."""
    if model.position == "rope" and model.hidden_dropout:
        return [f"model.hidden_dropout={model.hidden_dropout}: Llama has none, so training goes on without it there"]
    return []


def from_theirs(config: object, where: str) -> ModelConfig:
    """Our settings of a config.json, `where` it is. Raises UserError for what is no model of ours, by field."""
    if not isinstance(config, dict):
        raise UserError(f"{where}: it is no JSON object")
    fields = _Fields(cast("dict[str, Any]", config), where)
    kind = fields.take("model_type", None)
    if kind not in ("llama", "gpt2"):
        raise fields.refuse("model_type", kind, "llama and gpt2 can be read")
    model = _from_llama(fields) if kind == "llama" else _from_gpt2(fields)
    fields.refuse_the_rest()
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"{where}: {model.num_attention_heads} attention heads do not divide the hidden size {model.hidden_size}"
        )
    if model.num_attention_heads % model.num_query_groups:
        raise UserError(
            f"{where}: {model.num_query_groups} key and value heads do not divide {model.num_attention_heads} heads"
        )
    return model


def _from_llama(fields: _Fields) -> ModelConfig:
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    bias = fields.flag("attention_bias", False)
    if fields.flag("mlp_bias", False) != bias:
        raise fields.refuse(
            "attention_bias", bias, f"mlp_bias is {_text(not bias)}; bigtrain has biases everywhere or nowhere"
        )
    fields.only("head_dim", hidden // heads, "hidden_size / num_attention_heads", optional=True)
    fields.only("hidden_act", "silu", "SwiGLU", optional=True)
    return ModelConfig(
        name="imported",
        num_layers=fields.count("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=fields.count("num_key_value_heads", heads),
        ffn_hidden_size=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        position="rope",
        max_positions=fields.count("max_position_embeddings", 2048),
        rope_theta=_rope_theta(fields),
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation="swiglu",
        bias=bias,
        attention_dropout=fields.number("attention_dropout", 0.0),
        init_std=fields.number("initializer_range", 0.02),
    )


def _rope_theta(fields: _Fields) -> float:
    """Transformers 5 has rope_parameters, older ones rope_theta and rope_scaling."""
    theta = fields.number("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.take(name, None)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.refuse(name, rope, "it takes an object")
        rest = dict(cast("dict[str, Any]", rope))
        kinds = {rest.pop("rope_type", "default"), rest.pop("type", "default")}
        theta = _number(rest.pop("rope_theta", theta), name, fields)
        if kinds != {"default"} or rest:
            raise fields.refuse(name, rope, "bigtrain has plain rotary positions, without scaling")
    return theta


def _from_gpt2(fields: _Fields) -> ModelConfig:
    heads, hidden = fields.count("n_head"), fields.count("n_embd")
    fields.only("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "GELU by tanh", optional=True)
    fields.only("scale_attn_weights", True, "scaled attention", optional=True)
    dropout = fields.number("resid_pdrop", 0.1)
    fields.only("embd_pdrop", dropout, "resid_pdrop: bigtrain has one hidden_dropout", default=0.1)
    return ModelConfig(
        name="imported",
        num_layers=fields.count("n_layer"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        ffn_hidden_size=fields.count("n_inner", 4 * hidden),
        vocab_size=fields.count("vocab_size"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        position="learned",
        max_positions=fields.count("n_positions", 1024),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation="gelu",
        bias=True,
        attention_dropout=fields.number("attn_pdrop", 0.1),
        hidden_dropout=dropout,
        init_std=fields.number("initializer_range", 0.02),
    )


class _Fields:
    """The fields of a config.json, each taken once."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._rest, self._where = dict(config), where

    def take(self, name: str, default: Any) -> Any:
        """null counts as not there."""
        value = self._rest.pop(name, None)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.take(name, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.refuse(name, value, "it takes a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        return _number(self.take(name, default), name, self)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "it takes true or false")
        return value

    def only(self, name: str, wanted: Any, words: str, *, optional: bool = False, default: Any = None) -> None:
        """`wanted` is the value, or a tuple of values, that bigtrain has."""
        allowed: tuple[Any, ...] = cast("tuple[Any, ...]", wanted) if isinstance(wanted, tuple) else (wanted,)
        value = self.take(name, allowed[0] if optional else default)
        if value not in allowed:
            has = " or ".join(_text(each) for each in allowed)
            raise self.refuse(name, value, f"bigtrain has {has} only ({words})")

    def refuse(self, name: str, value: Any, why: str) -> UserError:
        return UserError(f"{self._where}: {name}={_text(value)!s:.200}: {why}")

    def refuse_the_rest(self) -> None:
        """What is off or empty asks for nothing."""
        for name, value in self._rest.items():
            if name not in _HARMLESS and value not in (None, False, 0, "", [], {}):
                raise self.refuse(name, value, "bigtrain has no such setting")


def _number(value: Any, name: str, fields: _Fields) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise fields.refuse(name, value, "it takes a number from 0 on")
    return float(value)


def _text(value: Any) -> str:
    """As in JSON and YAML."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
