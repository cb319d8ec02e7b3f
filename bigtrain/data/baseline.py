"""What a model scores that knows nothing but how often each token occurs: the line to be below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bigtrain.data.faults import BadDocument
from bigtrain.data.shards import Dataset

_BLOCK_TOKENS = 1 << 22


def unigram_cross_entropies(
    train: Sequence[Dataset], predicted: Mapping[str, np.ndarray], *, max_tokens: int = 100_000_000
) -> dict[str, float]:
    """Nats a token for each set of `predicted` tokens (ids; `HeldOut.predicted_tokens`): their mean cross-entropy under
    the share that each token has in the training data, with one added to every count (Laplace).

    The first token of each document, or its prompt, is left out, as no model predicts it. At most `max_tokens` are
    counted, documents being shuffled. Raises ValueError where a set is empty.
    """
    if empty := [name for name, tokens in predicted.items() if not len(tokens)]:
        raise ValueError(f"no predicted tokens to score in {empty[0]!r}")
    counts = np.ones(train[0].index.vocab_size, np.int64)
    for block in _blocks(train, max_tokens):
        counts += np.bincount(block, minlength=len(counts))
    nats = np.log(counts.sum()) - np.log(counts)
    return {name: float(nats[tokens].mean()) for name, tokens in predicted.items()}


def _blocks(datasets: Sequence[Dataset], max_tokens: int) -> Iterator[np.ndarray]:
    """The tokens of the first documents of each data set, in blocks: as many as are an equal share of `max_tokens`."""
    for dataset in datasets:
        parts: list[np.ndarray] = []
        held, left = 0, max_tokens // len(datasets)
        for document in range(len(dataset)):
            try:
                first = max(dataset.prompt_tokens(document), 1) if dataset.has_prompts else 1
                tokens = dataset.tokens(document, first, first + left)
            except BadDocument:  # training tells of it where it meets it
                continue
            parts.append(tokens)
            held, left = held + len(tokens), left - len(tokens)
            if held >= _BLOCK_TOKENS or not left:
                yield np.concatenate(parts)
                parts, held = [], 0
            if not left:
                break
        if parts:
            yield np.concatenate(parts)
