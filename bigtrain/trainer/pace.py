"""When a checkpoint is due: every so many steps, or as often as loses the least time.

What loses the least (`checkpoint.interval=auto`): with a checkpoint every t seconds of training, each of which costs d
seconds, and M seconds between failures, about d / t of the time goes to saves and t / (2 M) to steps that a failure
takes back. The sum is least at t = sqrt(2 d M) (Young, A First Order Approximation to the Optimum Checkpoint Interval,
CACM 17(9), 1974); Daly (A Higher Order Estimate of the Optimum Checkpoint Interval for Restart Dumps, FGCS 22(3), 2006,
equation 37) adds what matters where d is not small beside M.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from bigtrain.config.schema import Config

FIRST_SAVE = 10
"""Steps before the first save of an attempt, which measures what one costs."""
_WORTH_SAYING = 1.25
"""An interval that is so many times longer or shorter than the last one that was told."""


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves. `cost_s`: that training waits for a save, above 0; `mtbf_s`: mean time
    between failures."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


@dataclass(frozen=True)
class Cost:
    """Of a save."""

    stall_s: float
    """That training waits."""
    seconds: float
    """Until it is durable."""


def interval_s(cost: Cost, mtbf_s: float) -> float:
    """As `best_interval_s`, but no shorter than a save takes: training would wait for the one before it."""
    return max(best_interval_s(max(cost.stall_s, 1e-3), mtbf_s), cost.seconds)


class Pace:
    """Says at each step whether a checkpoint is due, on all ranks alike.

    With auto, rank 0 decides by its own clock. It is asked only now and then: its answer is how many steps to wait
    before it is asked again, so most steps cost no message."""

    def __init__(
        self,
        config: Config,
        step: int,
        *,
        cost: Callable[[], Cost | None],
        mtbf_s: float | None,
        from_rank_0: Callable[[int], int],
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`step`: where the steps begin. `cost`: of the last save, None while none has ended or one goes on. `mtbf_s`:
        measured in this run, if it was. `from_rank_0`: rank 0's number on all ranks, collective. `say` tells the
        user."""
        self._interval, self._every = config.checkpoint.interval, config.checkpoint.keep_every
        self._cost, self._from_rank_0, self._say, self._now = cost, from_rank_0, say, now
        self._is_measured = mtbf_s is not None
        self._mtbf_s = mtbf_s or config.cluster.mtbf_h * 3600
        self._saved_step, self._saved_at = step, now()
        self._ask_at = step + 1
        self._has_saved = False
        self._told_s = 0.0

    def due(self, step: int) -> bool:
        """Whether to save after this step. Collective with auto."""
        if isinstance(self._interval, int):
            return self._interval > 0 and step % self._interval == 0
        is_due = bool(self._every) and step % self._every == 0
        if not is_due and step >= self._ask_at:
            wait = self._from_rank_0(self._steps_to_wait(step))
            self._ask_at = step + wait
            is_due = wait == 0
        if is_due:
            self._saved_step, self._saved_at, self._has_saved = step, self._now(), True
            self._ask_at = step + 1
        return is_due

    def _steps_to_wait(self, step: int) -> int:
        """Of rank 0: 0 where a save is due now."""
        cost, elapsed_s, steps = self._cost(), self._now() - self._saved_at, step - self._saved_step
        if cost is None:
            return 1 if self._has_saved else max(FIRST_SAVE - steps, 0)
        step_s = elapsed_s / max(steps, 1)
        wanted_s = interval_s(cost, self._mtbf_s)
        self._tell(cost, wanted_s, step_s)
        left = (wanted_s - elapsed_s) / max(step_s, 1e-9)
        return 0 if left < 0.5 else max(1, int(left))

    def _tell(self, cost: Cost, wanted_s: float, step_s: float) -> None:
        if self._told_s / _WORTH_SAYING < wanted_s < self._told_s * _WORTH_SAYING:
            return
        self._told_s = wanted_s
        failures = "measured in this run" if self._is_measured else "cluster.mtbf_h"
        self._say(
            f"checkpoint.interval=auto: every {wanted_s:,.0f} s, about {max(1, round(wanted_s / max(step_s, 1e-9))):,} "
            f"steps. A save holds training up for {cost.stall_s:.2f} s and takes {cost.seconds:.1f} s; a failure every "
            f"{self._mtbf_s / 3600:,.1f} h ({failures})"
        )
