from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.config.errors import UserError
from bigtrain.data.held_out import HeldOut
from bigtrain.data.lanes import Piece
from bigtrain.data.loader import StepBatch, batches, cut, evaluation_batches
from bigtrain.data.microbatch import Microbatch
from bigtrain.data.order import Cursor, Order, Source
from bigtrain.data.rows import Rows
from bigtrain.data.shards import Dataset

S, LANES, G = 48, 16, 16


@pytest.fixture(scope="module")
def order(built: Path) -> Order:
    return Order([Source(Dataset.open(built / "train"))], seed=5, num_lanes=LANES, sequence_length=S)


@pytest.fixture(scope="module")
def valid(built: Path) -> Dataset:
    return Dataset.open(built / "valid")


def steps(order: Order, count: int, *, data_rank: int = 0, data_size: int = 1, **options: int) -> list[StepBatch]:
    sizes = {"global_batch_size": G, "micro_batch_size": 2, "num_workers": 0, **options}
    stream = batches(order, data_rank=data_rank, data_size=data_size, start=order.start(), **sizes)  # pyright: ignore
    return list(itertools.islice(stream, count))


def rows(microbatches: tuple[Microbatch, ...]) -> list[tuple[tuple[int, ...], ...]]:
    """Every field of every sequence, comparable."""
    fields = ("tokens_BS", "targets_BS", "loss_mask_BS", "positions_BS", "documents_BS")
    return [
        tuple(tuple(getattr(micro, field)[row].tolist()) for field in fields)
        for micro in microbatches
        for row in range(len(micro.tokens_BS))
    ]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("data_size", [1, 2, 4, 8])
