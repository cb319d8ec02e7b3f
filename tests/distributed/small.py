"""A model, a config and batches that are small enough for eight ranks on two cores, and the run of them on a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from bigtrain.config.schema import (
    ClusterConfig,
    Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
)
from bigtrain.data.microbatch import Microbatch

Pieces = list[tuple[str, torch.Size, tuple[int, ...], torch.Tensor]]
"""(name, global shape, offsets, values) of rectangles of global tensors."""

LLAMA = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=160, vocab_size=256
)
GPT2 = replace(
    LLAMA,
    num_query_groups=8,
    position="learned",
    max_positions=64,
    norm="layernorm",
    activation="gelu",
    bias=True,
    tie_embeddings=True,
)
SEQUENCE, GLOBAL_BATCH, MICRO_BATCH = 48, 8, 2


def config(model: ModelConfig = LLAMA, *, dtype: str = "fp32", recompute: str = "none", **parallel: Any) -> Config:
    return Config(
        model=model,
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(dtype=dtype),
        train=TrainConfig(
            num_steps=20,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=MICRO_BATCH,
            sequence_length=SEQUENCE,
            recompute=recompute,
        ),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=5),
        cluster=ClusterConfig(device="cpu"),
    )


def global_batch(step: int, vocab_size: int = LLAMA.vocab_size) -> list[Microbatch]:
    """The same batch for every layout, of the small sizes."""
    return packed_batch(1000 + step, vocab_size, GLOBAL_BATCH, MICRO_BATCH, SEQUENCE)


def packed_batch(seed: int, vocab_size: int, size: int, micro_size: int, length: int) -> list[Microbatch]:
    """`size` sequences of `length` tokens as microbatches of `micro_size`: packed documents of random length (the first
    sequence is a single one), with structure to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, max(vocab_size // 4, 2), (size, length + 1), generator=generator).cumsum(1) % vocab_size
    starts = torch.rand(size, length + 1, generator=generator) < 2.4 / length
    starts[:, 0] = True
    starts[0, 1:] = False
    return [
        Microbatch(
            tokens_BS=rows[part, :-1],
            targets_BS=rows[part, 1:],
            starts_B=[row.nonzero().flatten().tolist() for row in starts[part]],
            num_tokens_B=[length + 1] * micro_size,
        )
        for part in (slice(i, i + micro_size) for i in range(0, size, micro_size))
    ]


def without_clipping(config: Config) -> Config:
    """So that gradients are seen in the bits that they were summed in."""
    return replace(config, train=replace(config.train, grad_clip=0.0))


@dataclass(frozen=True)
class Trained:
    """What one rank saw of a run."""

    losses: list[float]
    grad_norms: list[float]
    initial: Pieces
    """Of the initial weights."""
    gradients: Pieces
    """Of the first step's, before clipping."""


def train(config: Config, num_steps: int) -> Trained:
    """Run on a rank: `num_steps` steps of the small batches."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine
    from bigtrain.optim.schedule import share_of_peak

    runtime = start(config)
    engine = Engine(config, runtime)
    initial = pieces(state.fragments(engine), "weight")
    losses, norms, gradients = [], [], []
    for step in range(num_steps):
        lr = config.optim.lr * share_of_peak(step, config.train.num_steps, config.schedule)
        mine = share_of(global_batch(step), runtime.topology)
        loss = engine.forward_backward(mine)
        if step == 0:
            with state.gradients_of_next_step(engine) as found:
                norms.append(engine.optimizer_step(lr))
            gradients = pieces(found, "grad")
        else:
            norms.append(engine.optimizer_step(lr))
        losses.append(loss.mean.item())
    return Trained(losses, norms, initial, gradients)


def take_steps(engine: Any, first: int, count: int) -> list[float]:
    """On a rank: so many steps of the small batches from number `first` on, and their losses."""
    losses = []
    for step in range(first, first + count):
        loss = engine.forward_backward(share_of(global_batch(step), engine.runtime.topology))
        engine.optimizer_step(1e-3)
        losses.append(loss.mean.item())
    return losses


def share_of(microbatches: list[Microbatch], topology: Any) -> list[Microbatch]:
    return microbatches[topology.data_rank :: topology.data]


def pieces(fragments: Any, kind: str) -> Pieces:
    """The rectangles that this rank owns, copied."""
    from bigtrain.checkpoint.slices import GlobalTensor

    found = []
    for fragment in fragments:
        flat = fragment.tensors[kind]
        if fragment.owned and flat.numel():
            whole = GlobalTensor.of(fragment.shard, fragment.start, flat)
            found += [(fragment.shard.name, whole.shape, at, chunk.clone()) for at, chunk in whole.chunks.items()]
    return found


def assemble(ranks: list[Pieces]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks. Every element must be written exactly once."""
    wholes: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    for name, shape, at, values in (piece for pieces in ranks for piece in pieces):
        place = tuple(slice(o, o + n) for o, n in zip(at, values.shape, strict=True))
        wholes.setdefault(name, torch.zeros(shape))[place] = values
        written.setdefault(name, torch.zeros(shape, dtype=torch.int))[place] += 1
    for name, count in written.items():
        assert bool((count == 1).all()), f"{name}: elements written {count.min()} to {count.max()} times"
    return wholes
