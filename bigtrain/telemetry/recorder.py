"""The one thing that the training loop reports to: it writes metrics.jsonl, shows progress and feeds W&B.

Every rank holds a `Recorder` and calls it alike; only the writer's, rank 0's, does anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.goodput import Account, Clock, Past, account
from bigtrain.telemetry.metrics import METRICS_FILE, MetricsFile, read_metrics
from bigtrain.telemetry.tracking import FINISH_S, HURRIED_FINISH_S, WandbTracker


class Save(Protocol):
    """How a save ended (`bigtrain.trainer.saver.Outcome`)."""

    @property
    def step(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def error(self) -> str: ...


class Recorder:
    """Where the records of a run go. Also a context manager, which closes it, as failed where an exception leaves
    it."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        *,
        num_steps: int,
        resume_step: int,
        console: Console,
        is_writer: bool = True,
        clock: Clock | None = None,
    ) -> None:
        """`resume_step`: optimizer steps that are done already, 0 in a new run. Lines of later steps, which an earlier
        attempt wrote and this one computes again, leave metrics.jsonl, and an event says so. `clock`: of this attempt,
        which is told each step; its account is recorded."""
        self._console = console
        self._clock = clock
        self._signal_s = float(config.cluster.signal_s) if config.cluster.kind == "slurm" else math.inf
        """From Slurm's warning to the end; infinite once it was said that it is too short."""
        self._step_s = 0.0
        self.past = Past()
        """What earlier attempts left; known on the writer."""
        self._metrics: MetricsFile | None = None
        self._tracker: WandbTracker | None = None
        if not is_writer:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        self._metrics = MetricsFile(self._path, resume_step=resume_step, see=self.past.see)
        self._computed_before(self.past.last_step)
        if not self.past.is_noted:
            self.event("goodput", **self.past.attempts[-1].to_event())
        self._account()
        if config.tracker.kind == "wandb" and config.tracker.mode != "disabled":
            with console.phase(f"starting W&B ({config.tracker.mode})"):
                self._tracker = WandbTracker(run_dir, config, warn=console.note)
        if resume_step or self._metrics.num_removed or self._metrics.num_unreadable:
            self.event(
                "resume" if resume_step else "restart",
                step=resume_step,
                lines_removed=self._metrics.num_removed,
                lines_unreadable=self._metrics.num_unreadable,
            )
        console.start(num_steps=num_steps, at_step=resume_step)

    def train(
        self,
        step: int,
        *,
        tokens: int,
        loss: float,
        lr: float,
        grad_norm: float,
        step_time_s: float,
        tokens_per_second: float,
        mfu: float | None,
    ) -> None:
        """An optimizer step is done. `tokens`: of the run so far; `tokens_per_second`: of all ranks together; `mfu`:
        0 to 1, None where no peak is known. Loss and gradient norm are of the global batch."""
        record = {
            "kind": "train",
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_time_s": step_time_s,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }
        self._step_s = step_time_s
        if self._clock is not None:
            self._clock.step_done(step)
        if self._write(record):
            self._console.train(record)

    def evaluation(
        self, step: int, *, loss: float, perplexity: float, bits_per_byte: float | None, set: str = ""
    ) -> None:
        """The held-out loss after `step`, in nats a token; its exponential; and in bits a byte of text, where known.
        `set`: name of the evaluation set, where it has one."""
        record = {
            "kind": "eval",
            "step": step,
            **({"set": set} if set else {}),
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": bits_per_byte,
        }
        if self._write(record):
            self._console.evaluation(record)

    def epochs(self, step: int, epochs: Mapping[str, float]) -> None:
        """How often each source, by its folder, was gone through in the run's first `step` steps."""
        record = {"kind": "event", "name": "epochs", "step": step, "epochs": dict(epochs)}
        if self._write(record):
            self._console.epochs(record)

    def event(self, name: str, **fields: Any) -> None:
        """Something that a reader of the run should know: a save, a signal, a skipped batch. Give the `step` where
        there is one. Goes to metrics.jsonl only."""
        self._write({"kind": "event", "name": name, **fields})

    def go_back(self, step: int, windows: Iterable[Mapping[str, Any]]) -> None:
        """The run goes on from `step`: lines of later steps leave metrics.jsonl, and an event `rewind` is there once
        for each of the windows of data that lie ahead (bigtrain.data.passed_over)."""
        if self._metrics is None:
            return
        self._metrics.close()
        given_up = Past()
        self._metrics = MetricsFile(self._path, resume_step=step, see=given_up.see)
        self._computed_before(given_up.last_step)
        events = [{"kind": "event", "name": "rewind", "step": window["to_step"], **window} for window in windows]
        known = [record for record in read_metrics(self._path) if record.get("name") == "rewind"] if events else []
        for event in events:
            if event not in known:
                self._write(event)
        self._account()

    def saved(self, saves: Iterable[Save]) -> None:
        """Saves that have ended, durable or failed."""
        for save in saves:
            if save.error:
                self.event("checkpoint_failed", step=save.step, reason=save.error)
                self._console.note(f"{save.error}. Training goes on; the checkpoints before it are as they were")
                continue
            self.event(
                "checkpoint",
                step=save.step,
                seconds=round(save.seconds, 3),
                stall_s=round(save.stall_s, 3),
                num_bytes=save.num_bytes,
            )
            self._console.note(
                f"checkpoint of step {save.step}: {save.num_bytes / 1e6:,.1f} MB in {save.seconds:.1f} s"
            )
            self._say_if_late(save)
            self._account()

    def _say_if_late(self, save: Save) -> None:
        """Once: that Slurm's warning comes too late for a save that takes so long."""
        needed_s = self._step_s + save.seconds
        if needed_s <= self._signal_s:
            return
        self.event("late_save", step=save.step, seconds=round(needed_s, 3), signal_s=self._signal_s)
        self._console.note(
            f"warning: a step and a save take {needed_s:.0f} s, and Slurm warns {self._signal_s:.0f} s ahead of the "
            f"time limit: the last save may be cut off. Set cluster.signal_s={2 * needed_s:.0f} at the next launch"
        )
        self._signal_s = math.inf

    def bad_documents(self, step: int, reasons: Sequence[str]) -> None:
        """Why data rank 0 passed over documents before this step, one reason each; nothing is recorded of none."""
        if reasons:
            self.event("bad_documents", step=step, skipped=dict(Counter(reasons)))

    def account(self) -> Account | None:
        """Where the time of the run went up to now, over all attempts; None where that is not known."""
        if self._clock is None or self._metrics is None:
            return None
        return account([*self.past.attempts, self._clock.attempt()])

    def close(self, *, failed: bool = False, ended: bool = True, hurried: bool = False) -> None:
        """Finish all outputs. A second call does nothing. `ended`: not by a crash. `hurried`: there is little time, as
        where it failed."""
        self._account(ended=ended)
        self._console.close()
        if self._tracker is not None:
            self._tracker.close(failed=failed, limit_s=HURRIED_FINISH_S if failed or hurried else FINISH_S)
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None, ended=kind is None or issubclass(kind, UserError))

    def _account(self, *, ended: bool = False) -> None:
        if self._clock is not None:
            self.event("goodput", **self._clock.attempt(ended=ended).to_event())

    def _computed_before(self, step: int) -> None:
        if self._clock is not None:
            self._clock.replay_to = max(self._clock.replay_to, step)

    def _write(self, record: Mapping[str, Any]) -> bool:
        """Append `record`; False where this rank is not the writer."""
        if self._metrics is None:
            return False
        self._metrics.append(record)
        if self._tracker is not None:
            self._tracker.log(record)
        return True
