"""A real run that is killed and goes on: its wall time is accounted for, and its checkpoints come when they pay."""

from __future__ import annotations

import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bigtrain.config.schema import CheckpointConfig, EvalConfig, ParallelConfig
from bigtrain.telemetry.goodput import PARTS
from tests.integration.runs import at_step, build_shards, config_of, ended, launch, records, run, wait_for

pytestmark = pytest.mark.slow
STEPS, PAUSE_S = 60, 3.0


def test_a_killed_run_accounts_for_all_of_its_time(tmp_path: Path) -> None:
    """The wall clock outside is the oracle; what is not in the account is the launcher's own start and the report."""
    base = config_of(tmp_path / "run", build_shards(tmp_path / "shards"))
    config = replace(
        base,
        parallel=ParallelConfig(zero_stage=1),
        train=replace(base.train, num_steps=STEPS),
        checkpoint=CheckpointConfig(interval="auto", keep=99),
        eval=EvalConfig(interval=20, num_batches=2),
        cluster=replace(base.cluster, procs_per_node=1, mtbf_h=0.01),
    )
    run_dir = tmp_path / "run"
    begin = time.time()
    launcher = launch(config)
    wait_for(at_step(run_dir, 33), launcher)
    for rank in psutil.Process(launcher.pid).children():
        rank.kill()
    first = ended(config, launcher)
    killed = time.time()
    time.sleep(PAUSE_S)
    second = run(config)
    wall_s = time.time() - begin
    assert second.status == 0, second.output

    goodput = json.loads((run_dir / "summary.json").read_text())["goodput"]
    parts = {part: goodput[f"{part}_s"] for part in PARTS}
    assert goodput["attempts"] == 2 and goodput["wall_s"] == pytest.approx(sum(parts.values()), abs=0.01)
    report_s = float(re.search(r"writing report.html ... ([\d.]+) s", second.output)[1])  # type: ignore[index]
    assert wall_s - report_s - 6.0 < goodput["wall_s"] < wall_s
    assert all(seconds > 0 for seconds in parts.values()), parts
    assert PAUSE_S < parts["lost"] < wall_s - (killed - begin)

    (resume,) = [event for event in records(run_dir, "event") if event["name"] == "resume"]
    again = [record for record in records(run_dir, "train") if resume["step"] < record["step"] <= 33]
    seconds = sum(record["step_time_s"] for record in again)
    assert parts["replay"] >= 0.9 * seconds, "what the killed attempt had done already"
    assert re.search(r"^goodput [\d.]+% of 0:\d\d in 2 attempts; ", second.output, re.MULTILINE), second.output
    assert '<div class="bar">' in (run_dir / "report.html").read_text()

    assert "checkpoint.interval=auto: every " in first.output and "0.0 h (cluster.mtbf_h)" in first.output
    saves = [event["step"] for event in records(run_dir, "event") if event["name"] == "checkpoint"]
    assert saves[0] == 10 and saves[-1] == STEPS and len(saves) > 2
    assert all(after > before for before, after in itertools.pairwise(saves))
