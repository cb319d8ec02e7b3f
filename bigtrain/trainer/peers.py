"""Ranks that must agree on the data: all on whether it can be read, tensor and pipeline peers on what they read, data
ranks on where they are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.config.errors import UserError
from bigtrain.data.faults import Skipped
from bigtrain.data.loader import StepBatch
from bigtrain.data.order import Cursor
from bigtrain.data.text_lanes import Position
from bigtrain.distributed.start import Runtime

_NUM_FIELDS = len(astuple(Position()))


def agreed(
    batches: Iterable[StepBatch], runtime: Runtime, allow: Callable[[Iterable[Skipped]], None]
) -> Generator[StepBatch]:
    """The batches, each once every rank has its own, and tensor and pipeline peers have the same. Collective.

    `allow` is told, on every rank, of the bad documents that any data rank passed over, and raises UserError where they
    are too many. Each peer reads the shards itself, maybe on another machine: tokens of two batches in one step would
    be trained on, and nothing else would tell. Raises UserError on all ranks where one of them cannot read, bad
    documents are too many, or peers differ."""
    peers = runtime.topology.tensor * runtime.topology.pipeline
    iterator = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except UserError as raised:
            error = raised
        said = _told(batch.skipped if batch is not None else (), error, runtime)
        if errors := [each for each in said if isinstance(each, str)]:
            raise UserError(errors[0]) from error
        allow(skipped for each in said if not isinstance(each, str) for skipped in each)
        if batch is None:
            return
        if peers > 1 and batch.digest:
            _compare(int(batch.digest, 16), runtime)
        yield batch


def _told(skipped: Sequence[Skipped], error: UserError | None, runtime: Runtime) -> Sequence[str | Sequence[Skipped]]:
    """What the ranks have to say, and mostly none has: the error of a rank, or what its data rank passed over, told by
    one of the peers. One small all-reduce, on the host."""
    flag = torch.tensor([error is not None or bool(skipped)], dtype=torch.int32)
    if not runtime.all_reduce(flag, op=dist.ReduceOp.MAX).item():
        return []
    tells = runtime.topology.tensor_rank == 0 and runtime.topology.stage == 0
    mine: str | Sequence[Skipped] = str(error) if error is not None else tuple(skipped) if tells else ()
    said: list[Any] = [None] * runtime.topology.world
    dist.all_gather_object(said, mine)
    return said


def _compare(digest: int, runtime: Runtime) -> None:
    halves = [digest >> 32, digest & 0xFFFFFFFF]
    largest = torch.tensor(halves + [-half for half in halves], dtype=torch.int64, device=runtime.device)
    runtime.all_reduce(largest, op=dist.ReduceOp.MAX, group=runtime.groups.mp)
    high, low, minus_lowest_high, minus_lowest_low = largest.tolist()
    if high != -minus_lowest_high or low != -minus_lowest_low:
        raise UserError(
            f"the tensor and pipeline ranks of data rank {runtime.topology.data_rank} have read different tokens for "
            "the same step, so a file of the data is not the same on all machines. Compare them: tools/shards.py "
            "verify FOLDER on each."
        )


def whole(cursor: Cursor, runtime: Runtime) -> Cursor:
    """The cursor with the positions of all lanes, each from the data rank that reads it. Collective over the data
    ranks; nothing is sent where no source is raw text."""
    rank, size = runtime.topology.data_rank, runtime.topology.data
    num_lanes = cursor.mixture.num_lanes
    found: dict[str, dict[int, Position]] = {}
    for name, mine in sorted(cursor.positions.items()):
        table = torch.zeros(num_lanes, _NUM_FIELDS, dtype=torch.int64)
        for lane, position in mine.items():
            if lane % size == rank:
                table[lane] = torch.tensor(astuple(position))
        table = runtime.all_reduce(table.to(runtime.device), group=runtime.groups.dp)
        found[name] = {lane: Position(*row) for lane, row in enumerate(table.tolist())}
    return replace(cursor, positions=found)
