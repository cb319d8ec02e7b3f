"""Where the wall time of a run went, over all its attempts: every second is of one part, so the parts add up to it.

    compute     steps, but for what follows; what is left when a step is recorded belongs to it
    data_wait   the step waits for its batch
    evaluation  held-out loss
    save_stall  training waits for a checkpoint: the copy, the save before it, the last save of all
    start_up    from the process's start to the first batch that it asks for
    replay      steps computed again that an earlier attempt had computed, and lost; going back (trainer/rewind.py)
    lost        between attempts: from what is last known of one to the start of the next

An attempt notes an event `goodput` in metrics.jsonl with its parts so far: when it begins, with each checkpoint, and at
its end. What it did behind its last one, if it was killed, the steps tell, and the next attempt notes it. The share of
compute is what the field calls goodput.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PARTS: tuple[str, ...] = ("compute", "data_wait", "evaluation", "save_stall", "start_up", "replay", "lost")
_COMPUTED_AGAIN: tuple[str, ...] = ("compute", "data_wait", "evaluation")


@dataclass(frozen=True)
class Attempt:
    """One process of rank 0."""

    begin: float
    """Seconds since 1970."""
    parts: Mapping[str, float]
    """Seconds, by the name of the part; `lost` is not one of an attempt."""
    ended: bool = False
    """Whether it ended by itself, or as it was told; else it was killed, crashed, or still runs."""
    replay_to: int = 0
    """Steps up to this one had been computed before."""

    @property
    def wall_s(self) -> float:
        return sum(self.parts.values())

    def to_event(self) -> dict[str, Any]:
        parts = {f"{part}_s": round(seconds, 3) for part, seconds in self.parts.items()}
        return {"begin": round(self.begin, 3), "ended": self.ended, "replay_to": self.replay_to, **parts}

    @staticmethod
    def from_event(record: Mapping[str, Any]) -> Attempt:
        parts = {part: float(record[f"{part}_s"]) for part in PARTS if f"{part}_s" in record}
        return Attempt(float(record["begin"]), parts, bool(record["ended"]), int(record["replay_to"]))

    def with_step(self, step: int, seconds: float) -> Attempt:
        """And a step that was done since."""
        part = "replay" if step <= self.replay_to else "compute"
        return replace(self, parts={**self.parts, part: self.parts.get(part, 0.0) + seconds})


class Clock:
    """Accounts this attempt's time. It runs from `begin` on, in start-up."""

    def __init__(
        self, begin: float, *, now: Callable[[], float] = time.time, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        """`begin`: seconds since 1970, of which `now` tells those of this moment."""
        self.begin = begin
        self.replay_to = 0
        """Steps up to this one were computed before."""
        self._seconds = seconds
        self._last = seconds() - max(now() - begin, 0.0)
        self._part = "start_up"
        self._spent = dict.fromkeys(PARTS[:-1], 0.0)
        self._lap = dict.fromkeys(_COMPUTED_AGAIN, 0.0)
        """Since the last step: replay or not, which is known when the step is done."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done in the block is of this part."""
        before = self._part
        self.go_on_with(name)
        try:
            yield
        finally:
            self.go_on_with(before)

    def go_on_with(self, name: str) -> None:
        """From here on all is of this part."""
        now = self._seconds()
        account = self._lap if self._part in self._lap else self._spent
        account[self._part] += now - self._last
        self._last, self._part = now, name

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; what they take to come is of this part."""
        iterator = iter(items)
        while True:
            with self.part(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def step_done(self, step: int) -> None:
        """What was done since the step before is of this one."""
        self.go_on_with(self._part)
        for part, seconds in self._lap.items():
            self._spent["replay" if step <= self.replay_to else part] += seconds
        self._lap = dict.fromkeys(_COMPUTED_AGAIN, 0.0)

    def attempt(self, *, ended: bool = False) -> Attempt:
        """The account up to now."""
        self.go_on_with(self._part)
        parts = {part: seconds + self._lap.get(part, 0.0) for part, seconds in self._spent.items()}
        return Attempt(self.begin, parts, ended, self.replay_to)


def process_start() -> float:
    """When this process was started, in seconds since 1970. By the clock that runs since the boot: psutil is off by
    up to a second, since /proc/stat has the time of the boot in whole ones. Now, where the kernel is not Linux."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - max(age_s, 0.0)


class Past:
    """What earlier attempts left, from their records in the order of the file."""

    def __init__(self) -> None:
        self.last_step = 0
        """The newest step that was ever recorded."""
        self.attempts: list[Attempt] = []
        self.is_noted = True
        """Whether all that is known of the last attempt stands in a `goodput` event."""
        self._evaluated: dict[int, set[str]] = {}
        """Names of the evaluation sets that were measured, by step."""

    def see(self, record: Mapping[str, Any]) -> None:
        if record.get("name") == "goodput":
            attempt = Attempt.from_event(record)
            if self.attempts and self.attempts[-1].begin == attempt.begin:
                self.attempts.pop()
            self.attempts.append(attempt)
            self.is_noted = True
        elif record.get("kind") == "train":
            self.last_step = max(self.last_step, record["step"])
            if self.attempts and not self.attempts[-1].ended:
                self.attempts[-1] = self.attempts[-1].with_step(record["step"], float(record["step_time_s"]))
                self.is_noted = False
        elif record.get("kind") == "eval":
            self._evaluated.setdefault(record["step"], set()).add(record.get("set", ""))

    def lacks(self, step: int, sets: Iterable[str]) -> list[str]:
        """Which of these evaluation sets no attempt measured at `step`. None where the step is of another run, whose
        checkpoint this one goes on from."""
        known = self._evaluated.get(step, set[str]())
        return [name for name in sets if name not in known] if 0 < step <= self.last_step else []


def attempts_in(records: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """The attempts of a run, from metrics.jsonl."""
    past = Past()
    for record in records:
        past.see(record)
    return past.attempts


@dataclass(frozen=True)
class Account:
    """Of a whole run."""

    parts: Mapping[str, float]
    """Seconds, all of PARTS."""
    num_attempts: int

    @property
    def wall_s(self) -> float:
        """From the first attempt's begin to the last one's end."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        parts = {f"{part}_s": round(seconds, 3) for part, seconds in self.parts.items()}
        return {"wall_s": round(self.wall_s, 3), "attempts": self.num_attempts, **parts}

    def told(self) -> str:
        """One line."""
        from bigtrain.telemetry.console import duration

        share = {part: seconds / (self.wall_s or 1.0) for part, seconds in self.parts.items()}
        rest = [f"{part.replace('_', ' ')} {share[part]:.1%}" for part in PARTS[1:] if share[part] >= 0.0005]
        attempts = f" in {self.num_attempts} attempts" if self.num_attempts > 1 else ""
        goodput = f"goodput {share['compute']:.1%} of {duration(self.wall_s)}{attempts}"
        return f"{goodput}; {', '.join(rest)}" if rest else goodput


def account(attempts: Sequence[Attempt]) -> Account:
    """The parts of all attempts, and what was lost between them."""
    parts = {part: sum(each.parts.get(part, 0.0) for each in attempts) for part in PARTS}
    for before, after in itertools.pairwise(attempts):
        parts["lost"] += max(after.begin - before.begin - before.wall_s, 0.0)  # clocks of two machines may differ
    return Account(parts, len(attempts))


def mean_time_between_failures_s(attempts: Sequence[Attempt], *, least: int = 3) -> float | None:
    """Seconds of running for each failure: an attempt before the last one that did not end by itself. None where there
    were fewer than `least` of them, too few to tell."""
    failures = sum(not each.ended for each in attempts[:-1])
    return sum(each.wall_s for each in attempts) / failures if failures >= least else None
