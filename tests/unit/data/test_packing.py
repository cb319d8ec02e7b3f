from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from bigtrain.data import packing
from bigtrain.data.loader import cut
from bigtrain.data.order import Order, Source
from bigtrain.data.packing import PackedSequences, best_fit, cut_to_size, pack
from bigtrain.data.shards import Dataset

S = 64


@pytest.fixture(scope="module")
def train(built: Path) -> Dataset:
    return Dataset.open(built / "train")


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Best fit, the largest first, as the textbook has it: the loads of the bins."""
    spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - size)
        else:
            spaces.append(capacity - size)
    return sorted(capacity - space for space in spaces)


@given(some.integers(1, 40).flatmap(lambda most: some.tuples(some.just(most), some.lists(some.integers(1, most)))))
def test_bins_are_those_of_the_textbook(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    bins = best_fit(np.array(sizes, np.int64), capacity)
    loads = np.bincount(bins, weights=np.array(sizes, np.int64)).astype(int).tolist() if sizes else []
    assert sorted(loads) == one_by_one(sizes, capacity)


@given(some.lists(some.integers(2, 500)), some.integers(1, 100))
def test_every_token_but_the_first_is_a_target_once(sizes: list[int], length: int) -> None:
    targets: Counter[tuple[int, int]] = Counter()
    documents, starts, counts = cut_to_size(np.array(sizes, np.int64), length)
    for document, start, count in zip(documents.tolist(), starts.tolist(), counts.tolist(), strict=True):
        assert 2 <= count <= length + 1
        targets.update((document, token) for token in range(start + 1, start + count))
    assert targets == {(document, token): 1 for document, size in enumerate(sizes) for token in range(1, size)}


def test_few_places_stay_empty() -> None:
    sizes = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(np.int64) + 2
    bins = pack(sizes, 2048)
    loads = [int(bins.sizes[bins.chunks(number)].sum()) for number in range(len(bins))]
    assert max(loads) <= 2049 and min(loads) > 0
    assert sum(loads) > 0.999 * 2049 * len(bins)


@pytest.mark.parametrize("group_bins", [3, 1000])
def test_every_document_once_an_epoch(train: Dataset, group_bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_GROUP_BINS", group_bins)
    sequences = PackedSequences(train, seed=3, num_lanes=4, sequence_length=S)
    size = len(sequences._bins)
    epochs = [
        [tuple(sequences.pieces(number % 4, number // 4)) for number in range(n * size, (n + 1) * size)]
        for n in range(2)
    ]
    for epoch, windows in enumerate(epochs):
        pieces = [piece for window in windows for piece in window]
        assert all(piece.epoch == epoch for piece in pieces)
        assert all(sum(piece.count for piece in window) <= S + 1 for window in windows)
        targets = Counter((p.document, token) for p in pieces for token in range(p.start + 1, p.start + p.count))
        assert set(targets.values()) == {1}
        assert len(targets) == train.index.num_tokens - len(train)
    assert [[p.document for p in window] for window in epochs[0]] != [[p.document for p in w] for w in epochs[1]]
    assert sequences.epochs([len(range(lane, 3 * size, 4)) for lane in range(4)]) == 3.0


def test_shards_stay_together(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few of them are read at a time."""
    monkeypatch.setattr(packing, "_GROUP_BINS", 1)
    assert len(train.index.shards) > 2
    sequences = PackedSequences(train, seed=3, num_lanes=1, sequence_length=S)
    shards = train.shards_of_documents()
    read = [shards[sequences.pieces(0, number)[0].document] for number in range(len(sequences._bins))]
    changes = sum(one != other for one, other in itertools.pairwise(read))
    assert changes < 3 * len(train.index.shards)


def test_what_is_packed_begins_anew(train: Dataset) -> None:
    """No part of a document sees what stands before it, or is predicted from it, and no padding is trained on."""
    order = Order([Source(train)], seed=1, num_lanes=4, sequence_length=S, pack="best_fit")
    for number in range(200):
        window = order.sequence(number)
        (batch,) = cut(order.rows([number]), 1)
        places = np.cumsum([0, *(piece.count for piece in window.pieces)])
        for piece, begin, end in zip(window.pieces, places, places[1:], strict=False):
            assert np.array_equal(
                window.tokens[begin:end], train.tokens(piece.document, piece.start, piece.start + piece.count)
            )
            end = min(end, S)
            assert batch.positions_BS[0, begin:end].tolist() == list(range(end - begin))
            assert len(set(batch.documents_BS[0, begin:end].tolist())) == 1
        learned = batch.loss_mask_BS[0].nonzero().flatten().tolist()
        assert learned == [place for place in range(S) if place + 1 < places[-1] and place + 1 not in places]


def test_what_stays_empty_and_what_is_cut_is_known(train: Dataset) -> None:
    sequences = PackedSequences(train, seed=1, num_lanes=1, sequence_length=S)
    empty = 1 - sum(piece.count for number in range(len(sequences._bins)) for piece in sequences.pieces(0, number)) / (
        len(sequences._bins) * (S + 1)
    )
    assert sequences.padding == pytest.approx(empty)
    assert sequences.cut_documents == int((train.num_tokens_of_documents() > S + 1).sum())
