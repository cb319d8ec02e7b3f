"""What a rank runs for the certificate, and the batches that all of them are given."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from bigtrain.config.schema import Config
from bigtrain.data.microbatch import Microbatch
from tests.distributed.small import Pieces, packed_batch, pieces


@dataclass(frozen=True)
class Run:
    """What one rank saw; pieces of tensors are those that it owns."""

    losses: list[float]
    grad_norms: list[float]
    initial: Pieces
    gradients: list[Pieces]
    """Of each of the first steps, before clipping; none of a step that was skipped for an overflow."""
    final: Pieces


def train(config: Config, steps: int, keep_gradients: int) -> Run:
    """On a rank: `steps` steps at a constant learning rate; the gradients of the first `keep_gradients`."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    topology = engine.runtime.topology
    initial = pieces(state.fragments(engine), "weight")
    losses: list[float] = []
    norms: list[float] = []
    gradients: list[Pieces] = []
    for step in range(steps):
        loss = engine.forward_backward(global_batch(config, step)[topology.data_rank :: topology.data])
        with state.gradients_of_next_step(engine) if step < keep_gradients else nullcontext() as found:
            norms.append(engine.optimizer_step(config.optim.lr))
        if found is not None:
            gradients.append(pieces(found, "grad"))
        losses.append(loss.mean.item())
    return Run(losses, norms, initial, gradients, pieces(state.fragments(engine), "weight"))


def other_document_shows(config: Config) -> bool:
    """On one rank: do the logits of a row's second document change, in any bit, with the tokens of its first?"""
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine
    from bigtrain.model.attention import boundaries_of

    engine = Engine(config, start(config))
    length = config.train.sequence_length
    half = length // 2
    tokens = torch.randint(config.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(7))
    documents = (torch.arange(length) >= half).long()[None]
    positions = torch.cat([torch.arange(half), torch.arange(length - half)])[None]
    perturbed = tokens.clone()
    perturbed[:, :half] = (perturbed[:, :half] + 1) % config.model.vocab_size
    with torch.no_grad():
        first, second = (
            engine.chunks[0](rows, positions, boundaries_of(documents))[:, half:] for rows in (tokens, perturbed)
        )
    return not torch.equal(first, second)


def global_batch(config: Config, step: int) -> list[Microbatch]:
    """The same for every layout, in the config's sizes."""
    train = config.train
    return packed_batch(
        config.run.seed + step,
        config.model.vocab_size,
        train.global_batch_size,
        train.micro_batch_size,
        train.sequence_length,
    )
