"""Choose the next token. Pure functions of logits."""

from __future__ import annotations

import torch


def choose(
    logits_BV: torch.Tensor, *, temperature: float, top_k: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Token ids [B]. Temperature 0 is greedy; otherwise a draw from the `top_k` likeliest (0: from all)."""
    if temperature <= 0.0:
        return logits_BV.argmax(dim=-1)
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)
