"""What a person sees of a run: phases of the start-up, progress, evaluations.

On a terminal, one live line that is always up to date. On a pipe or in a log file, one plain line every so many
steps, so that a month of training stays readable.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from bigtrain.config import epochs
from bigtrain.telemetry.streams import tolerant

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WIDE = 120
"""Columns of a terminal that has room for a bar beside the numbers."""


class Console:
    """Writes to `stream`. On ranks that are not to speak, ``enabled=False`` makes every method silent."""

    def __init__(
        self,
        *,
        enabled: bool = True,
        log_interval: int = 10,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`log_interval`: steps between lines where `stream` (standard output if None) is no terminal."""
        self._enabled = enabled
        self._log_interval = max(1, log_interval)
        self._stream = tolerant(stream if stream is not None else sys.stdout)
        self._clock = clock
        self._num_steps = 0
        self._first: tuple[int, float] | None = None
        """The first step seen and when it ended: what the time to go is reckoned from."""
        self._live: tuple[Progress, TaskID] | None = None
        self._at_line_start = True

    @property
    def is_terminal(self) -> bool:
        """Whether there is a live line rather than a log."""
        return self._stream.isatty() and os.environ.get("TERM") != "dumb"

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Say what is being done, before it is done, and how many seconds it took, after."""
        begin = self._clock()
        if self._live is None:
            self._print(f"{text} ... ", end="")
        try:
            yield
        except BaseException:
            if self._live is None:
                self._print("failed")
            raise
        took = f"{self._clock() - begin:.1f} s"
        self.note(took if self._live is None else f"{text} ... {took}")

    def note_at_once(self, text: str) -> None:
        """As `note`, but safe in a signal handler: it takes no lock and touches no buffer."""
        if not self._enabled:
            return
        line = text if self._at_line_start and self._live is None else "\n" + text
        with contextlib.suppress(OSError):  # whoever read us may be gone
            os.write(self._stream.fileno(), line.encode() + b"\n")

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self._live is None:
            self._print(text)
        else:
            self._live[0].console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, *, num_steps: int, at_step: int) -> None:
        """Training is about to begin: `at_step` of `num_steps` steps are done."""
        self._num_steps = num_steps
        self._first = None
        if not (self._enabled and self.is_terminal):
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        terminal = RichConsole(file=self._stream)
        how_far = [BarColumn(bar_width=20), TextColumn("{task.percentage:.1f}% ")] if terminal.width >= _WIDE else []
        progress = Progress(
            TextColumn("step {task.completed}/{task.total} ", markup=False),
            *how_far,
            TextColumn("{task.description}", markup=False),
            console=terminal,
            refresh_per_second=4,
            transient=True,
        )
        progress.start()
        self._live = progress, progress.add_task("", total=num_steps, completed=at_step)

    def train(self, record: Mapping[str, Any]) -> None:
        """Show a train record of metrics.jsonl."""
        if not self._enabled:
            return
        step = record["step"]
        text = self._train_text(record)
        if self._live is not None:
            progress, task = self._live
            progress.update(task, completed=step, description=text)
        elif self._first is None or step % self._log_interval == 0 or step == self._num_steps:
            width = len(str(self._num_steps))
            self._print(f"step {step:{width}d}/{self._num_steps}  {step / max(1, self._num_steps):6.1%}  {text}")
        if self._first is None:
            self._first = step, self._clock()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an eval record of metrics.jsonl."""
        of = f" of {record['set']}" if record.get("set") else ""
        text = f"evaluation{of} at step {record['step']}: loss {record['loss']:.4f}"
        text += f"  perplexity {record['perplexity']:.2f}"
        if record["bits_per_byte"] is not None:
            text += f"  bits/byte {record['bits_per_byte']:.3f}"
        self.note(text)

    def epochs(self, record: Mapping[str, Any]) -> None:
        """Show an epochs event of metrics.jsonl."""
        self.note(f"epochs at step {record['step']}: {epochs.told(record['epochs'])}")

    def close(self) -> None:
        """Take the live line away; what was noted stays. A second call does nothing."""
        if self._live is not None:
            self._live[0].stop()
            self._live = None

    def _train_text(self, record: Mapping[str, Any]) -> str:
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            text += f"  mfu {record['mfu']:.1%}"
        if self._first is not None and record["step"] > self._first[0]:
            # Wall time, so that evaluations and saves are in it; the first step, with its warm-up, is not.
            step, since = self._first
            seconds_per_step = (self._clock() - since) / (record["step"] - step)
            text += f"  {duration(seconds_per_step * (self._num_steps - record['step']))} to go"
        return text

    def _print(self, text: str, *, end: str = "\n") -> None:
        if self._enabled:
            self._at_line_start = end == "\n"
            print(text, end=end, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: 0:07, 12:34, 1:02:03, 3 days 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock
