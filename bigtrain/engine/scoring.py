"""How likely a model holds given continuations, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bigtrain.engine.inference import Loaded


@dataclass(frozen=True)
class Score:
    """Of the tokens that a context was continued with."""

    log_likelihood: float
    """In nats, of all of them together."""
    is_greedy: bool
    """The model would have chosen each of them."""


@torch.inference_mode()
def score(loaded: Loaded, pairs: Sequence[tuple[list[int], list[int]]], *, batch_size: int) -> list[Score]:
    """The scores of pairs (context, continuation) of token ids, in their order. A context has one token or more; both
    together but the last token fit into the model's positions. Collective."""
    found: dict[int, Score] = {}
    longest_first = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
    for first in range(0, len(pairs), batch_size):
        numbers = longest_first[first : first + batch_size]
        found.update(zip(numbers, _score(loaded, [pairs[number] for number in numbers]), strict=True))
    return [found[number] for number in range(len(pairs))]


def _score(loaded: Loaded, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    read = [(context + continuation)[:-1] for context, continuation in pairs]
    width = max(map(len, read))
    tokens_BS = torch.tensor([ids + [0] * (width - len(ids)) for ids in read], device=loaded.device)
    positions_BS = torch.arange(width, device=loaded.device).expand_as(tokens_BS)
    hidden_SBH = loaded.decoder.hidden(tokens_BS, positions_BS)  # padding stands behind: nothing sees it
    scores: list[Score] = []
    for row, (context, continuation) in enumerate(pairs):
        hidden_NH = hidden_SBH[len(context) - 1 : len(context) - 1 + len(continuation), row]
        logs_NV = loaded.decoder.logits(hidden_NH)[:, : loaded.model.vocab_size].log_softmax(dim=-1)
        wanted_N = torch.tensor(continuation, dtype=torch.long, device=loaded.device)
        total = logs_NV.gather(1, wanted_N[:, None]).double().sum().item()
        scores.append(Score(total, bool((logs_NV.argmax(dim=-1) == wanted_N).all())))
    return scores
