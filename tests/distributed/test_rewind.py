"""Whole runs on real data whose numbers go wrong: what they are is a run that never saw those data.

The numbers go wrong with the data: the loss of the sequences in BAD, whatever step is fed them.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import frozen
from bigtrain.config.schema import AnomalyConfig, CheckpointConfig, Config, ParallelConfig
from bigtrain.data.passed_over import FILE, read
from bigtrain.trainer.watchdog import Watchdog
from tests.distributed.harness import PoolFactory, RankError, patched
from tests.integration.runs import build_shards, committed, config_of, records, trajectory

STEPS, SIZE, BACK = 14, 8, 4
BAD = range(6 * SIZE, 9 * SIZE)
"""What steps 7, 8 and 9 are fed."""
SPIKE = AnomalyConfig(spike="rewind", window=4)
SKIPS = AnomalyConfig(max_skips=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data") / "shards")


def config(run_dir: Path, data: Path, anomaly: AnomalyConfig, world: int = 1, zero_stage: int = 1) -> Config:
    base = config_of(run_dir, data)
    found = replace(
        base,
        parallel=ParallelConfig(zero_stage=zero_stage),
        train=replace(base.train, num_steps=STEPS),
        checkpoint=CheckpointConfig(interval=BACK, keep=9),
        cluster=replace(base.cluster, procs_per_node=world),
        anomaly=anomaly,
    )
    frozen.save(found, run_dir)
    return found


def train(config: Config, factor: float = 1.0, kill: str = "", jump: int = 0) -> str:
    """On a rank: the whole run, in which the loss of BAD is `factor` times what it is. Returns the user's error.

    `kill`: where rank 0 is killed. `jump`: the global sequence that it goes on with behind its checkpoint."""
    from bigtrain.config.errors import UserError
    from bigtrain.data import passed_over
    from bigtrain.engine.engine import Engine, LossSum
    from bigtrain.telemetry.console import Console
    from bigtrain.telemetry.recorder import Recorder
    from bigtrain.trainer import peers, training
    from bigtrain.trainer import run as running
    from bigtrain.trainer.saver import Saver

    is_bad, begun = False, 0
    agreed, forward_backward, load = peers.agreed, Engine.forward_backward, Saver.load
    add, go_back, ledger, record = passed_over.add, Recorder.go_back, training.LedgerFile, Recorder.train

    def watched(*arguments: Any) -> Iterator[Any]:
        nonlocal is_bad
        for batch in agreed(*arguments):
            is_bad = batch.cursor.num_sequences - SIZE in BAD
            yield batch

    def spoiled(engine: Any, microbatches: Any) -> LossSum:
        loss = forward_backward(engine, microbatches)
        return LossSum(loss.nats * factor, loss.tokens) if is_bad else loss

    def jumped(saver: Any, *arguments: Any) -> Any:
        step, cursor = load(saver, *arguments)
        return step, replace(cursor, num_sequences=jump or cursor.num_sequences)

    def die(where: str) -> None:
        if kill == where and int(os.environ["RANK"]) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def added(*arguments: Any) -> Any:
        die("before")
        found = add(*arguments)
        die("behind")
        return found

    def gone_back(*arguments: Any) -> None:
        go_back(*arguments)
        die("metrics")

    def ledger_again(*arguments: Any) -> Any:
        nonlocal begun
        found, begun = ledger(*arguments), begun + 1
        if begun > 1:
            die("ledger")
        return found

    def recorded(recorder: Any, step: int, **fields: Any) -> None:
        record(recorder, step, **fields)
        if begun > 1 and step == BACK + 2:
            die("later")

    with (
        patched(running, "stop", lambda: None),  # the harness does that
        patched(peers, "agreed", watched),
        patched(Engine, "forward_backward", spoiled),
        patched(Saver, "load", jumped),
        patched(passed_over, "add", added),
        patched(Recorder, "go_back", gone_back),
        patched(training, "LedgerFile", ledger_again),
        patched(Recorder, "train", recorded),
    ):
        try:
            running.run(config, Path(config.run.dir), Console(enabled=False), Watchdog())
        except UserError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def never_saw(pool: PoolFactory, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trajectory of a run that jumps over BAD by hand, of so many ranks."""
    done: dict[int, list[tuple[Any, ...]]] = {}

    def of(world: int, zero_stage: int) -> list[tuple[Any, ...]]:
        if world not in done:
            run_dir = tmp_path_factory.mktemp("runs") / f"oracle-{world}"
            whole = config(run_dir, data, AnomalyConfig(), world, zero_stage)
            to_there = replace(whole, train=replace(whole.train, stop_after=BACK))
            assert pool(world).run(train, to_there) == [""] * world
            assert pool(world).run(train, whole, jump=BAD.stop) == [""] * world
            done[world] = trajectory(run_dir)
        return done[world]

    return of


