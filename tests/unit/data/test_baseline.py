from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data import baseline
from bigtrain.data.baseline import unigram_cross_entropies
from bigtrain.data.held_out import HeldOut
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import from_files

from . import foreign
from .conftest import make_texts
from .test_build import small_build


def cross_entropy(train: list[Dataset], predicted: np.ndarray, **options: int) -> float:
    return unigram_cross_entropies(train, {"": predicted}, **options)[""]


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_against_counting_by_hand(built: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "_BLOCK_TOKENS", block)
    check_by_hand(Dataset.open(built / "train"), Dataset.open(built / "valid"))


def test_one_token_at_both_ends_of_a_document(tmp_path: Path) -> None:
    """As GPT-2 has: where it ends a document it is predicted, where it begins one it is not."""
    tokenizer = from_files({"tokenizer.json": foreign.dump(foreign.byte_level(make_texts(60)))}, "gpt2")
    assert tokenizer.bos_id == tokenizer.eos_id
    out = small_build(tmp_path / "out", make_texts(60), tokenizer, held_out=0.3)
    check_by_hand(Dataset.open(out / "train"), Dataset.open(out / "valid"))


def check_by_hand(train: Dataset, valid: Dataset) -> None:
    counts = Counter(token for document in range(len(train)) for token in train.tokens(document).tolist()[1:])
    total = sum(counts.values()) + train.index.vocab_size
    predicted = [token for document in range(len(valid)) for token in valid.tokens(document).tolist()[1:]]
    expected = -sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted)
    found = cross_entropy([train], HeldOut([valid], sequence_length=32).predicted_tokens())
    assert found == pytest.approx(expected, rel=1e-12)
    assert found < math.log(train.index.vocab_size)


def test_a_bounded_part_is_close(built: Path) -> None:
    train = Dataset.open(built / "train")
    predicted = HeldOut([train], sequence_length=32).predicted_tokens()
    whole = cross_entropy([train], predicted)
    assert cross_entropy([train, train], predicted) == pytest.approx(whole, rel=0.05)
    part = cross_entropy([train], predicted, max_tokens=3000)
    assert part != whole
    assert part == pytest.approx(whole, rel=0.2)


def test_nothing_to_score(built: Path) -> None:
    with pytest.raises(ValueError, match="no predicted tokens"):
        cross_entropy([Dataset.open(built / "train")], np.zeros(0, np.int64))


def test_each_set_has_its_own(built: Path) -> None:
    train, valid = Dataset.open(built / "train"), Dataset.open(built / "valid")
    sets = {name: HeldOut([each], sequence_length=32).predicted_tokens() for name, each in (("a", valid), ("b", train))}
    found = unigram_cross_entropies([train], sets)
    assert found == {name: cross_entropy([train], tokens) for name, tokens in sets.items()}
    assert found["a"] != found["b"]
