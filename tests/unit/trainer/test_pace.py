"""How often to save: the formula against a simulation that knows none, and what the loop is told."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from bigtrain.config.schema import CheckpointConfig, ClusterConfig, Config
from bigtrain.trainer.pace import FIRST_SAVE, Cost, Pace, best_interval_s, interval_s


def lost_share(interval: float, cost: float, mtbf: float, *, failures: int = 4000, seed: int = 7) -> float:
    """Of a run that saves every so many seconds of work and fails at random: wall time that was no kept work, to the
    work. Simulated failure by failure."""
    generator = random.Random(seed)
    wall = work = 0.0
    for _ in range(failures):
        lives = generator.expovariate(1 / mtbf)
        wall += lives
        work += lives // (interval + cost) * interval
    return wall / work - 1


@pytest.mark.parametrize(("cost", "mtbf"), [(1.0, 3600.0), (30.0, 3600.0), (300.0, 3600.0), (0.1, 86400.0)])
def test_no_other_interval_loses_less(cost: float, mtbf: float) -> None:
    best = best_interval_s(cost, mtbf)
    at_best = lost_share(best, cost, mtbf)
    for factor in (0.4, 0.6, 1.6, 2.5):
        assert lost_share(best * factor, cost, mtbf) > at_best


def test_daly_by_hand() -> None:
    """d = 5 minutes, M = 6 hours: sqrt(2 d M) = 3600 s; times 1 + sqrt(1/144) / 3 + 1/1296; less d."""
    assert best_interval_s(300, 21600) == pytest.approx(3600 * (1 + 1 / 36 + 1 / 1296) - 300)
    assert best_interval_s(0.01, 1e6) == pytest.approx((2 * 0.01 * 1e6) ** 0.5, rel=1e-3), "Young's, where d is small"
    assert best_interval_s(100, 50) == 50 == best_interval_s(1000, 50)


def test_no_shorter_than_a_save_takes() -> None:
    """The disk is slow, and training hardly waits."""
    assert interval_s(Cost(stall_s=0.001, seconds=90.0), 60.0) == 90.0
    assert interval_s(Cost(stall_s=0.0, seconds=0.0), 3600.0) > 0


class Run:
    """Steps of a second each; a save holds them up and ends a while later."""

    def __init__(self, stall_s: float, seconds: float, *, keep_every: int = 0, mtbf_s: float | None = None) -> None:
        self.now, self.asked, self.said, self.saves = 0.0, 0, list[str](), list[int]()
        self.cost: Cost | None = None
        self._stall_s, self._seconds, self._ends = stall_s, seconds, list[float]()
        config = Config(
            checkpoint=CheckpointConfig(interval="auto", keep_every=keep_every), cluster=ClusterConfig(mtbf_h=1.0)
        )
        self.pace = Pace(
            config, 0, cost=self.of_last, mtbf_s=mtbf_s, from_rank_0=self.agree, say=self.said.append, now=self.time
        )

    def time(self) -> float:
        return self.now

    def of_last(self) -> Cost | None:
        return Cost(self._stall_s, self._seconds) if self._ends and self.now >= self._ends[-1] else None

    def agree(self, number: int) -> int:
        self.asked += 1
        return number

    def steps(self, count: int, step_s: float = 1.0) -> list[int]:
        for step in range(1, count + 1):
            self.now += step_s
            if self.pace.due(step):
                self.saves.append(step)
                self._ends.append(self.now + self._seconds)
                self.now += self._stall_s
        return self.saves


def test_the_first_save_measures_and_the_others_follow() -> None:
    """2 s of stall, a failure an hour: every 118.6 s, of which 2 s are no step."""
    run = Run(stall_s=2.0, seconds=5.0)
    saves = run.steps(1000)
    assert saves[0] == FIRST_SAVE
    gaps = [after - before for before, after in itertools.pairwise(saves[1:])]
    assert len(gaps) > 5 and all(abs(gap + 2.0 - best_interval_s(2.0, 3600.0)) <= 2 for gap in gaps), gaps
    assert run.asked < 100, "hardly a step costs a message"
    assert len(run.said) == 1 and "every 119 s" in run.said[0] and "1.0 h (cluster.mtbf_h)" in run.said[0]


def test_a_measured_rate_counts_more() -> None:
    run = Run(stall_s=2.0, seconds=5.0, mtbf_s=36000.0)
    saves = run.steps(2000)
    assert saves[2] - saves[1] == pytest.approx(best_interval_s(2.0, 36000.0), abs=3)
    assert "10.0 h (measured in this run)" in run.said[0]


def test_a_save_that_takes_long_is_waited_for() -> None:
    saves = Run(stall_s=0.01, seconds=200.0).steps(1000)
    assert all(after - before >= 200 for before, after in itertools.pairwise(saves)) and len(saves) > 3


def test_steps_that_are_longer_than_the_interval_are_all_saved() -> None:
    saves = Run(stall_s=0.5, seconds=1.0).steps(30, step_s=300.0)
    assert saves == list(range(FIRST_SAVE, 31))


def test_what_is_kept_for_good_is_made() -> None:
    saves = Run(stall_s=2.0, seconds=5.0, keep_every=50).steps(500)
    assert set(range(50, 501, 50)) <= set(saves)


def test_ranks_that_are_not_rank_0_do_as_it_says() -> None:
    """Their clocks and costs are their own."""
    answers: list[int] = []

    def first(number: int) -> int:
        answers.append(number)
        return number

    def pace(say: Any, agree: Any, speed: float) -> Pace:
        ticks = iter(range(10**9))
        config = Config(checkpoint=CheckpointConfig(interval="auto"))
        return Pace(
            config, 0, cost=lambda: Cost(speed, speed), mtbf_s=60.0, from_rank_0=agree, say=say,
            now=lambda: speed * next(ticks),
        )  # fmt: skip

    rank_0, rank_1 = pace(lambda text: None, first, 1.0), pace(lambda text: None, lambda number: answers.pop(), 0.1)
    for step in range(1, 300):
        assert rank_0.due(step) == rank_1.due(step) and not answers


@pytest.mark.parametrize(("interval", "expected"), [(0, []), (4, [4, 8])])
def test_a_number_of_steps(interval: int, expected: list[int]) -> None:
    config = Config(checkpoint=CheckpointConfig(interval=interval))
    pace = Pace(config, 0, cost=lambda: None, mtbf_s=None, from_rank_0=lambda number: 1 // 0, say=print)
    assert [step for step in range(1, 10) if pace.due(step)] == expected
