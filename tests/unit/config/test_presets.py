"""Every model preset is a real transformer with its true number of parameters and FLOPs: the figures by hand, and
Transformers' own model of that shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bigtrain.config.check import check
from bigtrain.config.compose import presets
from bigtrain.config.derive import (
    StateBytes,
    count_parameters,
    derive,
    flops_per_token,
    num_steps,
    parameter_count,
    state_bytes,
)
from bigtrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig, TrainConfig

# GPT: 12 L h^2 + 13 L h (biases and norms) + (50304 + 2048) h (embeddings) + 2 h (last norm).
# Llama 3's are Meta's published figures. tiny: 2 x 4096 x 256 + 6 x (3 x 256^2 + 3 x 256 x 704 + 2 x 256) + 256.
TRUE_PARAMETERS = {
    "tiny": 6_524_160,
    "gpt_125m": 125_262_336,
    "gpt_350m": 355_919_872,
    "gpt_760m": 760_372_224,
    "gpt_1b": 1_315_819_520,
    "gpt_3b": 2_651_673_600,
    "gpt_7b": 6_658_596_864,
    "gpt_13b": 12_853_626_880,
    "gpt_30b": 29_974_755_328,
    "gpt_70b": 64_861_913_088,
    "gpt_175b": 174_604_836_864,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
}


EAGER: dict[str, Any] = {"attn_implementation": "eager"}
"""Attention as matrix products that torch's counter sees."""


def preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(presets("model")[name].read_text(encoding="utf-8").replace("1e-5", "1.0e-5")))


def transformers_model(model: ModelConfig, device: str = "meta") -> Any:
    """The same shape, built by Transformers, by default without memory."""
    with torch.device(device):
        if model.position == "rope":
            return LlamaForCausalLM(
                LlamaConfig(
                    num_hidden_layers=model.num_layers,
                    hidden_size=model.hidden_size,
                    num_attention_heads=model.num_attention_heads,
                    num_key_value_heads=model.num_query_groups,
                    intermediate_size=model.ffn_hidden_size,
                    vocab_size=model.vocab_size,
                    tie_word_embeddings=model.tie_embeddings,
                    **EAGER,
                )
            )
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=model.num_layers,
                n_embd=model.hidden_size,
                n_head=model.num_attention_heads,
                n_inner=model.ffn_hidden_size,
                vocab_size=model.vocab_size,
                n_positions=model.max_positions,
                tie_word_embeddings=model.tie_embeddings,
                **EAGER,
            )
        )


def test_every_preset_has_a_true_figure() -> None:
    assert set(presets("model")) == set(TRUE_PARAMETERS)


@pytest.mark.parametrize("name", TRUE_PARAMETERS)
def test_parameters(name: str) -> None:
    model = preset(name)
    theirs = transformers_model(model)
    assert count_parameters(model) == TRUE_PARAMETERS[name]
    assert count_parameters(model) == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", TRUE_PARAMETERS)
def test_preset_is_sound_and_says_its_source(name: str) -> None:
    model = preset(name)
    text = presets("model")[name].read_text(encoding="utf-8")
    assert model.name == name
    assert name == "tiny" or "https://arxiv.org/abs/" in text
    assert [problem for problem in check(Config(model=model), 1) if problem.key.startswith("model.")] == []


@pytest.mark.parametrize("name", ["tiny", "gpt_125m"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model, batch, length = dataclasses.replace(preset(name), num_layers=2), 2, 32
    theirs = transformers_model(model, "cpu")
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros((batch, length), dtype=torch.long), use_cache=False)
    # The rotary angles are a matrix product in Transformers and no arithmetic of the model: under 0.1 %.
    assert flops_per_token(model, length) * batch * length == pytest.approx(3 * counter.get_total_flops(), rel=1e-3)


def test_tensor_ranks_hold_the_whole_model_between_them() -> None:
    for name in TRUE_PARAMETERS:
        count = parameter_count(preset(name))
        tensor = 4
        assert tensor * count.per_rank(tensor) == count.total + (tensor - 1) * count.replicated


def test_derived_numbers() -> None:
    config = Config(
        parallel=ParallelConfig(tensor=2, zero_stage=3),
        train=TrainConfig(global_batch_size=24, micro_batch_size=4, sequence_length=256, num_steps=10),
    )
    derived = derive(config, 4)
    assert (derived.data, derived.num_microbatches) == (2, 3)
    assert (derived.num_tokens_per_microbatch, derived.num_tokens_per_step, derived.num_tokens) == (1024, 6144, 61440)
    # tiny: norms (13 x 256) are whole on both tensor ranks, the rest is halved, then halved again over the data ranks.
    on_tensor_rank = (6_524_160 - 13 * 256) // 2 + 13 * 256
    assert derived.weight_bytes_per_rank == 4 * on_tensor_rank // 2
    assert derived.gathered_bytes_per_rank == 4 * on_tensor_rank
    assert derived.gradient_bytes_per_rank == 4 * on_tensor_rank // 2
    assert derived.optimizer_bytes_per_rank == 12 * on_tensor_rank // 2


@pytest.mark.parametrize(
    ("dtype", "stage", "weights", "gathered", "gradients", "kept", "optimizer"),
    [
        ("fp32", 0, 16, 0, 16, 0, 48),
        ("fp32", 1, 16, 0, 16, 0, 12),
        ("fp32", 2, 16, 0, 4, 0, 12),
        ("fp32", 3, 4, 16, 4, 4, 12),
        ("bf16", 0, 8, 0, 24, 16, 48),
        ("bf16", 1, 8, 0, 24, 16, 12),
        ("bf16", 2, 8, 0, 4, 0, 12),
        ("bf16", 3, 2, 8, 4, 4, 12),
        ("fp16", 1, 8, 0, 16, 0, 12),
    ],
)
def test_zero_stage_shards_what_it_says(
    dtype: str, stage: int, weights: int, gathered: int, gradients: int, kept: int, optimizer: int
) -> None:
    """In bytes for every four weights, on four ranks."""
    config = Config(parallel=ParallelConfig(zero_stage=stage), precision=PrecisionConfig(dtype))
    quarter = count_parameters(config.model) // 4
    bytes_of_states = (weights, gathered, gradients, kept, optimizer)
    assert state_bytes(config, 4) == [StateBytes(*(quarter * each for each in bytes_of_states))]


def test_each_stage_has_its_own_bytes_and_the_fullest_counts() -> None:
    """tiny, tied: an embedding and three layers on either stage, and the last norm."""
    model = dataclasses.replace(preset("tiny"), tie_embeddings=True)
    config = Config(model=model, parallel=ParallelConfig(pipeline=2, zero_stage=3, gather="microbatch"))
    config = dataclasses.replace(config, optim=OptimConfig(name="sgd"))
    first = 4096 * 256 + 3 * (3 * 256**2 + 3 * 256 * 704 + 2 * 256)
    shards = (first // 2, (first + 256) // 2)
    assert state_bytes(config, 2) == [StateBytes(4 * n, 0, 4 * n, 4 * n, 4 * n) for n in shards]
    assert derive(config, 4).weight_bytes_per_rank == 4 * shards[1]


def test_tokens_set_the_steps_rounded_up() -> None:
    train = TrainConfig(global_batch_size=16, sequence_length=256)
    assert num_steps(dataclasses.replace(train, num_tokens=4096)) == 1
    assert num_steps(dataclasses.replace(train, num_tokens=4097)) == 2
