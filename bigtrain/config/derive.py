"""What follows from a config: parameters, batches, bytes and FLOPs. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig, WatchdogConfig

BYTES_OF_DTYPE = {"fp32": 4, "bf16": 2, "fp16": 2}


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

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(self.sharded + other.sharded, self.replicated + other.replicated)

    def __rmul__(self, times: int) -> ParameterCount:
        return ParameterCount(times * self.sharded, times * self.replicated)


@dataclass(frozen=True)
class ParameterParts:
    """The parameters of a model, by where a pipeline puts them."""

    layer: ParameterCount
    """One decoder layer."""
    embedding: ParameterCount
    """Word embedding: on the first stage; if tied, the last has a copy."""
    positions: ParameterCount
    """Learned positions: on the first stage."""
    final_norm: ParameterCount
    """On the last stage."""


def parameter_parts(model: ModelConfig) -> ParameterParts:
    """The parameters of each part of `model`, exactly."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    first_ffn = 2 * ffn if model.activation == "swiglu" else ffn
    norm = 2 * hidden if model.norm == "layernorm" else hidden

    sharded = hidden * (hidden + 2 * key_value) + hidden * hidden + hidden * first_ffn + ffn * hidden
    replicated = 2 * norm
    if model.bias:
        sharded += hidden + 2 * key_value + first_ffn
        replicated += 2 * hidden
    return ParameterParts(
        layer=ParameterCount(sharded, replicated),
        embedding=ParameterCount(model.vocab_size * hidden, 0),
        positions=ParameterCount(0, model.max_positions * hidden if model.position == "learned" else 0),
        final_norm=ParameterCount(0, norm),
    )


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the model, each shared tensor once."""
    return parameter_count(model).total


def parameter_count(model: ModelConfig) -> ParameterCount:
    """The parameters of the whole of `model`, exactly, split by what tensor parallelism shards."""
    parts = parameter_parts(model)
    matrices = 1 if model.tie_embeddings else 2
    return model.num_layers * parts.layer + matrices * parts.embedding + parts.positions + parts.final_norm


def layers_of_chunks(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Decoder layers of each model chunk, in the order of the model: chunk k lies on stage k % pipeline.

    The chunks are as equal as they can be in weights, the embedding counted on the first and the output layer on the
    last; each has at least one layer. Raises ValueError for fewer layers than chunks."""
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if model.num_layers < chunks:
        raise ValueError(f"{model.num_layers} layers do not fill {chunks} chunks")
    parts = parameter_parts(model)
    layers, load = [1] * chunks, [parts.layer.total] * chunks
    load[0] += parts.embedding.total + parts.positions.total
    load[-1] += parts.embedding.total + parts.final_norm.total
    for _ in range(model.num_layers - chunks):
        lightest = min(range(chunks), key=load.__getitem__)
        layers[lightest] += 1
        load[lightest] += parts.layer.total
    return tuple(layers)


def parameters_of_stages(model: ModelConfig, parallel: ParallelConfig) -> list[ParameterCount]:
    """What each pipeline stage holds. With tied embeddings the last of several stages has a copy of the first's."""
    parts, stages = parameter_parts(model), parallel.pipeline
    layers = layers_of_chunks(model, parallel)
    counts = [sum(layers[stage::stages]) * parts.layer for stage in range(stages)]
    counts[0] += parts.embedding + parts.positions
    counts[-1] += parts.final_norm
    if stages > 1 or not model.tie_embeddings:
        counts[-1] += parts.embedding
    return counts


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


