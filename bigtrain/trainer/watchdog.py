"""A rank that waits for ever says so, with the place where it and every other rank is, and the run ends.

Each rank has a thread that knows what the rank is doing (a phase) and for how long. Where a limit is passed, on any
rank, it leaves an alarm in RUN/logs/hang; all ranks see it there, write where their threads are, and one of
them makes one sentence of it (`bigtrain.trainer.verdict`). Then all end with the status HUNG. Files, because the
process groups are what hangs, and rank 0 may be the one.

A second thread judges what is late, and touches no file: where the disk of the run is what hangs, nobody can be told of
it, and that thread ends the process alone, ENDS_S behind the limit.

Both need Python's interpreter (GIL), which every wait of torch lets go of: collectives, the disk, the network, a
GPU. For code that keeps it there is a timer in C (faulthandler), which the first sets again every second: when it
cannot, the timer writes the stacks. A rank that the kernel has stopped writes nothing; the others tell its state
where it runs on their machine. A process beside each rank would see both itself, at the price of a process a rank.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from bigtrain.config.schema import WatchdogConfig
from bigtrain.config.status import HUNG
from bigtrain.telemetry import failures
from bigtrain.trainer import stacks
from bigtrain.trainer.hang import Hang

T = TypeVar("T")
POLL_S = 1.0
SILENT_S = 5.0
"""Without a turn of the thread, after which the timer in C writes the stacks."""
ENDS_S = 25.0
"""From the alarm, after which the process ends without a verdict."""
CLOSES_S = 5.0
_REMEMBERED = 50
"""Phases of a kind whose median counts."""


def limit_s(phase: str, limits: WatchdogConfig, took: Sequence[float]) -> float:
    """Seconds that a phase may take; `took`: what the last ones of its kind did. Infinite where it is switched off."""
    given = {
        "startup": limits.startup_s,
        "data": limits.data_s,
        "step": limits.step_s,
        "eval": limits.eval_s,
        "save": limits.save_s,
        "end": limits.startup_s,
    }[phase]
    if not given:
        return math.inf
    if not took:  # a compiler, a cold cache, the first connections
        return max(given, limits.startup_s or math.inf)
    return max(given, limits.factor * statistics.median(took))


@dataclass
class _Open:
    """A phase that a thread is in."""

    name: str
    began: float
    """Moved on by what another phase inside of it took."""


@dataclass(frozen=True)
class Late:
    """A phase that has passed its limit."""

    phase: str
    thread: int
    seconds: float
    limit_s: float


@dataclass
class Watchdog:
    """What this rank is doing, and for how long. It watches from `start` on; without that, it only keeps the books."""

    limits: WatchdogConfig = field(default_factory=WatchdogConfig)
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    """The step that the rank is in; 0 before the first."""
    on_hang: Callable[[], None] | None = None
    """Called, from a thread of its own and for CLOSES_S at most, before a rank that hangs ends."""
    _open: dict[int, list[_Open]] = field(default_factory=dict[int, list[_Open]])
    """By thread, the innermost last."""
    _took: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_REMEMBERED)))
    _ended: threading.Event = field(default_factory=threading.Event)
    _late: Late | None = None
    """The first that was found, until the process ends."""
    _ends_at: float = math.inf
    """Of `clock`: then this process ends, whatever it waits for."""

    @contextmanager
    def phase(self, name: str, *, is_measured: bool = True) -> Iterator[None]:
        """What is done inside is `name`: data, step, eval, save. The clock of a phase around it stands still.
        `is_measured`: how long it takes tells how long the next may."""
        inside = self._open.setdefault(threading.get_ident(), [])
        entered = _Open(name, self.clock())
        inside.append(entered)
        try:
            yield
        finally:
            inside.remove(entered)
            took = self.clock() - entered.began
            if is_measured:
                self._took[name].append(took)
            for outer in inside:
                outer.began += took
            if not inside:
                del self._open[threading.get_ident()]

    def at(self, name: str) -> None:
        """This thread goes over to phase `name`, which is around all others."""
        inside = self._open.setdefault(threading.get_ident(), [])
        if inside:
            self._took[inside[0].name].append(self.clock() - inside[0].began)
        inside[:1] = [_Open(name, self.clock())]

    def steps(self, batches: Iterable[T], *, done: int) -> Iterator[T]:
        """The batches: they are waited for in phase data, and used in phase step. `done`: steps before the first."""
        iterator = iter(batches)
        self.step = done
        try:
            while True:
                self.step += 1
                self.at("data")
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self.at("step")
                yield batch
        finally:
            self.at("end")

    def thread_in(self, phase: str) -> int:
        """The ident of the thread that is in this phase, and of the main one only where no other is: it may wait for
        that."""
        main = threading.main_thread().ident or 0
        found = [ident for ident, inside in list(self._open.items()) if inside and inside[-1].name == phase]
        return next((ident for ident in found if ident != main), main)

    def late(self) -> Late | None:
        """The phase that has passed its limit by the most, if any has."""
        found: list[Late] = []
        for ident, inside in list(self._open.items()):
            for each in inside[-1:]:
                limit, seconds = limit_s(each.name, self.limits, list(self._took[each.name])), self.clock() - each.began
                if seconds > limit:
                    found.append(Late(each.name, ident, seconds, limit))
        return max(found, key=lambda late: late.seconds - late.limit_s, default=None)

    def forgive(self, seconds: float) -> None:
        """This process did not run for so long: what it is in has not taken that time."""
        for inside in list(self._open.values()):
            for each in inside:
                each.began += seconds

    def start(self, run_dir: Path, *, rank: int, world: int) -> None:
        """Watch, from a thread of its own, to the end of the process or to `stop`. The rank is in phase startup."""
        self.at("startup")
        threading.Thread(target=self._judge, name="watchdog of limits", daemon=True).start()
        begun = time.time()
        host = socket.gethostname()
        place = {"start": failures.start_of(), "rank": rank, "host": host, "pid": os.getpid(), "time": begun}
        metrics = failures.stamp(run_dir)  # of before: whether this attempt does a step
        failures.write_json(failures.place_file(run_dir, rank), {**place, "metrics": metrics})
        hang = Hang(run_dir, rank=rank, world=world, begun=begun, host=host)
        hang.begin()
        text = hang.text_file.open("w+b")
        threading.Thread(target=self._watch, args=(hang, text), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _judge(self) -> None:
        """Find what is late, and end the process where that leads to nothing. No file: a disk may be what hangs."""
        last = self.clock()
        while not self._ended.wait(POLL_S):
            now = self.clock()
            if now - last > POLL_S + SILENT_S:  # stopped and let go on, or starved
                self.forgive(now - last - POLL_S)
            last = now
            self._late = self._late or self.late()
            if self._late is not None:
                self._ends_at = min(self._ends_at, now + ENDS_S)
            if now >= self._ends_at:
                os._exit(HUNG)

    def _watch(self, hang: Hang, text: IO[bytes]) -> None:
        while not self._ended.wait(POLL_S):
            _renew(text)
            late, alarm = self._late, hang.alarm()
            if late is not None and alarm is None:
                alarm = hang.raise_alarm(late.phase, step=self.step, seconds=late.seconds, limit_s=late.limit_s)
            if alarm is not None and not self._ended.is_set():
                self._end(hang, alarm)
        faulthandler.cancel_dump_traceback_later()
        text.close()
        hang.text_file.unlink(missing_ok=True)

    def _end(self, hang: Hang, alarm: dict[str, Any]) -> None:
        """Say where this rank is, wait for the others, and end this process. Does not return."""
        self._ends_at = min(self._ends_at, self.clock() + ENDS_S)
        faulthandler.dump_traceback_later(ENDS_S + CLOSES_S, exit=True)  # where code keeps the interpreter: status 1
        try:
            place = {"phase": alarm["phase"], "step": self.step, "thread": self.thread_in(alarm["phase"])}
            hang.answer(place, stacks.threads())
            closing = threading.Thread(target=self.on_hang, daemon=True)
            closing.start()
            hang.conclude(alarm)
            closing.join(CLOSES_S)
        finally:
            os._exit(HUNG)


def _renew(text: IO[bytes]) -> None:
    """Set the timer again. What it wrote meanwhile is of no use: this thread runs."""
    if os.fstat(text.fileno()).st_size:
        text.truncate(0)
        text.seek(0)
    faulthandler.dump_traceback_later(SILENT_S, file=text)
