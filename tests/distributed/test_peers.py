"""Tensor and pipeline peers that read different tokens are told at once, on all of them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from bigtrain.config.schema import Config
from tests.distributed import small
from tests.distributed.harness import PoolFactory


def told(config: Config, digests: list[list[str]]) -> list[str]:
    """On a rank: what came of batches with these digests, one list a rank."""
    from bigtrain.config.errors import UserError
    from bigtrain.data.loader import StepBatch
    from bigtrain.data.mixture import Mixture, Stage
    from bigtrain.data.order import Cursor
    from bigtrain.distributed.start import start
    from bigtrain.trainer import peers

    runtime = start(config)
    cursor = Cursor(0, "", Mixture([Stage(0, {"a": Fraction(1)})], 4))
    mine = (StepBatch((), cursor, 0.0, digest) for digest in digests[runtime.topology.rank])
    said: list[str] = []
    try:
        said += [batch.digest for batch in peers.agreed(mine, runtime, lambda skipped: None)]
    except UserError as error:
        said.append(str(error))
    return said


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
@pytest.mark.parametrize("place", [0, 9])
def test_other_tokens_end_the_run_on_all_peers(pool: PoolFactory, parallel: dict[str, Any], place: int) -> None:
    other = "0123456789abcdef".replace(str(place), "f")
    digests = [["0123456789abcdef"] * 2, ["0123456789abcdef", other]]
    for found in pool(2).run(told, small.config(**parallel), digests):
        assert len(found) == 1 and "have read different tokens for the same step" in found[0]
    for found in pool(2).run(told, small.config(**parallel), [each[:1] for each in digests]):
        assert found == ["0123456789abcdef"]


def failing(config: Config, failing_rank: int) -> list[str]:
    """On a rank: what came of batches of which one rank cannot read the second."""
    from bigtrain.config.errors import UserError
    from bigtrain.data.loader import StepBatch
    from bigtrain.data.mixture import Mixture, Stage
    from bigtrain.data.order import Cursor
    from bigtrain.distributed.start import start
    from bigtrain.trainer import peers

    runtime = start(config)
    cursor = Cursor(0, "", Mixture([Stage(0, {"a": Fraction(1)})], 4))

    def mine() -> Any:
        yield StepBatch((), cursor, 0.0, "1")
        if runtime.topology.rank == failing_rank:
            raise UserError(f"rank {failing_rank} cannot read")
        yield StepBatch((), cursor, 0.0, "2")

    said: list[str] = []
    try:
        for batch in peers.agreed(mine(), runtime, lambda skipped: None):
            said.append(batch.digest)
    except UserError as error:
        said.append(str(error))
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_read_ends_all_with_its_error(pool: PoolFactory, rank: int) -> None:
    assert pool(2).run(failing, small.config(), rank) == [["1", f"rank {rank} cannot read"]] * 2


def gathered(config: Config) -> dict[str, dict[int, Any]]:
    """On a rank: the whole of a cursor of which each data rank knows its own lanes."""
    from bigtrain.data.mixture import Mixture, Stage
    from bigtrain.data.order import Cursor
    from bigtrain.data.text_lanes import Position
    from bigtrain.distributed.start import start
    from bigtrain.trainer import peers

    runtime = start(config)
    rank, size = runtime.topology.data_rank, runtime.topology.data
    cursor = Cursor(9, "", Mixture([Stage(0, {"a": Fraction(1)})], 4))
    mine = {lane: Position(7 if lane % size == rank else 3, lane, 1, 2, 3) for lane in range(4) if lane != 2}
    found = peers.whole(replace(cursor, positions={"a": mine, "b": {}}), runtime)
    return {name: dict(lanes) for name, lanes in found.positions.items()}


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}])
def test_the_whole_cursor_has_each_lane_from_the_rank_that_reads_it(
    pool: PoolFactory, parallel: dict[str, Any]
) -> None:
    from bigtrain.data.text_lanes import Position

    for found in pool(2).run(gathered, small.config(**parallel)):
        assert found["a"] == {lane: Position() if lane == 2 else Position(7, lane, 1, 2, 3) for lane in range(4)}
        assert found["b"] == {lane: Position() for lane in range(4)}
