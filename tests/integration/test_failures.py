"""Ranks that crash and hang in real runs: all end, the cause is told, and the run goes on where that can help.

The faults are real: signals, a pipe that nobody writes to, a limit of the process's memory. `tools/faults/rank.py` puts
them in; `tools/drill.py` does so with all of them in all phases, and test_drill.py with some. What the watchdogs of
ranks agree on without a model: test_watchdogs.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import frozen
from bigtrain.config.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ParallelConfig,
    TrackerConfig,
    WatchdogConfig,
)
from bigtrain.config.status import HUNG
from tests.integration.runs import DEADLINE_S, build_shards, committed, config_of, records
from tests.unit.telemetry.wandb_log import read_finished
from tools.faults.rank import Fault

pytestmark = pytest.mark.slow
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data") / "shards")


def config_for(run_dir: Path, data: Path, **limits: float) -> Config:
    """Saved and evaluated at every fourth step. The limits are of seconds, where they are named."""
    config = config_of(run_dir, data)
    return replace(
        config,
        parallel=ParallelConfig(zero_stage=1),
        train=replace(config.train, num_steps=STEPS),
        eval=EvalConfig(interval=4, num_batches=1),
        checkpoint=CheckpointConfig(interval=4, async_=False),
        watchdog=replace(WatchdogConfig(startup_s=150.0), **limits),
    )


@dataclass
class Failed:
    status: int
    lines: list[str]
    """Of the console."""
    run_dir: Path
    seconds: float
    """From the last step to the end of the launcher."""

    def event(self, name: str) -> dict[str, Any]:
        (found,) = [record for record in records(self.run_dir, "event") if record["name"] == name]
        return found

    def wandb_status(self) -> int:
        """What W&B took down as the run's exit status."""
        (file,) = (self.run_dir / "wandb").glob("offline-run-*/*.wandb")
        (status,) = [record.exit.exit_code for record in read_finished(file) if record.HasField("exit")]
        return status

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in records(self.run_dir, "train")]


def run(config: Config, *, rank: int, place: str, call: int, act: str, once: bool = False) -> Failed:
    run_dir = Path(config.run.dir)
    frozen.save(config, run_dir)
    fault = Fault(place, act, rank, call, notes=str(run_dir) if once else "")
    ended = subprocess.run(
        [sys.executable, "-m", "tools.faults.launcher", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", **fault.environment()},
    )
    ledger = run_dir / "ledger" / "rank-00000.jsonl"
    return Failed(ended.returncode, ended.stdout.splitlines(), run_dir, time.time() - ledger.stat().st_mtime)


def test_a_rank_that_is_stopped(data: Path, tmp_path: Path) -> None:
    config = replace(config_for(tmp_path / "run", data, step_s=4.0), tracker=TrackerConfig())
    failed = run(config, rank=1, place="step", call=6, act="SIGSTOP")
    assert failed.status == HUNG, failed.lines
    verdict = failed.lines[-1].removeprefix("error: ")
    assert re.fullmatch(
        r"rank 1 does not answer \(state T: stopped\); rank 0 waits for it in \w+ \(\d+ of [\w ]+\); "
        r"step 6: step has taken \d+ s and may take 4 \(watchdog\.step_s\)",
        verdict,
    )
    assert failed.lines[-2] == "not started again: cluster.max_restarts=0"
    hang = failed.event("hang")
    assert (hang["verdict"], hang["step"], hang["phase"]) == (verdict, 6, "step")
    assert failed.steps == [1, 2, 3, 4, 5]
    assert failed.seconds < 4 + 30
    found = json.loads((failed.run_dir / "logs" / "hang" / "rank-0.json").read_text())
    (main,) = [thread for thread in found["threads"] if thread["ident"] == found["thread"]]
    assert "bigtrain/trainer/loop.py" in [frame[0] for frame in main["frames"]]
    assert not (failed.run_dir / "logs" / "hang" / "rank-1.json").exists()
    assert failed.wandb_status() == 1


def test_data_that_does_not_come(data: Path, tmp_path: Path) -> None:
    """The rank that waits for it, and what its reading thread is in, where the other one waits for that rank."""
    failed = run(config_for(tmp_path / "run", data, data_s=4.0), rank=1, place="data", call=8, act="stall")
    assert failed.status == HUNG, failed.lines
    assert re.fullmatch(
        r"error: rank 1 is in bigtrain/data/loader\.py:\d+ \(_ahead\), which waits for thread data_0 in "
        r"bigtrain/data/loader\.py:\d+ \(read\), in pathlib\.py:\d+ \(\w+\); rank 0 waits for it in all_reduce "
        r"\(\d+ of default_pg\); step 8: data has taken \d+ s and may take 4 \(watchdog\.data_s\)",
        failed.lines[-1],
    )
    assert failed.steps == list(range(1, 8)) and failed.seconds < 4 + 30
    assert "  pathlib.py:" in (failed.run_dir / "logs" / "hang" / "rank-1.txt").read_text()


def test_a_rank_that_is_killed(data: Path, tmp_path: Path) -> None:
    config = replace(config_for(tmp_path / "run", data), tracker=TrackerConfig())
    failed = run(config, rank=1, place="step", call=6, act="SIGKILL")
    assert failed.status == 137, failed.lines
    assert re.match(r"error: rank 1 was killed by SIGKILL \(.*oom_kill.*\), at step 6; its output: ", failed.lines[-1])
    assert failed.event("crash").items() >= {"rank": 1, "step": 6}.items()
    assert failed.seconds < 30 and committed(failed.run_dir) == [4]
    assert not any("Traceback" in line for line in failed.lines), "rank 0 has only lost it"
    assert failed.wandb_status() == 1


def test_a_rank_that_raises_is_started_again_once(data: Path, tmp_path: Path) -> None:
    """The save that was under way when it failed, in the step before, is not lost."""
    config = config_for(tmp_path / "run", data)
    config = replace(
        config, cluster=replace(config.cluster, max_restarts=1), checkpoint=replace(config.checkpoint, async_=True)
    )
    failed = run(config, rank=1, place="step", call=5, act="raise", once=True)
    assert failed.status == 0, failed.lines
    at = failed.lines.index("restart 1 of 1")
    assert failed.lines[at + 1].startswith("error: rank 1: ValueError: a fault, at step 5; its output: ")
    assert failed.lines[at - 2 : at] == ["[rank 1] ValueError: a fault", "[rank 1] that is injected"]
    crash = {"kind": "event", "name": "crash", "rank": 1, "cause": "rank 1: ValueError: a fault", "step": 5}
    assert failed.event("crash") == crash and failed.event("resume")["step"] == 4
    assert failed.steps == list(range(1, STEPS + 1)), "each step once"


def test_a_rank_without_memory(data: Path, tmp_path: Path) -> None:
    """As often as it is started it fails at the same step: twice, not five times."""
    config = config_for(tmp_path / "run", data)
    config = replace(config, cluster=replace(config.cluster, max_restarts=4), checkpoint=CheckpointConfig(interval=0))
    failed = run(config, rank=1, place="step", call=3, act="memory")
    assert failed.status == 1, failed.lines
    assert failed.lines[-1].startswith("error: rank 1: MemoryError, at step 3; its output: ")
    assert failed.lines[-2] == "not started again: it failed so at step 3 before"
    assert "restart 1 of 4" in failed.lines and "restart 2 of 4" not in failed.lines
    crashes = [record for record in records(failed.run_dir, "event") if record["name"] == "crash"]
    assert [(record["cause"], record["step"]) for record in crashes] == [("rank 1: MemoryError", 3)] * 2
