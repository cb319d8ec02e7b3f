"""When a step is refused, and when refusing it is not enough."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from bigtrain.config.schema import AnomalyConfig
from bigtrain.trainer.anomaly import Guard, LossWindow, Trouble

INF, NAN = math.inf, math.nan


def fed(guard: Guard, losses: list[float], norm: float = 1.0, first: int = 1) -> list[str]:
    """What became of each step: ok, skip, rewind or stop; until the guard gives up."""
    found: list[str] = []
    for step, loss in enumerate(losses, start=first):
        refused = guard.refuses(loss)
        if guard.gives_up(step, NAN if refused else norm):
            assert guard.trouble is not None and guard.trouble.step == step
            return [*found, guard.trouble.action]
        assert bool(guard.skipped) >= refused
        found.append("skip" if guard.skipped else "ok")
    return found


def noise(count: int, around: float = 3.0) -> list[float]:
    generator = random.Random(1)
    return [around + generator.gauss(0, 0.1) for _ in range(count)]


def test_deviations_are_those_of_numpy() -> None:
    """Against numpy's median, with spikes in the window; they hardly stretch what one deviation is."""
    losses = [*noise(60), 50.0, 60.0, 70.0, 80.0]
    window = LossWindow(64)
    for loss in [9.0, 9.0, *losses]:  # the oldest fall out
        window.add(loss)
    median = float(np.median(losses))
    mad = float(np.median(np.abs(np.array(losses) - median)))
    for loss in (2.0, 3.0, 3.5, 50.0):
        assert window.deviations(loss) == pytest.approx((loss - median) / (1.4826 * mad))
    assert 0.07 < 1.4826 * mad < 0.15, "about the 0.1 that was drawn"


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    window = LossWindow(8)
    for loss in noise(7):
        window.add(loss)
        assert window.deviations(100.0) == 0.0
    window.add(3.0)
    assert window.deviations(100.0) > 100


def test_losses_that_are_all_alike_make_no_spike_of_a_small_change() -> None:
    window = LossWindow(8)
    for _ in range(8):
        window.add(2.0)
    assert window.deviations(2.1) == pytest.approx(5.0)
    zero = LossWindow(4)
    for _ in range(4):
        zero.add(0.0)
    assert zero.deviations(1.0) == 0.0


@pytest.mark.parametrize(
    ("spike", "expected"),
    [("off", ["ok"] * 8), ("skip", ["ok"] * 6 + ["skip", "ok"]), ("rewind", ["ok"] * 6 + ["rewind"]),
     ("stop", ["ok"] * 6 + ["stop"])],
)  # fmt: skip
def test_a_spike(spike: str, expected: list[str]) -> None:
    guard = Guard(AnomalyConfig(spike=spike, window=4))
    assert fed(guard, [3.0, 2.9, 3.1, 3.0, 2.9, 2.0, 9.0, 2.9]) == expected
    if spike == "rewind":
        assert guard.trouble is not None and guard.trouble.reason.startswith("the loss 9.0000 is a spike, ")


def test_only_a_rise_is_a_spike() -> None:
    assert fed(Guard(AnomalyConfig(spike="stop", window=4)), [3.0] * 8 + [0.1, 0.0]) == ["ok"] * 10


def test_a_spike_does_not_become_what_losses_are_compared_with() -> None:
    guard = Guard(AnomalyConfig(spike="skip", window=4, max_skips=99))
    assert fed(guard, noise(8) + [30.0] * 20 + [3.0]) == ["ok"] * 8 + ["skip"] * 20 + ["ok"]


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("action", "expected"),
    [("off", ["skip"] * 5), ("skip", ["skip", "skip", "rewind"]), ("rewind", ["rewind"]), ("stop", ["stop"])],
)
def test_a_loss_that_is_not_finite(loss: float, action: str, expected: list[str]) -> None:
    guard = Guard(AnomalyConfig(non_finite=action, max_skips=3))
    assert fed(guard, [loss] * 5) == expected


@pytest.mark.parametrize("norm", [NAN, INF])
def test_a_gradient_that_is_not_finite(norm: float) -> None:
    guard = Guard(AnomalyConfig(max_skips=3))
    assert fed(guard, [3.0] * 3, norm) == ["skip", "skip", "rewind"]
    reason = "3 steps in a row were skipped, this one since the gradient norm is not finite"
    assert guard.trouble == Trouble(3, "rewind", reason)


def test_one_good_step_ends_the_row() -> None:
    guard = Guard(AnomalyConfig(max_skips=3))
    assert fed(guard, [NAN, NAN, 3.0] * 4) == ["skip", "skip", "ok"] * 4
    assert guard.skips == 0 and fed(guard, [NAN, NAN]) == ["skip", "skip"] and guard.skips == 2


def test_an_overflow_of_the_loss_scale_is_no_trouble() -> None:
    guard = Guard(AnomalyConfig(non_finite="stop"))
    for step in range(20):
        assert not guard.refuses(3.0) and not guard.gives_up(step, INF, overflowed=True)
        assert "loss scale" in guard.skipped and guard.skips == 0
    assert not guard.refuses(3.0) and guard.gives_up(21, INF), "at the smallest scale it is"


def test_a_run_that_goes_on_decides_alike() -> None:
    """Cut at every step, through JSON as the checkpoint keeps it."""
    config = AnomalyConfig(spike="rewind", window=8, max_skips=3)
    losses = [*noise(12), NAN, NAN, 3.0, *noise(4), NAN, NAN, NAN]
    expected = fed(Guard(config), losses)
    assert expected[-1] == "rewind" and len(expected) == len(losses)
    for cut in range(len(losses)):
        before, after = Guard(config), Guard(config)
        begin = fed(before, losses[:cut])
        state: dict[str, Any] = json.loads(json.dumps(before.to_dict()))
        after.restore(state)
        assert begin + fed(after, losses[cut:], first=cut + 1) == expected
        assert cut == len(losses) or after.to_dict()["losses"][-1:] == noise(4)[-1:], "the same losses, to the bit"


def test_a_checkpoint_that_knows_nothing_of_it() -> None:
    guard = Guard(AnomalyConfig(window=4))
    fed(guard, [*noise(4), NAN])
    guard.restore({})
    assert guard.to_dict() == {"losses": [], "skips": 0}
