"""Numbers that go wrong: which steps are not to be taken, and when skipping them is not enough.

A step is wrong where its loss or its gradient norm is not finite, or where its loss is a spike. All ranks decide alike,
without asking each other: the loss is that of the whole global batch, summed over all ranks, and so is the norm; what
they are compared with stands in the checkpoint, so a run that goes on decides as one that was never interrupted.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.config.schema import AnomalyConfig

NORMAL = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation."""
LEAST_DEVIATION = 0.01
"""Of the median: losses that hardly differ make no spike of the first that does."""


class LossWindow:
    """The last losses that were none of trouble, and how far a new one lies above them.

    The robust z-score: the distance to the median in units of the median absolute deviation, which spikes in the window
    do not stretch as they would a standard deviation (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993).
    """

    def __init__(self, size: int) -> None:
        self._losses: deque[float] = deque(maxlen=size)

    @property
    def median(self) -> float:
        return statistics.median(self._losses)

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def deviations(self, loss: float) -> float:
        """How many of them `loss` lies above the median; 0 as long as the window is not full."""
        if len(self._losses) < (self._losses.maxlen or 0):
            return 0.0
        median = self.median
        spread = statistics.median(abs(each - median) for each in self._losses)
        one = max(NORMAL * spread, LEAST_DEVIATION * abs(median))
        return (loss - median) / one if one else 0.0

    def to_list(self) -> list[float]:
        return list(self._losses)

    def restore(self, losses: list[float]) -> None:
        """Of a window of any size: the newest that have room."""
        self._losses = deque(losses, maxlen=self._losses.maxlen)


@dataclass(frozen=True)
class Trouble:
    """Why a run cannot go on behind a step."""

    step: int
    action: str
    """rewind or stop."""
    reason: str


class Guard:
    """Judges each step twice: its loss before the update, its gradient norm behind it."""

    def __init__(self, config: AnomalyConfig) -> None:
        self._config = config
        self._window = LossWindow(config.window)
        self._loss = 0.0
        self._found: tuple[str, str] | None = None
        self.skips = 0
        """Steps in a row that were skipped for trouble, up to now."""
        self.skipped = ""
        """Why the last step changed nothing; empty where it did."""
        self.trouble: Trouble | None = None
        """Set where the run must not go on."""

    def refuses(self, loss: float) -> bool:
        """Whether the step with this loss, of the global batch, must change nothing."""
        self._loss, self._found, self.skipped = loss, None, ""
        if not math.isfinite(loss):
            self._found = self._config.non_finite, f"the loss is {loss}"
        elif (above := self._window.deviations(loss)) > self._config.threshold and self._config.spike != "off":
            what = f"{above:.1f} deviations above the median {self._window.median:.4f} of {self._config.window} losses"
            self._found = self._config.spike, f"the loss {loss:.4f} is a spike, {what}"
        return self._found is not None

    def gives_up(self, step: int, grad_norm: float, *, overflowed: bool = False) -> bool:
        """Whether the run must not go on behind step `step`; `trouble` tells why. Else the step counts, and `skipped`
        tells whether it changed anything.

        `overflowed`: the gradient was dropped for fp16's loss scale, which has been lowered."""
        if self._found is None and not math.isfinite(grad_norm):
            if overflowed:
                self.skipped = "the gradient overflowed at this loss scale"
                return False
            self._found = self._config.non_finite, "the gradient norm is not finite"
        if self._found is None:
            self.skips = 0
            self._window.add(self._loss)
            return False
        action, reason = self._found
        if action in ("rewind", "stop"):
            self.trouble = Trouble(step, action, reason)
        elif action == "skip" and self.skips + 1 >= self._config.max_skips:
            self.trouble = Trouble(
                step, "rewind", f"{self.skips + 1} steps in a row were skipped, this one since {reason}"
            )
        else:
            self.skips += action == "skip"
            self.skipped = reason
        return self.trouble is not None

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": self._window.to_list(), "skips": self.skips}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on as `to_dict` was asked for; afresh from nothing."""
        self._window.restore([float(loss) for loss in values.get("losses", ())])
        self.skips, self.skipped, self.trouble = int(values.get("skips", 0)), "", None
