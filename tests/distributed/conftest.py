"""`pool(world)`: ranks that all tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.harness import PoolFactory, RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[PoolFactory]:
    """`pool(world)` is the session's `RankPool` of that many ranks."""
    pools: dict[int, RankPool] = {}

    def of(world: int) -> RankPool:
        return pools.setdefault(world, RankPool(world))

    yield of
    for each in pools.values():
        each.close()