def batches_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).parents[2] / "tools" / "batches.py"
    return subprocess.run([sys.executable, str(tool), *arguments], capture_output=True, text=True, timeout=120)


def check(run_dir: Path, expected: list[tuple[Any, ...]], windows: list[tuple[int, int]]) -> None:
    """It is the run that never saw BAD; metrics and ledger say so."""
    assert trajectory(run_dir) == expected, "bit for bit, each step once"
    assert [(each.first, each.end) for each in read(run_dir)] == windows
    events = [event for event in records(run_dir, "event") if event["name"] == "rewind"]
    assert [(event["first"], event["end"]) for event in events] == windows
    assert all((event["step"], event["to_step"]) == (BACK, BACK) for event in events)
    audit = batches_tool("audit", str(run_dir))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert f"{STEPS} steps, {SIZE * STEPS} sequences" in audit.stdout and "proven" in audit.stdout
    assert f"{BAD.stop - BACK * SIZE} sequences passed over on purpose" in audit.stdout


@pytest.mark.parametrize(("world", "zero_stage"), [(1, 1), (2, 3)])
def test_a_spike_and_skips_in_a_row(
    pool: PoolFactory, data: Path, never_saw: Any, tmp_path: Path, world: int, zero_stage: int
) -> None:
    """A spike is passed over as soon as it is met, so three bad steps take three times; skips in a row take one."""
    expected = never_saw(world, zero_stage)
    first = BACK * SIZE
    for name, anomaly, factor, ends in (("spike", SPIKE, 3.0, (56, 64, 72)), ("skips", SKIPS, math.nan, (72,))):
        wanted = config(tmp_path / name, data, anomaly, world, zero_stage)
        assert pool(world).run(train, wanted, factor) == [""] * world
        check(tmp_path / name, expected, [(first, end) for end in ends])
    rewind = next(event for event in records(tmp_path / "spike", "event") if event["name"] == "rewind")
    assert rewind["from_step"] == 7 and rewind["reason"].startswith("the loss ") and " is a spike, " in rewind["reason"]
    shown = batches_tool("show", str(tmp_path / "spike"), "--step", str(STEPS + 2))
    assert f"step {STEPS + 2}: global sequences {BAD.stop + (STEPS + 1 - BACK) * SIZE} to" in shown.stdout


@pytest.mark.parametrize("where", ["before", "behind", "metrics", "ledger", "later"])
def test_killed_in_the_middle_of_it(pool: PoolFactory, data: Path, never_saw: Any, tmp_path: Path, where: str) -> None:
    """Before or behind the act; with metrics.jsonl or the ledger still, or no more, those of the steps given up."""
    expected = never_saw(1, 1)
    wanted = config(tmp_path / "run", data, SKIPS)
    with pytest.raises(RankError):
        pool(1).run(train, wanted, math.nan, kill=where)
    assert (tmp_path / "run" / FILE).exists() == (where != "before")
    assert committed(tmp_path / "run") == [BACK]
    assert pool(1).run(train, wanted, math.nan) == [""]
    check(tmp_path / "run", expected, [(BACK * SIZE, BAD.stop)])


def test_back_to_a_save_amid_skips(pool: PoolFactory, data: Path, tmp_path: Path) -> None:
    """The data behind it are passed over, and skips in a row are counted anew: else each bad step would lead back."""
    run_dir = tmp_path / "run"
    whole = config(run_dir, data, AnomalyConfig(max_skips=2))
    assert pool(1).run(train, replace(whole, train=replace(whole.train, stop_after=7)), math.nan) == [""]
    assert committed(run_dir) == [BACK, 7]
    assert pool(1).run(train, whole, math.nan) == [""]
    assert [(each.first, each.end) for each in read(run_dir)] == [(7 * SIZE, 8 * SIZE)]
    assert [event["step"] for event in records(run_dir, "event") if event["name"] == "skipped"] == [7, 8]
    assert batches_tool("audit", str(run_dir)).returncode == 0


def test_stop_saves_the_state_before_and_goes_on_when_told(pool: PoolFactory, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    wanted = config(run_dir, data, AnomalyConfig(non_finite="stop"))
    (error,) = pool(1).run(train, wanted, math.nan)
    folder = run_dir / "checkpoints" / "step-00000006"
    assert error.startswith(f"step 7: the loss is nan, and anomaly says stop. The state before it is in {folder}.")
    assert error.count("\n") == 0 and committed(run_dir) == [BACK, 6]
    assert pool(1).run(train, wanted, math.nan) == [error], "it meets the same numbers"
    assert committed(run_dir) == [BACK, 6] and len(trajectory(run_dir)) == 6
    assert pool(1).run(train, replace(wanted, anomaly=AnomalyConfig()), math.nan) == [""]
    skipped = [(event["step"], event["reason"]) for event in records(run_dir, "event") if event["name"] == "skipped"]
    assert skipped == [(step, "the loss is nan") for step in (7, 8, 9)]
    assert [record["step"] for record in records(run_dir, "train")] == list(range(1, STEPS + 1))
    assert batches_tool("audit", str(run_dir)).returncode == 0


def test_no_way_back(pool: PoolFactory, data: Path, tmp_path: Path) -> None:
    """No checkpoint yet, or too many times already: one line, and nothing on the disk has changed."""
    early = config(tmp_path / "early", data, replace(SKIPS, max_skips=1))
    early = replace(early, checkpoint=CheckpointConfig(interval=0))
    (error,) = pool(1).run(train, early, math.nan)
    assert error.startswith("step 7: 1 steps in a row were skipped, this one since the loss is nan, and there is no ")
    assert not (tmp_path / "early" / FILE).exists()
    often = config(tmp_path / "often", data, replace(SPIKE, max_rewinds=2))
    (error,) = pool(1).run(train, often, 3.0)
    assert "The run went back 2 times already, and anomaly.max_rewinds=2." in error
    assert committed(tmp_path / "often") == [BACK] and len(read(tmp_path / "often")) == 2


def test_all_ranks_save_when_rank_0_says(pool: PoolFactory, data: Path, tmp_path: Path) -> None:
    """checkpoint.interval=auto: by the clock of one; ranks that disagreed would wait for each other."""
    wanted = config(tmp_path / "run", data, AnomalyConfig(), world=2, zero_stage=3)
    wanted = replace(
        wanted,
        checkpoint=CheckpointConfig(interval="auto", keep=99, keep_every=3),
        cluster=replace(wanted.cluster, mtbf_h=1e-5),
    )
    assert pool(2).run(train, wanted) == ["", ""]
    saved = committed(tmp_path / "run")
    assert {3, 6, 9, 12, STEPS} <= set(saved)
    parts = [record for record in records(tmp_path / "run", "event") if record["name"] == "goodput"]
    assert parts[-1]["ended"] and parts[-1]["save_stall_s"] > 0
