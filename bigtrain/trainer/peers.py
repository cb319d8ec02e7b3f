"""Ranks that must agree on the data: all on whether it can be read, tensor and pipeline peers on what they read, data
ranks on where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, replace

import torch
import torch.distributed as dist

from bigtrain.config.errors import UserError
from bigtrain.data.loader import StepBatch
from bigtrain.data.order import Cursor
from bigtrain.data.text_lanes import Position
from bigtrain.distributed.start import Runtime

_NUM_FIELDS = len(astuple(Position()))


def agreed(batches: Iterable[StepBatch], runtime: Runtime) -> Iterator[StepBatch]:
    """The batches, each once every rank has its own, and tensor and pipeline peers have the same. Collective.

    Each peer reads the shards itself, maybe on another machine: tokens of two batches in one step would be trained on,
    and nothing else would tell. Raises UserError on all ranks where one of them cannot read, or peers differ."""
    peers = runtime.topology.tensor * runtime.topology.pipeline
    iterator = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except UserError as raised:
            error = raised
        _raise_together(error, runtime)
        if batch is None:
            return
        if peers > 1 and batch.digest:
            _compare(int(batch.digest, 16), runtime)
        yield batch


def _raise_together(error: UserError | None, runtime: Runtime) -> None:
    """One rank's error on every rank, so that each ends by itself and says why. One small all-reduce, on the host."""
    flag = torch.tensor([error is not None], dtype=torch.int32)
    if runtime.all_reduce(flag, op=dist.ReduceOp.MAX).item():
        said: list[str | None] = [None] * runtime.topology.world
        dist.all_gather_object(said, None if error is None else str(error))
        raise UserError(next(each for each in said if each is not None)) from error


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
