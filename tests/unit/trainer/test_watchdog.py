"""What the watchdog makes of phases and limits. That it ends a run: tests/integration/test_hangs.py."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest

from bigtrain.config.derive import collective_timeout_s
from bigtrain.config.schema import WatchdogConfig
from bigtrain.trainer.watchdog import Late, Watchdog, limit_s

LIMITS = WatchdogConfig(startup_s=100, data_s=20, step_s=30, eval_s=40, save_s=50, factor=10)


@pytest.mark.parametrize(
    ("phase", "took", "expected"),
    [
        ("startup", [], 100),
        ("data", [1.0], 20),
        ("step", [1.0], 30),
        ("eval", [1.0], 40),
        ("save", [1.0], 50),
        ("end", [], 100),
        ("step", [5.0, 6.0, 7.0], 60),  # ten times the median
        ("step", [1.0, 1.0, 500.0], 30),  # which one slow step does not move
        ("step", [], 100),  # the first may take as long as the start-up
    ],
)
def test_limits(phase: str, took: list[float], expected: float) -> None:
    assert limit_s(phase, LIMITS, took) == expected


def test_limits_that_are_switched_off() -> None:
    assert limit_s("data", WatchdogConfig(data_s=0), [1.0]) == math.inf
    assert limit_s("step", WatchdogConfig(startup_s=0, step_s=30), []) == math.inf, "nor has the first step one"
    assert limit_s("step", WatchdogConfig(startup_s=0, step_s=30), [1.0]) == 30


@pytest.mark.parametrize("limits", [LIMITS, WatchdogConfig(), WatchdogConfig(data_s=0, step_s=9000, factor=0.5)])
def test_torch_gives_a_collective_up_behind_every_limit(limits: WatchdogConfig) -> None:
    for phase in ("startup", "data", "step", "eval", "save", "end"):
        for took in ([], [max(limits.step_s, limits.save_s, limits.startup_s)]):
            limit = limit_s(phase, limits, took)
            assert limit == math.inf or limit + 30 < collective_timeout_s(limits)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(clock: Clock) -> tuple[Watchdog, Iterator[int]]:
    """One that has seen a first batch and a first step, of a second each."""
    watchdog = Watchdog(LIMITS, clock)
    watchdog.at("startup")

    def batches() -> Iterator[int]:
        while True:
            clock.now += 1
            yield 0

    steps = watchdog.steps(batches(), done=7)
    next(steps)
    clock.now += 1
    next(steps)
    return watchdog, steps


def test_the_wait_for_a_batch_is_data_and_its_use_is_a_step() -> None:
    clock = Clock()
    watchdog, steps = watched(clock)
    assert watchdog.step == 9 and watchdog.late() is None
    clock.now += 30
    assert watchdog.late() is None
    clock.now += 0.5
    assert watchdog.late() == Late("step", threading.get_ident(), 30.5, 30)
    next(steps)
    assert watchdog.step == 10 and watchdog.late() is None
    steps.close()  # type: ignore[attr-defined]
    clock.now += 99
    assert watchdog.late() is None, "what comes after the last step has the limit of the start-up"
    clock.now += 2
    late = watchdog.late()
    assert late is not None and late.phase == "end"


def test_data_that_does_not_come() -> None:
    clock = Clock()
    watchdog, _ = watched(clock)
    watchdog.at("data")
    clock.now += 20.5
    assert watchdog.late() == Late("data", threading.get_ident(), 20.5, 20)


def test_an_evaluation_is_not_counted_as_the_step_that_it_is_in() -> None:
    clock = Clock()
    watchdog, _ = watched(clock)
    clock.now += 29
    with watchdog.phase("eval"):
        clock.now += 39
        assert watchdog.late() is None
    assert watchdog.late() is None
    clock.now += 2
    assert watchdog.late() == Late("step", threading.get_ident(), 31, 30)
    with watchdog.phase("eval"):
        clock.now += 389
        assert watchdog.late() is None, "the median evaluation took 39 s"
        clock.now += 2
        assert watchdog.late() == Late("eval", threading.get_ident(), 391, 390)


def test_a_save_behind_the_training_has_its_own_clock() -> None:
    clock = Clock()
    watchdog, _ = watched(clock)
    inside, leave = threading.Event(), threading.Event()

    def save() -> None:
        with watchdog.phase("save"):
            inside.set()
            leave.wait(10)

    saving = threading.Thread(target=save)
    saving.start()
    assert inside.wait(10)
    for _ in range(101):
        clock.now += 1
        watchdog.at("step")
    assert watchdog.late() == Late("save", saving.ident or 0, 101, 100)
    with watchdog.phase("save", is_measured=False):
        assert watchdog.thread_in("save") == saving.ident, "the main thread only waits for it"
    assert watchdog.thread_in("eval") == threading.main_thread().ident
    leave.set()
    saving.join()
    assert watchdog.late() is None


def test_time_in_which_the_process_was_stopped_is_forgiven() -> None:
    clock = Clock()
    watchdog, _ = watched(clock)
    clock.now += 1000
    watchdog.forgive(975)
    assert watchdog.late() is None
    clock.now += 6
    assert watchdog.late() == Late("step", threading.get_ident(), 31, 30)
