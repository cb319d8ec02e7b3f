"""The steps of a run, from where it goes on to its end, as often as it has to go back on the way."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data.ledger import Begin
from bigtrain.data.passed_over import behind
from bigtrain.distributed.start import Runtime
from bigtrain.engine.engine import Engine
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.goodput import Clock, mean_time_between_failures_s
from bigtrain.telemetry.recorder import Recorder
from bigtrain.trainer import peers, rewind
from bigtrain.trainer.anomaly import Guard, Trouble
from bigtrain.trainer.ledger_file import LedgerFile
from bigtrain.trainer.loop import Position, Throughput, due, fit, last_step
from bigtrain.trainer.pace import Pace
from bigtrain.trainer.run_data import RunData
from bigtrain.trainer.saver import Saver, checkpoints_to_resume
from bigtrain.trainer.stopping import StopSignal
from bigtrain.trainer.watchdog import Watchdog


@dataclass(frozen=True)
class Training:
    """What `fit` drives, and what is needed to begin again with it."""

    config: Config
    run_dir: Path
    runtime: Runtime
    data: RunData
    engine: Engine
    saver: Saver
    guard: Guard
    clock: Clock
    watchdog: Watchdog
    recorder: Recorder
    console: Console

    def train(self, position: Position, *, throughput: Throughput, stop: StopSignal) -> Position:
        """`fit` from `position` on, and again from wherever the run goes back to. Returns where it stopped. Collective.

        Raises UserError on all ranks where the numbers went wrong and the run is to stop then, or cannot go back."""
        windows = rewind.windows_of(self.run_dir)
        owed = self._owed(position.step)
        while True:
            ahead = [window.to_dict() for window in windows if window.first >= position.cursor.num_sequences]
            if ahead:
                self.recorder.go_back(position.step, ahead)
                self.guard.skips = 0  # of a save that a stop forced amid skips: what comes next is other data
            begin = Begin(position.step, position.cursor.num_sequences)
            batches = peers.agreed(self.data.batches(position.cursor, windows), self.runtime, self.data.order.allow)
            with (
                closing(LedgerFile(self.run_dir, self.config, self.runtime.topology, begin)) as ledger,
                closing(batches),  # its threads have ended before the order goes back
            ):
                position = fit(
                    self.config,
                    position,
                    engine=self.engine,
                    batches=batches,
                    evaluators=self.data.evaluators(),
                    epochs=self.data.order.epochs,
                    saver=self.saver,
                    recorder=self.recorder,
                    ledger=ledger,
                    throughput=throughput,
                    clock=self.clock,
                    watchdog=self.watchdog,
                    guard=self.guard,
                    pace=self._pace(position.step),
                    stop=stop,
                    owed=owed,
                )
                ledger.sync()
            owed = []
            trouble = self.guard.trouble
            if trouble is None:
                return position
            if trouble.action == "stop":
                raise self._stopped(position, trouble)
            found = rewind.check_possible(self.config, self.run_dir, trouble, windows)
            end = behind(windows, position.cursor.num_sequences) + self.config.train.global_batch_size
            self.clock.go_on_with("replay")
            with self.console.phase(f"step {trouble.step}: {trouble.reason}: loading {found[0]}"):
                position, _ = rewind.load(self.config, self.engine, self.saver, self.data.order, found)
            windows = rewind.pass_over(self.run_dir, trouble, position, end)
            self.console.note(
                f"back to step {position.step}, and on behind sequences {position.cursor.num_sequences:,} to "
                f"{end - 1:,} of the data, which are passed over"
            )

    def _owed(self, step: int) -> list[str]:
        """The evaluation sets that this run was to measure at `step`, its last, and did not: a signal came first.
        Collective: rank 0 knows."""
        is_due = step >= last_step(self.config) or due(step, self.config.eval.interval)
        owed = [self.recorder.past.lacks(step, self.data.held_out) if is_due else []]
        dist.broadcast_object_list(owed)
        return owed[0]

    def _pace(self, step: int) -> Pace:
        is_main = self.runtime.is_main

        def from_rank_0(number: int) -> int:
            mine = torch.tensor([number if is_main else 0], dtype=torch.int64)
            return int(self.runtime.all_reduce(mine, op=dist.ReduceOp.MAX).item())

        return Pace(
            self.config,
            step,
            cost=lambda: self.saver.cost,
            mtbf_s=mean_time_between_failures_s([*self.recorder.past.attempts, self.clock.attempt()]),
            from_rank_0=from_rank_0,
            say=self.console.note,
        )

    def _stopped(self, position: Position, trouble: Trouble) -> UserError:
        """Save the state in front of the trouble, if it is not there yet. Collective."""
        folder = self.saver.folder(position.step)
        if position.step and folder not in checkpoints_to_resume(self.config, self.run_dir):
            self.saver.save(self.engine, position.step, position.cursor)
            self.recorder.saved(self.saver.wait())
        failed = self.saver.last is not None and self.saver.last.error
        kept = f" The state before it is in {folder}." if position.step and not failed else ""
        self.recorder.event("stop", step=position.step, reason=f"step {trouble.step}: {trouble.reason}")
        return UserError(
            f"step {trouble.step}: {trouble.reason}, and anomaly says stop.{kept} See what it was fed with "
            f"tools/batches.py show {self.run_dir} --step {trouble.step}. To go on past it: anomaly.non_finite=skip, "
            "anomaly.spike=rewind."
        )
