"""What follows from a config: parameters, batches, bytes and FLOPs. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.config.schema import Config, ModelConfig, TrainConfig

BYTES_OF_DTYPE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by what tensor parallelism does with them."""

    sharded: int
    """Split over the tensor ranks: embedding, output layer, linear weights and the biases of column-parallel layers."""
    replicated: int
    """Whole on every tensor rank: norms, positions, biases of row-parallel layers."""

    @property
    def total(self) -> int:
        return self.sharded + self.replicated

    def per_rank(self, tensor: int) -> int:
        return self.sharded // tensor + self.replicated


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the model, each shared tensor once."""
    return parameter_count(model).total


def parameter_count(model: ModelConfig) -> ParameterCount:
    """The parameters of `model`, exactly, split by what tensor parallelism shards."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    first_ffn = 2 * ffn if model.activation == "swiglu" else ffn
    norm = 2 * hidden if model.norm == "layernorm" else hidden

    layer_sharded = hidden * (hidden + 2 * key_value) + hidden * hidden + hidden * first_ffn + ffn * hidden
    layer_replicated = 2 * norm
    if model.bias:
        layer_sharded += hidden + 2 * key_value + first_ffn
        layer_replicated += 2 * hidden
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    positions = model.max_positions * hidden if model.position == "learned" else 0
    return ParameterCount(
        sharded=model.num_layers * layer_sharded + embeddings,
        replicated=model.num_layers * layer_replicated + norm + positions,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating point operations a token, forward and backward (twice the forward), without recompute.

    The convention of PaLM (https://arxiv.org/abs/2204.02311, appendix B): 6 for each weight that a token is multiplied
    with (the output layer is one, the embedding is a look-up) plus 12 x layers x hidden x sequence for the attention
    scores, counted in full although half of them are masked.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    feed_forward = (3 if model.activation == "swiglu" else 2) * hidden * ffn
    layer = hidden * (hidden + 2 * key_value) + hidden * hidden + feed_forward
    weights = model.num_layers * layer + model.vocab_size * hidden
    return 6 * weights + 12 * model.num_layers * hidden * sequence_length


def tokens_per_step(train: TrainConfig) -> int:
    """Tokens in a global batch."""
    return train.global_batch_size * train.sequence_length


def num_steps(train: TrainConfig) -> int:
    """Optimizer steps: train.num_steps, or what train.num_tokens takes, rounded up."""
    if train.num_tokens is None:
        return train.num_steps
    return -(-train.num_tokens // tokens_per_step(train))


def world_size(config: Config) -> int:
    """Ranks, once cluster.procs_per_node is resolved."""
    return config.cluster.num_nodes * config.cluster.procs_per_node


@dataclass(frozen=True)
class Derived:
    """Every number that follows from a config on a world of ranks."""

    world: int
    tensor: int
    pipeline: int
    data: int
    num_parameters: int
    model_bytes: int
    """Weights in the training dtype, whole model."""
    num_tokens_per_microbatch: int
    num_microbatches: int
    """Microbatches a rank a step: the gradient accumulation."""
    num_tokens_per_step: int
    num_steps: int
    num_tokens: int
    weight_bytes_per_rank: int
    gradient_bytes_per_rank: int
    optimizer_bytes_per_rank: int
    flops_per_token: int


def derive(config: Config, world: int) -> Derived:
    """The derived numbers of a config that `check` finds nothing wrong with.

    Bytes are those of the states that live from step to step (https://arxiv.org/abs/1910.02054, section 3.1), not of
    activations and buffers: weights in precision.dtype, gradients in fp32, fp32 master weights and two moments.
    """
    model, train, parallel = config.model, config.train, config.parallel
    data = world // (parallel.tensor * parallel.pipeline)
    on_rank = -(-parameter_count(model).per_rank(parallel.tensor) // parallel.pipeline)
    element = BYTES_OF_DTYPE[config.precision.dtype]
    shard = -(-on_rank // data)
    return Derived(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        num_parameters=count_parameters(model),
        model_bytes=count_parameters(model) * element,
        num_tokens_per_microbatch=train.micro_batch_size * train.sequence_length,
        num_microbatches=train.global_batch_size // (train.micro_batch_size * data),
        num_tokens_per_step=tokens_per_step(train),
        num_steps=num_steps(train),
        num_tokens=num_steps(train) * tokens_per_step(train),
        weight_bytes_per_rank=element * (shard if parallel.zero_stage >= 3 else on_rank),
        gradient_bytes_per_rank=4 * (shard if parallel.zero_stage >= 2 else on_rank),
        optimizer_bytes_per_rank=12 * (shard if parallel.zero_stage >= 1 else on_rank),
        flops_per_token=flops_per_token(model, train.sequence_length),
    )


def describe(derived: Derived) -> list[str]:
    """One line a number, with its unit: what a reader checks before step 0."""
    d = derived
    rows = [
        ("layout", f"{d.world} ranks = tensor {d.tensor} x pipeline {d.pipeline} x data {d.data}"),
        ("parameters", f"{d.num_parameters:,} ({d.num_parameters / 1e6:,.1f} M)"),
        ("model", f"{_size(d.model_bytes)} of weights"),
        ("tokens a microbatch", f"{d.num_tokens_per_microbatch:,} tokens a rank"),
        ("accumulation", f"{d.num_microbatches:,} microbatches a rank a step"),
        ("tokens a step", f"{d.num_tokens_per_step:,} tokens"),
        ("steps", f"{d.num_steps:,} steps"),
        ("tokens in total", f"{d.num_tokens:,} tokens"),
        ("weights", f"{_size(d.weight_bytes_per_rank)} a rank"),
        ("gradients", f"{_size(d.gradient_bytes_per_rank)} a rank"),
        ("optimizer", f"{_size(d.optimizer_bytes_per_rank)} a rank"),
        (
            "compute",
            f"{d.flops_per_token / 1e9:,.3f} GFLOP a token, {d.flops_per_token * d.num_tokens:.3g} FLOP in all",
        ),
    ]
    return [f"{name:<20} {value}" for name, value in rows]


def _size(count: int) -> str:
    """Bytes with the unit that a person would choose, and exactly."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit} ({count:,} bytes)" if unit != "B" else f"{count} bytes"
        size /= 1024
    return f"{size:,.1f} TiB ({count:,} bytes)"
