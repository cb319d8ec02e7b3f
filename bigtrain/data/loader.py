"""Sequences -> the microbatches of one data rank, step by step.

Step k of a run is the global sequences [c + k G, c + (k + 1) G), from the cursor c on, whatever the layout; where the
run passes over a window of the data (passed_over.py), the step behind it begins at its end. Data rank r of D takes
every D-th of them, from the r-th on, and cuts them into microbatches. So the global batch is the same set for every D,
and as D divides the lanes, a rank reads the same lanes in every step.

Shapes: B sequences a microbatch, S tokens a sequence.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from bigtrain.config.errors import UserError
from bigtrain.data.faults import Skipped
from bigtrain.data.held_out import HeldOut
from bigtrain.data.ledger import digest
from bigtrain.data.microbatch import Microbatch
from bigtrain.data.order import Cursor, Order
from bigtrain.data.passed_over import Window, first_of_step
from bigtrain.data.read_ahead import with_read_ahead
from bigtrain.data.rows import Rows


@dataclass(frozen=True)
class StepBatch:
    """One data rank's share of a global batch."""

    microbatches: tuple[Microbatch, ...]
    cursor: Cursor
    """After this batch: what a checkpoint saves once the step is done."""
    wait_s: float
    """Seconds that the caller waited for it."""
    digest: str = ""
    """Of its tokens and prompts (data/ledger.py)."""
    skipped: tuple[Skipped, ...] = ()
    """Bad documents that were passed over since the batch before."""


def batches(
    order: Order,
    *,
    data_rank: int,
    data_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    start: Cursor,
    num_workers: int = 0,
    passed_over: Sequence[Window] = (),
) -> Iterator[StepBatch]:
    """The batches of every step from `start` on, without end, but those in the windows that are `passed_over`.

    `num_workers` threads read ahead (0: read when asked); the batches are the same. Close the generator, or drop it, to
    end the threads. Raises at once UserError for sizes that do not divide, and ValueError for a cursor that `order` has
    not gone on from.
    """
    if (start.order, start.mixture) != (order.fingerprint, order.mixture):
        raise ValueError("the order has not gone on from this cursor")
    _check_sizes(data_size, global_batch_size, micro_batch_size)
    if order.num_lanes % data_size:
        raise UserError(
            f"data.num_lanes {order.num_lanes} is not a multiple of the data-parallel size {data_size}. It cannot "
            "change within a run: choose a layout whose data-parallel size divides it."
        )

    def first_of(step: int) -> int:
        return first_of_step(passed_over, start.num_sequences, global_batch_size, step)

    def numbers(step: int) -> range:
        first = first_of(step)
        return range(first + data_rank, first + global_batch_size, data_size)

    def read(step: int) -> StepBatch:
        rows = order.rows(numbers(step))
        cursor = order.cursor(first_of(step) + global_batch_size)
        return StepBatch(
            cut(rows, micro_batch_size), cursor, 0.0, digest([rows.tokens_BT], rows.prompts_B), order.faults.take()
        )

    order.use_threads(num_workers)
    if num_workers == 0:
        return _inline(read)
    if order.is_streamed:  # in order, by one thread; the others tokenise for it
        return _closing(_ahead(read, 1), order)
    steps = _ahead(read, num_workers)
    if any(dataset.is_remote for dataset in order.datasets):
        return with_read_ahead(steps, order, numbers, global_batch_size * order.sequence_length)
    return steps


def evaluation_batches(
    held_out: HeldOut, *, data_rank: int, data_size: int, global_batch_size: int, micro_batch_size: int
) -> Iterator[tuple[Microbatch, ...]]:
    """One data rank's share of each global batch of the held-out sequences, once through.

    The same sequences for every layout. The last batch is filled up with rows whose loss mask is False, so every rank
    has the same number of microbatches. Raises UserError for sizes that do not divide.
    """
    _check_sizes(data_size, global_batch_size, micro_batch_size)
    firsts = range(0, held_out.num_sequences, global_batch_size)
    shares = (range(first + data_rank, first + global_batch_size, data_size) for first in firsts)
    return (cut(held_out.rows(share), micro_batch_size) for share in shares)


def _check_sizes(data_size: int, global_batch_size: int, micro_batch_size: int) -> None:
    if global_batch_size % (data_size * micro_batch_size):
        raise UserError(
            f"train.global_batch_size {global_batch_size} is not a multiple of data-parallel size {data_size} x "
            f"train.micro_batch_size {micro_batch_size} = {data_size * micro_batch_size}"
        )


def _inline(read: _Read) -> Iterator[StepBatch]:
    step = 0
    while True:
        began = time.perf_counter()
        yield _waited(read(step), began)  # no name for it: the next one goes where the caller lets go of this one
        step += 1


def _ahead(read: _Read, num_workers: int) -> Generator[StepBatch]:
    """The batches in order, with at most two steps a thread read ahead."""
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data")
    pending: deque[Future[StepBatch]] = deque()
    step = 0
    try:
        while True:
            while len(pending) < 2 * num_workers:
                pending.append(pool.submit(read, step))
                step += 1
            began = time.perf_counter()
            batch = pending.popleft().result()
            yield _waited(batch, began)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _closing(steps: Generator[StepBatch], order: Order) -> Iterator[StepBatch]:
    """`steps`; at their end, who still waits for a document is let go first."""
    try:
        for batch in steps:  # noqa: UP028 - `yield from` would end the steps before
            yield batch
    finally:
        order.close()
        steps.close()


class _Read(Protocol):
    def __call__(self, step: int, /) -> StepBatch: ...


def _waited(batch: StepBatch, began: float) -> StepBatch:
    return StepBatch(batch.microbatches, batch.cursor, time.perf_counter() - began, batch.digest, batch.skipped)


def cut(rows: Rows, micro_batch_size: int) -> tuple[Microbatch, ...]:
    """Rows -> microbatches of so many."""

    def part(of: slice) -> Microbatch:
        tokens_BS, targets_BS = rows.tokens_BT[of, :-1], rows.tokens_BT[of, 1:]
        return Microbatch(
            torch.from_numpy(tokens_BS),
            torch.from_numpy(targets_BS),
            rows.starts_B[of],
            rows.num_tokens_B[of],
            rows.prompts_B[of],
        )

    firsts = range(0, len(rows.starts_B), micro_batch_size)
    return tuple([part(slice(first, first + micro_batch_size)) for first in firsts])
