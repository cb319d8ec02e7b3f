from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.config.schema import DataConfig, SourceConfig
from bigtrain.data import lanes as laning
from bigtrain.data import order as ordering
from bigtrain.data import tokenizer_training as training
from bigtrain.data.held_out import HeldOut, held_out
from bigtrain.data.lanes import Lanes
from bigtrain.data.mixture import Pattern
from bigtrain.data.order import Cursor, Order, Source
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer

from .conftest import make_texts
from .test_build import small_build

S, LANES = 64, 8


@pytest.fixture(scope="module")
def train(built: Path) -> Dataset:
    return Dataset.open(built / "train")


@pytest.fixture(scope="module")
def valid(built: Path) -> Dataset:
    return Dataset.open(built / "valid")


def make(train: Dataset, *, seed: int = 1, num_lanes: int = LANES, sequence_length: int = S) -> Order:
    return Order([Source(train)], seed=seed, num_lanes=num_lanes, sequence_length=sequence_length)


def stream_of_lane(order: Order, lane: int, count: int) -> np.ndarray:
    """The lane's stream as the sequences show it. Each overlaps the next in one token."""
    windows = [order.sequence(row * order.num_lanes + lane).tokens for row in range(count)]
    for before, after in itertools.pairwise(windows):
        assert before[-1] == after[0]
    return np.concatenate([window[:-1] for window in windows])


def split_at_bos(stream: np.ndarray, bos: int) -> list[tuple[int, ...]]:
    cuts = np.flatnonzero(stream == bos)
    assert cuts[0] == 0
    return [tuple(part.tolist()) for part in np.split(stream, cuts[1:])]


