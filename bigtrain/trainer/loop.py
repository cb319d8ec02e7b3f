"""The training loop: what happens in a step, in order. Nothing in it knows the layout."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from bigtrain.config.derive import num_steps, tokens_per_step
from bigtrain.config.schema import Config
from bigtrain.data.loader import StepBatch
from bigtrain.data.order import Cursor
from bigtrain.engine.engine import Engine
from bigtrain.optim.schedule import share_of_peak
from bigtrain.telemetry.goodput import Clock
from bigtrain.telemetry.recorder import Recorder
from bigtrain.trainer.anomaly import Guard
from bigtrain.trainer.evaluator import Evaluator
from bigtrain.trainer.ledger_file import LedgerFile
from bigtrain.trainer.pace import Pace
from bigtrain.trainer.saver import Saver
from bigtrain.trainer.stopping import StopSignal
from bigtrain.trainer.watchdog import Watchdog


@dataclass(frozen=True)
class Position:
    """Where a run is: what is done, and where the data goes on."""

    step: int
    """Optimizer steps done."""
    cursor: Cursor

    def after(self, batch: StepBatch) -> Position:
        return replace(self, step=self.step + 1, cursor=batch.cursor)


@dataclass(frozen=True)
class Throughput:
    """What turns seconds into the reported speed."""

    flops_per_token: float
    peak_flops_per_second: float | None
    """Of all ranks together; None where it is not known."""

    def mfu(self, tokens_per_second: float) -> float | None:
        if self.peak_flops_per_second is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops_per_second


def fit(
    config: Config,
    start: Position,
    *,
    engine: Engine,
    batches: Iterable[StepBatch],
    evaluators: Mapping[str, Evaluator],
    epochs: Callable[[int], Mapping[str, float]],
    saver: Saver,
    recorder: Recorder,
    ledger: LedgerFile,
    throughput: Throughput,
    clock: Clock,
    guard: Guard,
    pace: Pace,
    stop: StopSignal,
    watchdog: Watchdog,
    owed: Collection[str] = (),
) -> Position:
    """Train from `start` to the last step, to where `stop` is agreed on, or to where `guard` gives up: then to in front
    of the step that went wrong. Returns where it stopped, once all saves have ended.

    `evaluators`: of each evaluation set, by its name. `epochs`: how often each source was gone through in so many
    sequences (`Order.epochs`). `owed`: sets that an attempt which was stopped has not measured at `start`."""
    position, last = start, last_step(config)

    def measure(sets: Collection[str]) -> float | None:
        """Record the loss on each. Returns the first, None where a signal broke it off: it is owed then."""
        losses: list[float] = []
        for name in sets:
            with clock.part("evaluation"), watchdog.phase("eval"):
                found = evaluators[name].evaluate(engine, stops=stop.agreed)
            if stop.told:  # who stops us may not wait
                return None
            record = found.as_record()
            recorder.evaluation(position.step, set=name, **record)
            losses.append(record["loss"])
        recorder.epochs(position.step, epochs(position.cursor.num_sequences))
        stop.agreed()
        return losses[0] if losses else None

    if owed:
        measure(owed)
    if stop.told or position.step >= last:
        return position
    clock.go_on_with("compute")
    for batch, seconds in timed(clock.each("data_wait", watchdog.steps(batches, done=position.step))):
        loss = engine.forward_backward(batch.microbatches)
        lr = config.optim.lr * share_of_peak(position.step, num_steps(config.train), config.schedule)
        loss_value = loss.mean.item()
        grad_norm = engine.optimizer_step(lr, skip=guard.refuses(loss_value))
        if guard.gives_up(position.step + 1, grad_norm, overflowed=engine.overflowed):
            break
        position = position.after(batch)
        ledger.record(position.step, batch)

        step_time_s = seconds()
        tokens_per_second = tokens_per_step(config.train) / step_time_s
        recorder.train(
            position.step,
            tokens=position.step * tokens_per_step(config.train),
            loss=loss_value,
            lr=lr,
            grad_norm=grad_norm,
            step_time_s=step_time_s,
            tokens_per_second=tokens_per_second,
            mfu=throughput.mfu(tokens_per_second),
        )
        recorder.bad_documents(position.step, [skipped.reason for skipped in batch.skipped])
        if guard.skipped:
            recorder.event("skipped", step=position.step, reason=guard.skipped)
        ending, held_out_loss = position.step >= last, None
        if not stop.agreed() and (ending or due(position.step, config.eval.interval)):
            held_out_loss = measure(evaluators)
        # while steps are skipped there is nothing new to save, and a rewind must go back behind them
        if stop.told or ending or (not guard.skips and pace.due(position.step)):
            ledger.sync()
            saver.save(engine, position.step, position.cursor, loss=held_out_loss)
        recorder.saved(saver.finished())
        if stop.told or ending:
            break
    recorder.saved(saver.wait())
    return position


def last_step(config: Config) -> int:
    """Optimizer steps after which this process is done: the schedule's end, or train.stop_after."""
    total = num_steps(config.train)
    return total if config.train.stop_after is None else min(total, config.train.stop_after)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class _Timer:
    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.begin


def timed(batches: Iterable[StepBatch]) -> Iterator[tuple[StepBatch, _Timer]]:
    """Each batch with a clock that runs since it was asked for: the wait for data is part of the step."""
    iterator = iter(batches)
    while True:
        timer = _Timer()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, timer