def sequences_of_evaluation(config: Config) -> int:
    """Sequences that an evaluation takes of each held-out set, at most: eval.num_tokens, or eval.num_batches."""
    if config.eval.num_tokens is None:
        return config.eval.num_batches * config.train.global_batch_size
    return -(-config.eval.num_tokens // config.train.sequence_length)


def collective_timeout_s(limits: WatchdogConfig) -> float:
    """Seconds after which torch gives a collective up: behind the watchdog, whose verdict says more. A limit that grows
    is that of a phase which takes no longer than the given limits as a rule."""
    given = (limits.startup_s, limits.data_s, limits.step_s, limits.eval_s, limits.save_s)
    return max(1800.0, max(limits.factor, 1.0) * max(given) + 600.0)


def world_size(config: Config) -> int:
    """Ranks, once cluster.procs_per_node is resolved."""
    return config.cluster.num_nodes * config.cluster.procs_per_node


@dataclass(frozen=True)
class StateBytes:
    """Bytes of weights, gradients and optimizer state on each rank of a pipeline stage: docs/memory.md."""

    weights: int
    """Those that forward and backward use."""
    gathered: int
    """Of whole weights that ZeRO-3 holds beside its shards from step to step, unless parallel.gather=microbatch. With
    auto the ranks decide when they start, so this is what they may hold."""
    gradients: int
    """At the end of accumulation, before the update."""
    gradients_kept: int
    """Of those, what is still allocated after the update."""
    optimizer: int
    """fp32 master weights and moments."""


def state_bytes(config: Config, data: int) -> list[StateBytes]:
    """The formula of docs/memory.md for each pipeline stage. `data`: data ranks."""
    parallel, dtype = config.parallel, config.precision.dtype
    zero, element = parallel.zero_stage, BYTES_OF_DTYPE[dtype]
    # DeepSpeed's BF16_Optimizer adds each backward's bf16 gradients to whole fp32 ones that it never frees
    whole_in_fp32_and_bf16 = dtype == "bf16" and zero <= 1
    found: list[StateBytes] = []
    for stage in parameters_of_stages(config.model, parallel):
        whole = stage.per_rank(parallel.tensor)
        shard = -(-whole // data)
        gradients = 4 * (shard if zero >= 2 else whole)
        found.append(
            StateBytes(
                weights=element * (shard if zero >= 3 else whole),
                gathered=element * whole if zero >= 3 and parallel.gather != "microbatch" else 0,
                gradients=gradients + (element * whole if whole_in_fp32_and_bf16 else 0),
                gradients_kept=gradients if zero >= 3 or whole_in_fp32_and_bf16 else 0,
                optimizer=(4 if config.optim.name == "sgd" else 12) * (shard if zero >= 1 else whole),
            )
        )
    return found


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
    """This and the next three on the fullest pipeline stage, as in `StateBytes`."""
    gathered_bytes_per_rank: int
    gradient_bytes_per_rank: int
    optimizer_bytes_per_rank: int
    flops_per_token: int
    layers_of_chunks: tuple[int, ...]
    """In the order of the model: chunk k lies on stage k % pipeline."""


def derive(config: Config, world: int) -> Derived:
    """The derived numbers of a config that `check` finds nothing wrong with. Bytes are without activations and
    buffers."""
    model, train, parallel = config.model, config.train, config.parallel
    data = world // (parallel.tensor * parallel.pipeline)
    fullest = max(state_bytes(config, data), key=lambda stage: stage.weights + stage.gathered + stage.optimizer)
    return Derived(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        num_parameters=count_parameters(model),
        model_bytes=count_parameters(model) * BYTES_OF_DTYPE[config.precision.dtype],
        num_tokens_per_microbatch=train.micro_batch_size * train.sequence_length,
        num_microbatches=train.global_batch_size // (train.micro_batch_size * data),
        num_tokens_per_step=tokens_per_step(train),
        num_steps=num_steps(train),
        num_tokens=num_steps(train) * tokens_per_step(train),
        weight_bytes_per_rank=fullest.weights,
        gathered_bytes_per_rank=fullest.gathered,
        gradient_bytes_per_rank=fullest.gradients,
        optimizer_bytes_per_rank=fullest.optimizer,
        flops_per_token=flops_per_token(model, train.sequence_length),
        layers_of_chunks=layers_of_chunks(model, parallel),
    )


def describe(derived: Derived) -> list[str]:
    """One line a number, with its unit: what a reader checks before step 0."""
    d, gathered = derived, derived.gathered_bytes_per_rank
    stages = [d.layers_of_chunks[stage :: d.pipeline] for stage in range(d.pipeline)]
    spread = ", ".join("+".join(map(str, chunks)) for chunks in stages)
    rows = [
        ("layout", f"{d.world} ranks = tensor {d.tensor} x pipeline {d.pipeline} x data {d.data}"),
        *([("layers a stage", spread)] if d.pipeline > 1 else []),
        ("parameters", f"{d.num_parameters:,} ({d.num_parameters / 1e6:,.1f} M)"),
        ("model", f"{with_unit(d.model_bytes)} of weights"),
        ("tokens a microbatch", f"{d.num_tokens_per_microbatch:,} tokens a rank"),
        ("accumulation", f"{d.num_microbatches:,} microbatches a rank a step"),
        ("tokens a step", f"{d.num_tokens_per_step:,} tokens"),
        ("steps", f"{d.num_steps:,} steps"),
        ("tokens in total", f"{d.num_tokens:,} tokens"),
        ("weights", f"{with_unit(d.weight_bytes_per_rank)} a rank"),
        *(
            [("gathered weights", f"{with_unit(gathered)} a rank more where they are kept for a step")]
            if gathered
            else []
        ),
        ("gradients", f"{with_unit(d.gradient_bytes_per_rank)} a rank before the update"),
        ("optimizer", f"{with_unit(d.optimizer_bytes_per_rank)} a rank"),
        (
            "compute",
            f"{d.flops_per_token / 1e9:,.3f} GFLOP a token, {d.flops_per_token * d.num_tokens:.3g} FLOP in all",
        ),
    ]
    return [f"{name:<20} {value}" for name, value in rows]


def with_unit(count: int) -> str:
    """Bytes with the unit that a person would choose, and exactly."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit} ({count:,} bytes)" if unit != "B" else f"{count} bytes"
        size /= 1024
    return f"{size:,.1f} TiB ({count:,} bytes)"