@pytest.mark.parametrize(("num_lanes", "sequence_length"), [(8, 64), (1, 100), (13, 7), (100, 1000)])
def test_every_document_once_an_epoch_in_every_lane(train: Dataset, num_lanes: int, sequence_length: int) -> None:
    order = make(train, num_lanes=num_lanes, sequence_length=sequence_length)
    bos = train.index.bos_id
    of_all: Counter[tuple[int, ...]] = Counter()
    lanes = order._sequences[0]
    assert isinstance(lanes, Lanes)
    for lane, size in enumerate(lanes.num_tokens_of_lanes):
        stream = stream_of_lane(order, lane, -(-3 * size // sequence_length))
        epochs = [split_at_bos(stream[epoch * size : (epoch + 1) * size], bos) for epoch in range(3)]
        assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
        if len(epochs[0]) > 6:
            assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has its own order"
        of_all.update(epochs[0])
    assert of_all == Counter(tuple(train.tokens(document).tolist()) for document in range(len(train)))


def test_windows_name_their_pieces(train: Dataset) -> None:
    order = make(train)
    for number in (0, 5, 333, 4000):
        window = order.sequence(number)
        assert window.num_tokens == S + 1 == sum(piece.count for piece in window.pieces)
        parts = [train.tokens(p.document)[p.start : p.start + p.count].astype(np.int64) for p in window.pieces]
        assert np.array_equal(np.concatenate(parts), window.tokens)
        assert np.array_equal(window.starts, window.tokens == train.index.bos_id)
    assert {piece.epoch for piece in order.sequence(4000).pieces} > {0} or order.sequence(4000).pieces[0].epoch > 0


def test_any_sequence_any_time(train: Dataset) -> None:
    forward, other = make(train), make(train)
    numbers = list(range(0, 3000, 7))
    expected = {number: forward.sequence(number).tokens for number in numbers}
    for number in np.random.default_rng(0).permutation(numbers):
        assert np.array_equal(other.sequence(int(number)).tokens, expected[int(number)])


def test_the_order_hangs_on_data_seed_lanes_and_length_only(
    train: Dataset, valid: Dataset, tmp_path: Path, built: Path
) -> None:
    base = make(train)
    shutil.copytree(built / "train", tmp_path / "moved")
    moved = make(Dataset.open(tmp_path / "moved"))
    assert moved.fingerprint == base.fingerprint
    assert np.array_equal(moved.sequence(77).tokens, base.sequence(77).tokens)
    others = [make(train, seed=2), make(train, num_lanes=4), make(train, sequence_length=32), make(valid)]
    others.append(Order([Source(train), Source(valid)], seed=1, num_lanes=LANES, sequence_length=S))
    assert len({str(order.start().to_dict()) for order in (base, *others)}) == 6
    assert not np.array_equal(others[0].sequence(0).tokens, base.sequence(0).tokens)


def test_the_order_of_this_version_is_the_order_for_ever() -> None:
    """A change of numpy or of the code must not reorder the data of a run that is under way."""
    one, three = np.zeros(10, np.int64), np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert laning.draw_order(one, (1234, 5, 0), (1234, 0)).tolist() == GOLDEN_DRAW
    assert laning.draw_order(three, (1234, 5, 0), (1234, 0)).tolist() == GOLDEN_DRAW_OF_SHARDS
    sizes = np.array([5, 900, 17, 17, 300, 2, 44, 1000, 31, 8, 70_000])
    assert [lane.tolist() for lane in laning.deal(sizes, 3)] == GOLDEN_DEAL


GOLDEN_DRAW = [3, 6, 5, 7, 2, 4, 9, 8, 1, 0]
GOLDEN_DRAW_OF_SHARDS = [6, 5, 4, 7, 9, 8, 3, 2, 1, 0]
GOLDEN_DEAL = [[10], [7, 6, 8, 2, 3, 9, 0, 5], [1, 4]]


@pytest.mark.parametrize(("long_documents", "spread"), [(1 << 18, 0.001), (5000, 0.1)])
def test_lanes_get_about_the_same(long_documents: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laning, "_LONG_DOCUMENTS", long_documents)
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(6, 1.2, 20_011).astype(np.int64) + 2
    lanes = laning.deal(sizes, 64)
    assert sorted(np.concatenate(lanes).tolist()) == list(range(len(sizes)))
    loads = [int(sizes[lane].sum()) for lane in lanes]
    assert max(loads) - min(loads) < spread * np.mean(loads)


def test_only_the_newest_epochs_are_kept(train: Dataset) -> None:
    lanes = Lanes(train, seed=0, num_lanes=2, sequence_length=S)
    for epoch in range(9):
        lanes.stream(0, epoch * lanes.num_tokens_of_lanes[0], 10)
    lanes.stream(0, 0, 10)
    assert len(lanes._epochs[0]) <= 3


# Several sources


def test_pattern_gives_each_its_share_at_any_time() -> None:
    weights = [Fraction(3), Fraction(1, 2), Fraction("0.1")]
    pattern = Pattern(weights)
    counts = [0, 0, 0]
    for number in range(3000):
        source, own = pattern.locate(number)
        assert own == counts[source]
        counts[source] += 1
        if number % 100 == 99:
            for weight, count in zip(weights, counts, strict=True):
                assert abs(count - (number + 1) * weight / sum(weights)) < 2


def test_each_source_keeps_its_own_order(train: Dataset, valid: Dataset) -> None:
    mixed = Order([Source(train, 3.0), Source(valid, 1.0)], seed=1, num_lanes=LANES, sequence_length=S)
    alone = [make(train), make(valid)]
    seen = [[0] * LANES, [0] * LANES]
    for number in range(400):
        window, lane = mixed.sequence(number), number % LANES
        source = window.pieces[0].source
        assert np.array_equal(window.tokens, alone[source].sequence(seen[source][lane] * LANES + lane).tokens)
        seen[source][lane] += 1
    assert [sum(each) for each in seen] == [300, 100]


# Held-out data


@pytest.mark.parametrize("sequence_length", [1, 50, 10**6])
def test_held_out_is_everything_once(valid: Dataset, sequence_length: int) -> None:
    held_out = HeldOut([valid], sequence_length=sequence_length)
    stream = np.concatenate([valid.tokens(document) for document in range(len(valid))]).astype(np.int64)
    windows = [held_out.sequence(number) for number in range(held_out.num_sequences)]
    targets = np.concatenate([window.tokens[1 : window.num_tokens] for window in windows])
    assert np.array_equal(targets, stream[1:])
    assert all(len(window.tokens) == sequence_length + 1 for window in windows)
    assert all(window.num_tokens == sequence_length + 1 for window in windows[:-1])
    predicted = held_out.predicted_tokens()
    assert np.array_equal(predicted, stream[stream != valid.index.bos_id])
    with pytest.raises(IndexError):
        held_out.sequence(held_out.num_sequences)


def test_held_out_of_several_sources_takes_them_in_turn(train: Dataset, valid: Dataset) -> None:
    held_out = HeldOut([train, valid], sequence_length=S)
    alone = [HeldOut([dataset], sequence_length=S) for dataset in (train, valid)]
    seen = [0, 0]
    for number in range(held_out.num_sequences):
        window = held_out.sequence(number)
        source = window.pieces[0].source
        assert np.array_equal(window.tokens, alone[source].sequence(seen[source]).tokens)
        seen[source] += 1
    assert seen == [part.num_sequences for part in alone]
    few = HeldOut([train, valid], sequence_length=S, max_sequences=20)
    assert few.num_sequences == 20
    assert {few.sequence(number).pieces[0].source for number in range(20)} == {0, 1}


# What a user gets wrong


def config(*paths: Path | str, **values: object) -> DataConfig:
    sources = [SourceConfig(str(path)) for path in paths]
    return DataConfig(train=sources, valid=sources, **values)  # pyright: ignore[reportArgumentType]


def test_a_checkpoint_of_other_data_is_refused(train: Dataset) -> None:
    cursor = Cursor.from_dict(json.loads(json.dumps(make(train).start().to_dict())))
    assert not make(train).go_on_from(cursor)
    with pytest.raises(UserError, match=r"seed=1 (.|\n)*seed=2 "):
        make(train, seed=2).go_on_from(cursor)


def test_too_few_documents(train: Dataset) -> None:
    with pytest.raises(UserError, match=rf"has {len(train)} documents, too few for data\.num_lanes=512"):
        make(train, num_lanes=512)
    with pytest.raises(UserError, match=r"num_lanes is 0"):
        make(train, num_lanes=0)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_are_positive(train: Dataset, weight: float) -> None:
    with pytest.raises(UserError, match=r"weight of .* is"):
        Source(train, weight)


def test_missing_and_empty_paths(built: Path, tmp_path: Path) -> None:
    for bad, words in {
        tmp_path / "nowhere": "nowhere: no such folder. Build it",
        tmp_path: "has no index.json",
        built: f"Did you mean {built / 'train'}?",
    }.items():
        with pytest.raises(UserError) as error:
            ordering.training_order(config(bad), seed=0, sequence_length=8)
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"data\.train is empty"):
        ordering.training_order(config(), seed=0, sequence_length=8)
    with pytest.raises(UserError, match=r"data\.valid is empty"):
        held_out(config(), sequence_length=8)


def test_another_tokenizer(built: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = SentencePieceTokenizer(training.train(make_texts(50, seed=7), vocab_size=330))
    theirs = small_build(tmp_path / "theirs", make_texts(20), other, held_out=0.0) / "train"
    fingerprints = rf"{other.fingerprint}.*{tokenizer.fingerprint}"
    with pytest.raises(UserError, match=fingerprints):
        ordering.training_order(config(theirs, num_lanes=2), seed=0, sequence_length=8, tokenizer=tokenizer)
    with pytest.raises(UserError, match=fingerprints):
        ordering.training_order(config(built / "train", theirs, num_lanes=2), seed=0, sequence_length=8)
    order = ordering.training_order(
        config(built / "train", num_lanes=2), seed=0, sequence_length=8, tokenizer=tokenizer
    )
    assert [dataset.name for dataset in order.datasets] == [str(built / "train")]


def test_cursor_is_plain_data(train: Dataset) -> None:
    cursor = make(train).cursor(12)
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor
