from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from bigtrain.config.errors import UserError
from bigtrain.data.workers import Workers


def double(number: int) -> int:
    return 2 * number


def parent_of(_: int) -> int:
    time.sleep(0.05)
    return os.getppid()


class Source:
    """Items, and how many of them, and how many bytes, were on their way at most."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.taken, self.given = sizes, 0, 0
        self.most_items = self.most_bytes = 0

    def __iter__(self) -> Iterator[int]:
        for size in self.sizes:
            self.taken += 1  # one is in the hands of `map` already
            on_their_way = self.sizes[self.given : self.taken - 1]
            self.most_items = max(self.most_items, len(on_their_way))
            self.most_bytes = max(self.most_bytes, sum(on_their_way))
            yield size


@pytest.mark.parametrize("number", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_results_in_order_and_few_on_their_way(number: int) -> None:
    source = Source([1] * 40 + [50, 50, 1, 120, 1, 1, 120, 120, 3])
    results: list[int] = []
    with Workers(number) as workers:
        for result in workers.map(double, source, bytes_of=lambda size: size, max_bytes=100):
            source.given += 1
            results.append(result)
    assert results == [2 * size for size in source.sizes]
    if number:
        assert 4 < source.most_items <= 4 * number
        assert source.most_bytes == 120


@pytest.mark.slow
def test_work_runs_in_processes() -> None:
    with Workers(1) as workers:
        assert set(workers.map(parent_of, [0, 1])) == {os.getpid()}


def test_fewer_than_none() -> None:
    with pytest.raises(UserError, match="workers is -1"):
        Workers(-1)
