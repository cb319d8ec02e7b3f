"""The loss scale halves at an overflow, grows after a window without one, and stays in its bounds."""

from __future__ import annotations

from bigtrain.optim.loss_scale import LARGEST, SMALLEST, LossScale


def values(scale: LossScale, overflows: list[bool]) -> list[float]:
    found: list[float] = []
    for overflowed in overflows:
        scale.update(overflowed=overflowed)
        found.append(scale.value)
    return found


def test_grows_after_each_window() -> None:
    assert values(LossScale(8, window=2), [False] * 5) == [8, 16, 16, 32, 32]


def test_an_overflow_halves_it_and_begins_the_window_anew() -> None:
    assert values(LossScale(8, window=2), [False, True, False, False]) == [8, 4, 4, 8]


def test_bounds() -> None:
    assert values(LossScale(SMALLEST, window=1), [True]) == [SMALLEST]
    assert values(LossScale(LARGEST, window=1), [False]) == [LARGEST]
