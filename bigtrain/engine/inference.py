"""A model of any layout in memory, to be asked: what comes next, and how likely is this.

On one process, or tensor-parallel: each rank reads and holds its part of every weight. No DeepSpeed, no gradients.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from bigtrain.checkpoint.slices import Fragment
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from bigtrain.data.loader import Microbatch
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.distributed.rng import derive
from bigtrain.distributed.start import Runtime, start
from bigtrain.engine.engine import LossSum
from bigtrain.engine.open_model import OpenModel
from bigtrain.model.attention import boundaries_of
from bigtrain.model.build import VOCABULARY, Decoder, build, shards_of
from bigtrain.model.cache import KeyValueCache
from bigtrain.model.sampling import choose
from bigtrain.topology import Topology


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked."""

    decoder: Decoder
    """The whole of it, or of every weight what this tensor rank holds."""
    tokenizer: Tokenizer
    model: ModelConfig
    step: int
    runtime: Runtime

    @property
    def device(self) -> torch.device:
        return self.runtime.device


def load(opened: OpenModel, *, tensor: int = 1, device: str = "auto", dtype: str = "fp32") -> Loaded:
    """The model with its weights in `dtype`. `tensor`: ranks that share each weight; what is left of the world are data
    ranks. Collective. Raises UserError where the checkpoint is damaged.

    A vocabulary that the ranks do not divide is padded; padding, this or what the model came with, is never chosen and
    takes nothing from the probability of tokens."""
    config = Config(
        model=opened.padded(tensor),
        parallel=ParallelConfig(tensor=tensor, zero_stage=0),
        precision=PrecisionConfig(dtype=dtype),
    )
    runtime = start(replace(config, cluster=replace(config.cluster, device=device)))
    (decoder,) = build(config, runtime)
    decoder.to(runtime.device).eval()
    opened.read(list(_fragments(decoder, runtime.topology, opened.model)))
    if opened.num_tokens < config.model.vocab_size:
        decoder.num_tokens = opened.num_tokens
    return Loaded(decoder, opened.tokenizer, opened.model, opened.step, runtime)


def _fragments(decoder: Decoder, topology: Topology, model: ModelConfig) -> Iterator[Fragment]:
    """This rank's weights; of a vocabulary that was padded the rows that `model` has. The others become 0. Each
    element is owned by one rank, so that the whole of a weight is checked once."""
    for shard, parameter in shards_of(decoder, topology):
        flat = parameter.data.view(-1)
        if shard.name in VOCABULARY and shard.global_shape[0] > model.vocab_size:
            shard = shard.first_rows(model.vocab_size)
            flat[shard.numel :] = 0.0
            flat = flat[: shard.numel]
        owned = topology.data_rank == 0 and (shard.dim is not None or topology.tensor_rank == 0)
        yield Fragment(shard, 0, {"weight": flat}, owned)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: see `bigtrain.model.sampling.choose`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Text:
    """A text that goes on."""

    prompt: list[int]
    """Its tokens, the begin of the document first."""
    generator: torch.Generator
    ids: list[int] = field(default_factory=list[int])
    """What was added; without the end of the document."""
    ended: str = ""
    """Why it ended: eos (so the model chose), max_tokens, positions (the model has no more), stop (see `go_on`)."""

    @staticmethod
    def of(prompt: Sequence[int], *, seed: int, number: int) -> Text:
        """`number`: place among the prompts. What is drawn depends on it and on the seed, not on the other prompts."""
        return Text(list(prompt), torch.Generator().manual_seed(derive(seed, "text", number)))

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)


@torch.inference_mode()
def go_on(
    loaded: Loaded, texts: Sequence[Text], *, max_tokens: int, sampling: Sampling, use_cache: bool = True
) -> Iterator[list[Text]]:
    """Let all texts go on together, a token each at a time, until each has ended; yields after each token those that
    got one. A text that has `ended` set by the caller is dropped. Every prompt fits into the model's positions.

    Without the cache, all is read again for each token: to compare with. Collective; the ranks choose alike."""
    running = list(texts)
    if use_cache:
        capacity = min(loaded.model.max_positions, max(text.length for text in running) + max_tokens)
        cache = KeyValueCache(capacity)
    else:
        cache = None
    while running:
        logits_BV = _next_logits(loaded, running, cache)[:, : loaded.tokenizer.vocab_size]
        chosen_B = choose(
            logits_BV,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            generators=[text.generator for text in running],
        )
        if loaded.runtime.topology.tensor > 1:  # equal but for rounding; the first rank decides
            dist.broadcast(chosen_B, src=0)
        for text, token in zip(running, chosen_B.tolist(), strict=True):
            _add(text, token, loaded, max_tokens)
        yield [text for text in running if text.ended != "eos"]
        rows = [row for row, text in enumerate(running) if not text.ended]
        if cache is not None and len(rows) < len(running):
            cache.keep(torch.tensor(rows, dtype=torch.long, device=loaded.device))
        running = [running[row] for row in rows]


def _add(text: Text, token: int, loaded: Loaded, max_tokens: int) -> None:
    if token == loaded.tokenizer.eos_id:
        text.ended = "eos"
        return
    text.ids.append(token)
    if len(text.ids) >= max_tokens:
        text.ended = "max_tokens"
    elif text.length > loaded.model.max_positions:
        text.ended = "positions"


def _next_logits(loaded: Loaded, texts: Sequence[Text], cache: KeyValueCache | None) -> torch.Tensor:
    """fp32 [B, V], of the token behind each text."""
    last = [text.length - 1 for text in texts]
    if cache is not None and not cache.is_empty:
        ids = [[text.ids[-1]] for text in texts]
        positions, places = [[place] for place in last], [0] * len(texts)
    else:
        width = max(last) + 1
        ids = [(text.prompt + text.ids) + [0] * (width - text.length) for text in texts]
        positions, places = [list(range(width))] * len(texts), last
    tokens_BS, positions_BS = (torch.tensor(rows, device=loaded.device) for rows in (ids, positions))
    hidden_SBH = loaded.decoder.hidden(tokens_BS, positions_BS, cache)
    rows_B = torch.arange(len(texts), device=loaded.device)
    return loaded.decoder.logits(hidden_SBH[torch.tensor(places, device=loaded.device), rows_B])


class Clock:
    """Tokens a second of `go_on`."""

    def __init__(self) -> None:
        self._begin, self.num_tokens = time.perf_counter(), 0

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._begin
        return f"{self.num_tokens:,} tokens in {seconds:.1f} s, {self.num_tokens / max(seconds, 1e-9):,.0f} tokens/s"


class Scorer:
    """The loss of held-out batches, as `Engine.evaluate` has it."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.runtime = loaded, loaded.runtime

    @torch.inference_mode()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """Over all data ranks. Collective."""
        device, group = self.runtime.device, self.runtime.groups.dp
        nats = torch.zeros((), device=device)
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        for batch in microbatches:
            boundaries = None if batch.single_document else boundaries_of(batch.documents_BS).to(device)
            losses_BS = self.loaded.decoder(
                batch.tokens_BS.to(device),
                batch.positions_BS.to(device),
                boundaries,
                labels=batch.targets_BS.to(device),
            )
            mask_BS = batch.loss_mask_BS.to(device)
            nats += (losses_BS.float() * mask_BS).sum()
            tokens += mask_BS.sum()
        return LossSum(self.runtime.all_reduce(nats, group=group), self.runtime.all_reduce(tokens, group=group))
