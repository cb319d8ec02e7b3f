"""Choose the next token. Pure functions of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def choose(
    logits_BV: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] = (),
) -> torch.Tensor:
    """Token ids [B] on the CPU. Temperature 0 is greedy and draws nothing; otherwise row b is drawn by its own
    generator (of the CPU, so a GPU draws alike), whatever the other rows are."""
    if temperature <= 0.0:
        return logits_BV.argmax(dim=-1).cpu()
    shares_BV = probabilities(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p).cpu()
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares_BV, generators, strict=True)]
    return torch.cat(drawn)


def probabilities(logits_BV: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """What to draw from, fp32 [B, V]: the softmax at `temperature` over 0, of the `top_k` likeliest tokens (0: of all),
    and of these the fewest likeliest that have `top_p` of it together (nucleus, https://arxiv.org/abs/1904.09751)."""
    scaled_BV = logits_BV.float() / temperature
    if 0 < top_k < scaled_BV.shape[-1]:
        least_B1 = scaled_BV.topk(top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    shares_BV = torch.softmax(scaled_BV, dim=-1)
    if top_p >= 1.0:
        return shares_BV
    ordered_BV, places_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = ordered_BV.cumsum(dim=-1) - ordered_BV
    kept_BV = torch.zeros_like(shares_BV).scatter_(-1, places_BV, ordered_BV.masked_fill(before_BV >= top_p, 0.0))
    return kept_BV / kept_BV.sum(dim=-1, keepdim=True)
