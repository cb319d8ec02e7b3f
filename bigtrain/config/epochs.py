"""How often a planned run goes through each of its sources. Pure arithmetic on weights and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bigtrain.config import locations
from bigtrain.config.schema import SourceConfig

MANY = 4
"""Epochs above which a launch warns. Up to four made hardly a difference to the loss against text that was all new, in
models of up to 9 billion parameters (Muennighoff et al., abstract, https://www.jmlr.org/papers/v26/24-1000.html)."""


def weight_at(source: SourceConfig, tokens: int) -> float:
    """The weight of a source once the run has trained on so many tokens."""
    begun = [change for change in source.then if change.from_tokens <= tokens]
    return max(begun, key=lambda change: change.from_tokens).weight if begun else source.weight


def changes(sources: Sequence[SourceConfig]) -> list[int]:
    """Tokens at which a weight begins, from 0 on, rising."""
    return sorted({0, *(change.from_tokens for source in sources for change in source.then)})


def planned(sources: Sequence[SourceConfig], sizes: Sequence[int], num_tokens: int) -> list[float]:
    """Epochs of each source in a run of `num_tokens`. `sizes`: tokens in each source, more than 0.

    `Order.epochs` counts what a run does; this is the same but for rounding to sequences and what packing leaves
    empty. It needs no more than the sizes, so a dry run of any corpus takes no time."""
    found = [0.0] * len(sources)
    begins = [tokens for tokens in changes(sources) if tokens < num_tokens]
    for begin, end in zip(begins, [*begins[1:], num_tokens], strict=True):
        weights = [weight_at(source, begin) for source in sources]
        for place, weight in enumerate(weights):
            found[place] += (end - begin) * weight / sum(weights) / sizes[place]
    return found


def told(epochs: Mapping[str, float]) -> str:
    """``web 1.20, code 0.31``, from the folder of each source and how often it is gone through."""
    names = locations.short_names(epochs)
    return ", ".join(f"{names[folder]} {number(count)}" for folder, count in epochs.items())


def number(count: float) -> str:
    """Epochs as people read them: 12.30, 0.35, 0.0035."""
    return f"{count:.2f}" if count >= 0.1 or not count else f"{count:.2g}"


def warnings(epochs: Mapping[str, float]) -> Iterator[str]:
    """A line for each source that is gone through very often."""
    for folder, count in epochs.items():
        if count > MANY:
            yield (
                f"warning: {folder} is gone through {count:.1f} times; beyond {MANY} epochs a model learns less and "
                "less from the same text. Add text, lower its weight, or train on fewer tokens."
            )