def test_the_global_batch_is_the_same_for_every_layout(
    order: Order, data_size: int, num_workers: int, micro_batch_size: int
) -> None:
    expected = [[order.sequence(step * G + item).tokens for item in range(G)] for step in range(4)]
    ranks = [
        steps(order, 4, data_rank=rank, data_size=data_size, num_workers=num_workers, micro_batch_size=micro_batch_size)
        for rank in range(data_size)
    ]
    for step, sequences in enumerate(expected):
        shares = [rank[step] for rank in ranks]
        assert all(len(share.microbatches) == G // data_size // micro_batch_size for share in shares)
        assert all(share.cursor == order.cursor((step + 1) * G) for share in shares)
        found = [row for share in shares for row in rows(share.microbatches)]
        assert sorted((tokens, targets) for tokens, targets, *_ in found) == sorted(
            (tuple(tokens[:-1].tolist()), tuple(tokens[1:].tolist())) for tokens in sequences
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_going_on_from_a_cursor_is_going_on(order: Order, num_workers: int) -> None:
    through = steps(order, 9, num_workers=num_workers)
    cursor = Cursor.from_dict(through[3].cursor.to_dict())
    options: Any = {"global_batch_size": G, "micro_batch_size": 2, "num_workers": num_workers}
    resumed = list(itertools.islice(batches(order, data_rank=0, data_size=1, start=cursor, **options), 5))
    assert [rows(step.microbatches) for step in resumed] == [rows(step.microbatches) for step in through[4:]]
    assert [step.cursor for step in resumed] == [step.cursor for step in through[4:]]


def test_another_layout_and_batch_size_go_on_where_the_first_stopped(order: Order) -> None:
    cursor = steps(order, 3)[-1].cursor
    ranks = [
        next(batches(order, data_rank=rank, data_size=4, start=cursor, global_batch_size=8, micro_batch_size=1))
        for rank in range(4)
    ]
    found = sorted(tokens for rank in ranks for tokens, *_ in rows(rank.microbatches))
    assert found == sorted(tuple(order.sequence(3 * G + item).tokens[:-1].tolist()) for item in range(8))
    assert ranks[0].cursor.num_sequences == 3 * G + 8


def test_masks_positions_and_documents_against_a_naive_reference(order: Order, valid: Dataset) -> None:
    bos = valid.index.bos_id
    single = set()
    long = Order(order.sources, seed=5, num_lanes=LANES, sequence_length=4)
    for some in (order, long):
        for step in steps(some, 30):
            for micro in step.microbatches:
                tokens, targets = micro.tokens_BS.tolist(), micro.targets_BS.tolist()
                for row in range(len(tokens)):
                    position, document = -1, 0
                    for column, (token, target) in enumerate(zip(tokens[row], targets[row], strict=True)):
                        if token == bos and column:
                            document += 1
                        position = 0 if token == bos else position + 1
                        assert micro.positions_BS[row, column] == position
                        assert micro.documents_BS[row, column] == document
                        assert bool(micro.loss_mask_BS[row, column]) == (target != bos)
                        if column + 1 < len(tokens[row]):
                            assert tokens[row][column + 1] == target
                assert micro.single_document == all(bos not in row[1:] for row in tokens)
                single.add(micro.single_document)
    assert single == {True, False}


def test_shapes_and_types(order: Order) -> None:
    micro = steps(order, 1)[0].microbatches[0]
    for name, dtype in {
        "tokens_BS": torch.int64,
        "targets_BS": torch.int64,
        "loss_mask_BS": torch.bool,
        "positions_BS": torch.int64,
        "documents_BS": torch.int32,
    }.items():
        tensor = getattr(micro, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (2, S))


def test_padding_counts_for_nothing() -> None:
    (micro,) = cut(Rows(np.array([[7, 1, 8, 0, 0]]), [[1, 3]], [3]), 1)
    assert micro.loss_mask_BS.tolist() == [[False, True, False, False]]
    assert micro.documents_BS.tolist() == [[0, 1, 1, 2]]
    assert micro.positions_BS.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_evaluation_is_the_same_for_every_layout(valid: Dataset, data_size: int) -> None:
    held_out = HeldOut([valid], sequence_length=S)
    assert held_out.num_sequences % 12, "the last batch must be incomplete for this test to say something"
    ranks = [
        list(
            evaluation_batches(held_out, data_rank=rank, data_size=data_size, global_batch_size=12, micro_batch_size=3)
        )
        for rank in range(data_size)
    ]
    count = -(-held_out.num_sequences // 12)
    assert [len(rank) for rank in ranks] == [count] * data_size
    assert {len(share) for rank in ranks for share in rank} == {12 // data_size // 3}
    predicted = [micro.targets_BS[micro.loss_mask_BS] for rank in ranks for share in rank for micro in share]
    tokens = np.sort(torch.cat(predicted).numpy())
    assert np.array_equal(tokens, np.sort(held_out.predicted_tokens()))
    whole = np.concatenate([valid.tokens(document)[1:] for document in range(len(valid))])
    assert np.array_equal(tokens, np.sort(whole))


def test_evaluation_can_be_a_part(valid: Dataset) -> None:
    held_out = HeldOut([valid], sequence_length=S, max_sequences=24)
    shares = list(evaluation_batches(held_out, data_rank=0, data_size=1, global_batch_size=12, micro_batch_size=3))
    assert len(shares) == 2
    assert sum(int(micro.loss_mask_BS.sum()) for share in shares for micro in share) == len(held_out.predicted_tokens())


# Threads


class Breaking(Order):
    """An order whose disk breaks at sequence 40."""

    def pieces(self, number: int) -> list[Piece]:
        if number == 40:
            raise OSError("the disk broke")
        return super().pieces(number)


def data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data_")]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_errors_come_through_at_their_step(order: Order, num_workers: int) -> None:
    broken = Breaking(order.sources, seed=5, num_lanes=LANES, sequence_length=S)
    stream = batches(
        broken, data_rank=0, data_size=1, global_batch_size=G, micro_batch_size=2, start=broken.start(),
        num_workers=num_workers,
    )  # fmt: skip
    list(itertools.islice(stream, 2))
    with pytest.raises(OSError, match="the disk broke"):
        next(stream)
    assert data_threads() == []


def test_threads_read_ahead_a_bounded_number_of_steps_and_end(order: Order) -> None:
    reads: list[int] = []

    class Counting(Order):
        def pieces(self, number: int) -> list[Piece]:
            reads.append(number)
            return super().pieces(number)

    counting = Counting(order.sources, seed=5, num_lanes=LANES, sequence_length=S)
    stream: Iterator[StepBatch] = batches(
        counting, data_rank=0, data_size=1, global_batch_size=G, micro_batch_size=2, start=counting.start(),
        num_workers=2,
    )  # fmt: skip
    for _ in range(5):
        next(stream)
    assert data_threads()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert data_threads() == []
    assert 5 * G <= len(reads) <= (5 + 4) * G


# Sizes that do not fit


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data_size": 3, "global_batch_size": 16}, "global_batch_size 16 is not a multiple of data-parallel size 3"),
        ({"data_size": 4, "micro_batch_size": 3}, r"4 x train.micro_batch_size 3 = 12"),
        ({"data_size": 32, "global_batch_size": 64}, "num_lanes 16 is not a multiple of the data-parallel size 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_at_once(order: Order, sizes: dict[str, Any], words: str) -> None:
    sizes = {"global_batch_size": G, "micro_batch_size": 2, **sizes}
    with pytest.raises(UserError, match=words):
        batches(order, data_rank=0, start=order.start(), **sizes)


def test_a_cursor_of_other_data_is_refused_at_once(order: Order) -> None:
    start = Cursor(0, "something", order.mixture)
    with pytest.raises(ValueError, match="not gone on from"):
        batches(order, data_rank=0, data_size=1, global_batch_size=G, micro_batch_size=2, start=start)
