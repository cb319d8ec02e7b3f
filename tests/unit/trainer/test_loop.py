"""The loop's own decisions: when it evaluates, saves and stops. What it drives only writes down what it is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtrain.config.schema import (
    AnomalyConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from bigtrain.data.loader import StepBatch
from bigtrain.data.mixture import Mixture, Stage
from bigtrain.data.order import Cursor
from bigtrain.engine.engine import LossSum
from bigtrain.telemetry.goodput import Clock
from bigtrain.trainer.anomaly import Guard
from bigtrain.trainer.loop import Position, Throughput, due, fit, last_step, timed
from bigtrain.trainer.pace import Pace
from bigtrain.trainer.watchdog import Watchdog

MIXTURE = Mixture([Stage(0, {"data": Fraction(1)})], 8)
CONFIG = Config(
    train=TrainConfig(num_steps=10, global_batch_size=4, sequence_length=8),
    optim=OptimConfig(lr=2.0),
    schedule=ScheduleConfig(name="constant", warmup_steps=4),
    eval=EvalConfig(interval=4),
    checkpoint=CheckpointConfig(interval=3),
)


@dataclass
class Log:
    """Engine, evaluator, saver, recorder and stop signal in one: each writes down what it is asked."""

    done: list[tuple[Any, ...]] = field(default_factory=list)
    stop_at: int | None = None
    signal_in: tuple[str, int] | None = None
    """Evaluation set, and the batch of it in which a signal comes."""
    told: str = ""
    losses: list[float | None] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)
    durable: list[str] = field(default_factory=list)
    nan_at: tuple[int, ...] = ()
    runtime: Any = None
    overflowed: bool = False

    def forward_backward(self, microbatches: Any) -> LossSum:
        self.done.append(("forward", *microbatches))
        is_nan = microbatches[0] in [f"batch {step}" for step in self.nan_at]
        return LossSum(torch.tensor(math.nan if is_nan else 6.0), torch.tensor(4))

    def optimizer_step(self, lr: float, *, skip: bool = False) -> float:
        self.done.append(("skip" if skip else "step", lr))
        return math.nan if skip else 0.5

    def evaluate(self, engine: Any, *, stops: Callable[[], bool], name: str) -> Any:
        self.done.append(("measure", name))
        for number in (1, 2):
            if stops():
                break
            self.done.append(("batch", name))
            if (name, number) == self.signal_in:
                self.stop_at = 0
        return SimpleNamespace(as_record=lambda: {"loss": 1.0, "perplexity": 2.0, "bits_per_byte": 3.0})

    def save(self, engine: Any, step: int, cursor: Cursor, loss: float | None = None) -> None:
        self.done.append(("save", step, cursor.num_sequences))
        self.losses.append(loss)
        self.under_way.append(f"save of {step}")

    def finished(self) -> list[str]:
        """A save takes until the step after it."""
        return [self.under_way.pop(0)] if len(self.under_way) > 1 else []

    def wait(self) -> list[str]:
        left, self.under_way = self.under_way, []
        return left

    def saved(self, saves: list[str]) -> None:
        self.durable += saves

    def train(self, step: int, **fields: Any) -> None:
        self.done.append(("train", step, fields))

    def evaluation(self, step: int, **fields: Any) -> None:
        self.done.append(("eval", step, fields["set"]))

    def epochs(self, step: int, epochs: dict[str, float]) -> None:
        self.done.append(("epochs", step, epochs))

    def bad_documents(self, step: int, reasons: list[str]) -> None:
        pass

    def event(self, name: str, **fields: Any) -> None:
        self.done.append((name, fields["step"], fields["reason"]))

    def agreed(self) -> bool:
        if self.stop_at is not None and max(self.steps("train"), default=0) >= self.stop_at:
            self.told = "SIGUSR2"
        return bool(self.told)

    def steps(self, what: str) -> list[int]:
        return [entry[1] for entry in self.done if entry[0] == what]


def endless(start: int) -> Iterator[StepBatch]:
    step = start
    while True:
        step += 1
        yield StepBatch((f"batch {step}",), Cursor(4 * step, "order", MIXTURE), 0.0)  # type: ignore[arg-type]


@dataclass
class Ledger:
    log: Log

    def record(self, step: int, batch: Any) -> None:
        self.log.done.append(("ledger", step))

    def sync(self) -> None:
        pass


def pace_of(config: Config, step: int) -> Pace:
    return Pace(config, step, cost=lambda: None, mtbf_s=None, from_rank_0=lambda number: number, say=print)


def run(
    config: Config,
    *,
    start: int = 0,
    stop_at: int | None = None,
    signal_in: tuple[str, int] | None = None,
    owed: tuple[str, ...] = (),
    sets: tuple[str, ...] = ("",),
    nan_at: tuple[int, ...] = (),
    guard: Guard | None = None,
) -> tuple[Log, Position]:
    log: Any = Log(stop_at=stop_at, signal_in=signal_in, nan_at=nan_at)
    position = fit(
        config,
        Position(start, Cursor(4 * start, "order", MIXTURE)),
        engine=log,
        batches=endless(start),
        evaluators={name: SimpleNamespace(evaluate=partial(log.evaluate, name=name)) for name in sets},  # type: ignore
        epochs=lambda num_sequences: {"folder": num_sequences / 16},
        saver=log,
        recorder=log,
        ledger=Ledger(log),  # type: ignore[arg-type]
        throughput=Throughput(flops_per_token=10.0, peak_flops_per_second=None),
        guard=guard or Guard(config.anomaly),
        clock=Clock(time.time()),
        pace=pace_of(config, start),
        stop=log,
        watchdog=Watchdog(),
        owed=owed,
    )
    return log, position


def test_a_run_evaluates_and_saves_when_due_and_at_the_end() -> None:
    log, position = run(CONFIG)
    assert log.steps("train") == list(range(1, 11))
    assert log.steps("eval") == [4, 8, 10]
    assert log.steps("save") == [3, 6, 9, 10]
    assert position == Position(10, Cursor(40, "order", MIXTURE))


def test_what_is_saved_is_the_place_after_the_step() -> None:
    log, _ = run(CONFIG)
    assert [entry[1:] for entry in log.done if entry[0] == "save"] == [(3, 12), (6, 24), (9, 36), (10, 40)]


def test_saves_are_recorded_when_they_are_durable_and_the_end_waits_for_the_last() -> None:
    log, _ = run(CONFIG)
    assert log.durable == ["save of 3", "save of 6", "save of 9", "save of 10"]
    log, _ = run(CONFIG, stop_at=5)
    assert log.durable == ["save of 3", "save of 5"]


def test_a_checkpoint_notes_the_loss_that_was_measured_at_its_step() -> None:
    log, _ = run(replace(CONFIG, checkpoint=CheckpointConfig(interval=2)))
    assert log.losses == [None, 1.0, None, 1.0, 1.0]


def test_the_order_in_a_step() -> None:
    log, _ = run(replace(CONFIG, checkpoint=CheckpointConfig(interval=4)))
    fourth = [entry[0] for entry in log.done if entry[0] != "forward" or entry[1] == "batch 4"]
    begin = fourth.index("forward")
    evaluated = ["measure", "batch", "batch", "eval", "epochs"]
    assert fourth[begin : begin + 10] == ["forward", "step", "ledger", "train", *evaluated, "save"]


def test_what_is_recorded() -> None:
    log, _ = run(CONFIG)
    records = {entry[1]: entry[2] for entry in log.done if entry[0] == "train"}
    assert [records[step]["tokens"] for step in (1, 10)] == [32, 320]
    assert records[1]["loss"] == 1.5 and records[1]["grad_norm"] == 0.5 and records[1]["mfu"] is None
    assert [records[step]["lr"] for step in (1, 2, 4, 10)] == [0.5, 1.0, 2.0, 2.0]
    assert [entry[1] for entry in log.done if entry[0] == "step"][:4] == [0.5, 1.0, 1.5, 2.0]
    speed = records[1]["tokens_per_second"] * records[1]["step_time_s"]
    assert speed == pytest.approx(32)


def test_an_agreed_stop_saves_there_and_evaluates_only_what_was_due() -> None:
    log, position = run(CONFIG, stop_at=5)
    assert log.steps("train")[-1] == 5 == position.step
    assert log.steps("eval") == [4] and log.steps("save") == [3, 5]


@pytest.mark.parametrize("step", [4, 10])
def test_an_agreed_stop_leaves_the_evaluation_to_the_next_start(step: int) -> None:
    """At a step where a run that goes through evaluates as well."""
    log, position = run(CONFIG, stop_at=step)
    assert position.step == step and [entry[0] for entry in log.done[-2:]] == ["train", "save"]
    rest, position = run(CONFIG, start=step, owed=("",))
    begins = [("measure", ""), ("batch", ""), ("batch", ""), ("eval", step, ""), ("epochs", step, {"folder": step / 4})]
    assert rest.done[:5] == begins and position.step == 10
    assert log.steps("eval") + rest.steps("eval") == run(CONFIG)[0].steps("eval")


@pytest.mark.parametrize("interval", [3, 4])
def test_a_signal_breaks_an_evaluation_off(interval: int) -> None:
    """Whether a save is due behind it or not, there is one, at once."""
    config = replace(CONFIG, checkpoint=CheckpointConfig(interval=interval))
    log, position = run(config, signal_in=("code", 1), sets=("web", "code", "books"))
    behind = [entry[:2] for entry in log.done][log.done.index(("batch", "web")) :]
    web, code = [("batch", "web"), ("batch", "web"), ("eval", 4)], [("measure", "code"), ("batch", "code")]
    assert behind == [*web, *code, ("save", 4)] and position.step == 4
    assert log.losses[-1] is None, "of a part"


def test_a_signal_in_the_last_batch_of_an_evaluation_comes_before_the_next_step() -> None:
    log, position = run(CONFIG, signal_in=("", 2))
    assert position.step == 4 and [entry[:2] for entry in log.done[-3:]] == [("eval", 4), ("epochs", 4), ("save", 4)]


def test_what_is_owed_is_broken_off_as_well() -> None:
    log, position = run(CONFIG, start=4, owed=("",), signal_in=("", 1))
    assert position.step == 4 and log.done == [("measure", ""), ("batch", "")]


def test_stop_after_is_the_last_step_and_the_schedule_does_not_know() -> None:
    log, position = run(replace(CONFIG, train=replace(CONFIG.train, stop_after=2)))
    assert position.step == 2 and log.steps("save") == [2] == log.steps("eval")
    whole, _ = run(CONFIG)
    assert [e for e in log.done if e[0] == "step"] == [e for e in whole.done if e[0] == "step"][:2]


def test_going_on_takes_up_the_schedule_where_it_was() -> None:
    whole, _ = run(CONFIG)
    rest, position = run(CONFIG, start=2)
    assert position.step == 10
    assert [e for e in rest.done if e[0] == "step"] == [e for e in whole.done if e[0] == "step"][2:]


@pytest.mark.parametrize("start", [10, 11])
def test_a_run_that_is_done_does_nothing(start: int) -> None:
    log, position = run(CONFIG, start=start)
    assert log.done == [] and position.step == start


def test_without_an_evaluator_nothing_is_evaluated() -> None:
    log, _ = run(CONFIG, sets=())
    assert log.steps("eval") == [] and log.steps("epochs") == [4, 8, 10] and log.steps("save") == [3, 6, 9, 10]


def test_every_set_is_evaluated_by_its_name() -> None:
    log, _ = run(CONFIG, sets=("code", "books"))
    assert [entry[1:] for entry in log.done if entry[0] == "eval"] == [
        (step, name) for step in (4, 8, 10) for name in ("code", "books")
    ]


def test_epochs_are_those_of_the_sequences_that_were_consumed() -> None:
    log, _ = run(CONFIG, start=2)
    assert [entry[1:] for entry in log.done if entry[0] == "epochs"] == [
        (step, {"folder": 4 * step / 16}) for step in (4, 8, 10)
    ]


def test_a_refused_step_counts_and_says_why() -> None:
    log, position = run(CONFIG, nan_at=(5,))
    assert position == Position(10, Cursor(40, "order", MIXTURE))
    assert log.steps("train") == list(range(1, 11)), "its data are consumed"
    assert [entry[0] for entry in log.done if entry[0] in ("step", "skip")] == ["step"] * 4 + ["skip"] + ["step"] * 5
    assert [entry for entry in log.done if entry[0] == "skipped"] == [("skipped", 5, "the loss is nan")]


def test_nothing_is_saved_while_steps_are_skipped() -> None:
    log, _ = run(CONFIG, nan_at=(3, 4, 5, 6, 10))
    assert log.steps("save") == [9, 10], "but the end is"


@pytest.mark.parametrize(
    ("anomaly", "nan_at", "step", "action"),
    [
        (AnomalyConfig(non_finite="stop"), (5,), 5, "stop"),
        (AnomalyConfig(non_finite="rewind"), (1,), 1, "rewind"),
        (AnomalyConfig(max_skips=2), (4, 6, 7, 8), 7, "rewind"),
    ],
)
def test_where_the_guard_gives_up_the_step_is_not_done(
    anomaly: AnomalyConfig, nan_at: tuple[int, ...], step: int, action: str
) -> None:
    guard = Guard(anomaly)
    log, position = run(replace(CONFIG, anomaly=anomaly), nan_at=nan_at, guard=guard)
    assert position == Position(step - 1, Cursor(4 * (step - 1), "order", MIXTURE))
    assert log.steps("train") == log.steps("ledger") == list(range(1, step))
    assert guard.trouble is not None and (guard.trouble.step, guard.trouble.action) == (step, action)
    assert log.under_way == [], "what was being saved is durable"


def test_due() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))


@pytest.mark.parametrize(("stop_after", "expected"), [(None, 10), (4, 4), (10, 10), (99, 10)])
def test_last_step(stop_after: int | None, expected: int) -> None:
    assert last_step(Config(train=TrainConfig(num_steps=10, stop_after=stop_after))) == expected


def test_last_step_of_tokens() -> None:
    train = TrainConfig(num_steps=10, num_tokens=100, global_batch_size=4, sequence_length=8)
    assert last_step(Config(train=train)) == 4


def test_the_wait_for_data_is_part_of_the_step() -> None:
    def slow() -> Iterator[Any]:
        for number in range(2):
            time.sleep(0.05)
            yield number

    found = [(batch, seconds()) for batch, seconds in timed(slow())]
    assert [batch for batch, _ in found] == [0, 1]
    assert all(0.05 <= seconds < 5 for _, seconds in found)


def test_mfu() -> None:
    assert Throughput(10.0, 1000.0).mfu(25.0) == 0.25
    assert Throughput(10.0, None).mfu(25.0) is None
