"""What a model scores that knows nothing but how often each token occurs: the line to be below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bigtrain.data.faults import BadDocument
from bigtrain.data.shards import Dataset

_BLOCK_TOKENS = 1 << 22


def unigram_cross_entropy(train: Sequence[Dataset], predicted: np.ndarray, *, max_tokens: int = 100_000_000) -> float:
    """Nats a token: the mean cross-entropy of `predicted` (ids; `HeldOut.predicted_tokens`) under the share that each
    token has in the training data, with one added to every count (Laplace).

    The first token of each document is left out, as no model predicts it. At most `max_tokens` are counted,
    documents being shuffled. Raises ValueError where `predicted` is empty.
    """
    if not len(predicted):
        raise ValueError("no predicted tokens to score")
    counts = np.ones(train[0].index.vocab_size, np.int64)
    for block in _blocks(train, max_tokens):
        counts += np.bincount(block, minlength=len(counts))
    nats = np.log(counts.sum()) - np.log(counts)
    return float(nats[predicted].mean())


def _blocks(datasets: Sequence[Dataset], max_tokens: int) -> Iterator[np.ndarray]:
    """The tokens of the first documents of each data set, in blocks: as many as are an equal share of `max_tokens`."""
    for dataset in datasets:
        parts: list[np.ndarray] = []
        held, left = 0, max_tokens // len(datasets)
        for document in range(len(dataset)):
            try:
                tokens = dataset.tokens(document, 1, 1 + left)
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
