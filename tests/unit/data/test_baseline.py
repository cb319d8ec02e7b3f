from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data import baseline
from bigtrain.data.baseline import unigram_cross_entropy
from bigtrain.data.held_out import HeldOut
from bigtrain.data.shards import Dataset


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_against_counting_by_hand(built: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "_BLOCK_TOKENS", block)
    train, valid = Dataset.open(built / "train"), Dataset.open(built / "valid")
    counts = Counter(token for document in range(len(train)) for token in train.tokens(document).tolist()[1:])
    total = sum(counts.values()) + train.index.vocab_size
    predicted = [token for document in range(len(valid)) for token in valid.tokens(document).tolist()[1:]]
    expected = -sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted)
    found = unigram_cross_entropy([train], HeldOut([valid], sequence_length=32).predicted_tokens())
    assert found == pytest.approx(expected, rel=1e-12)
    assert found < math.log(train.index.vocab_size)


def test_a_bounded_part_is_close(built: Path) -> None:
    train = Dataset.open(built / "train")
    predicted = HeldOut([train], sequence_length=32).predicted_tokens()
    whole = unigram_cross_entropy([train], predicted)
    assert unigram_cross_entropy([train, train], predicted) == pytest.approx(whole, rel=0.05)
    part = unigram_cross_entropy([train], predicted, max_tokens=3000)
    assert part != whole
    assert part == pytest.approx(whole, rel=0.2)


def test_nothing_to_score(built: Path) -> None:
    with pytest.raises(ValueError, match="no predicted tokens"):
        unigram_cross_entropy([Dataset.open(built / "train")], np.zeros(0, np.int64))
