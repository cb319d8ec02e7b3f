"""Ranks that fail in a Slurm job: it says why and is queued again where that can help, as on one machine.

The faults are those of `tools.faults.rank`; ranks 2 and 3 are on the second node.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.status import USER_ERROR
from tests.integration.runs import committed, records, trajectory
from tests.integration.slurm.cluster import SOURCE, Cluster
from tests.integration.slurm.test_train_on_slurm import (
    LAUNCH,
    STEPS,
    TWO_NODES,
    at_step,
    logs,
    settings,
    submitted,
)
from tools.faults.rank import Fault

pytestmark = pytest.mark.slow
FAULTS = Path(__file__).with_name("faults")
SAVED = ["checkpoint.interval=10", "cluster.max_restarts=3"]


def faulty(run_dir: Path, rank: int, place: str, call: int, act: str, *, once: bool = True) -> dict[str, str]:
    """Variables for a job whose rank gets the fault, in its first attempt or in all."""
    notes = run_dir.with_name(run_dir.name + "-notes")
    if once:
        notes.mkdir(parents=True)
    fault = Fault(place, act, rank, call, notes=str(notes) if once else "")
    return {**fault.environment(), "PYTHONPATH": f"{FAULTS}:{SOURCE}"}


def event(run_dir: Path, name: str) -> dict[str, Any]:
    (found,) = [record for record in records(run_dir, "event") if record["name"] == name]
    return found


def last_lines(output: Path) -> list[str]:
    """Of the job's output, without what Slurm itself says when it ends the script of a job that is queued again."""
    lines = [line for line in output.read_text().splitlines() if not line.startswith("slurmstepd")]
    at = max(number for number, line in enumerate(lines) if "queued again: " in line)
    return lines[at:]


def test_a_rank_that_is_killed_on_the_second_node(cluster: Cluster, data: Path, folder: Path, here: Path) -> None:
    run_dir = folder / "runs" / "killed"
    fault = faulty(run_dir, rank=2, place="step", call=25, act="SIGKILL")
    job_id = submitted(cluster.ask(*LAUNCH, *settings(data, "killed"), *TWO_NODES, *SAVED, cwd=folder, **fault))
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(run_dir)
    output = (run_dir / "logs" / "slurm" / f"{job_id}_0_log.err").read_text()
    told = re.search(r"queued again: restart 1 of 3\nerror: (rank 2 was killed by SIGKILL .*), at step 25; its", output)
    assert told, output
    assert event(run_dir, "crash").items() >= {"rank": 2, "step": 25, "cause": told[1]}.items()
    assert event(run_dir, "resume")["step"] == 20
    assert trajectory(run_dir) == trajectory(here) and committed(run_dir)[-1] == STEPS
    assert "Traceback" not in output, "rank 0 has only lost it"


def test_a_rank_that_is_stopped_in_the_plain_script(cluster: Cluster, data: Path, folder: Path, here: Path) -> None:
    limits = ["watchdog.startup_s=150", "watchdog.step_s=4"]
    cluster.ask(*LAUNCH, *settings(data, "stopped"), *TWO_NODES, *SAVED, *limits, "--freeze", cwd=folder)
    run_dir = folder / "runs" / "stopped"
    fault = faulty(run_dir, rank=3, place="step", call=25, act="SIGSTOP")
    script = ["--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--job-name=stopped", "--time=30"]
    command = ["sbatch", *script, SOURCE / "launchers" / "slurm.sbatch", run_dir]
    job_id = submitted(cluster.ask(*command, cwd=folder, BIGTRAIN_PYTHON=sys.executable, **fault))
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(run_dir)
    verdict = event(run_dir, "hang")["verdict"]
    assert verdict.startswith("rank 3 does not answer (state T: stopped); ") and "wait for it in all_reduce" in verdict
    lines = (folder / f"stopped-{job_id}.out").read_text().splitlines()
    assert lines[lines.index("queued again: restart 1 of 3") + 1] == f"error: {verdict}"
    assert trajectory(run_dir) == trajectory(here)


def test_an_exception_that_comes_again(cluster: Cluster, data: Path, folder: Path) -> None:
    """Once to see whether it does."""
    run_dir = folder / "runs" / "raised"
    fault = faulty(run_dir, once=False, rank=1, place="step", call=5, act="raise")
    more = ["cluster.max_restarts=3", "train.stop_after=8"]
    job_id = submitted(cluster.ask(*LAUNCH, *settings(data, "raised"), *TWO_NODES, *more, cwd=folder, **fault))
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "1", "1:0"), logs(run_dir)
    log = run_dir / "logs" / "slurm" / f"{job_id}_1_log.err"
    assert last_lines(log.with_name(f"{job_id}_0_log.err")) == [
        "not queued again: it failed so at step 5 before",
        f"error: rank 1: ValueError: a fault, at step 5; its output: {log}",
    ]
    assert len([each for each in records(run_dir, "event") if each["name"] == "crash"]) == 2
    assert "ValueError: a fault\nthat is injected\n" in log.read_text()


def test_a_mistake_of_the_user(cluster: Cluster, data: Path, folder: Path) -> None:
    """Slurm kills the other ranks; that is not what is told."""
    run_dir = folder / "runs" / "mistaken"
    fault = faulty(run_dir, once=False, rank=2, place="open", call=1, act="user")
    job_id = submitted(
        cluster.ask(*LAUNCH, *settings(data, "mistaken"), *TWO_NODES, "cluster.max_restarts=3", cwd=folder, **fault)
    )
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", f"{USER_ERROR}:0"), logs(run_dir)
    log = run_dir / "logs" / "slurm" / f"{job_id}_2_log.err"
    assert last_lines(log.with_name(f"{job_id}_0_log.err"))[0] == "not queued again: the same settings would fail again"
    assert "error: a mistake\nthat is injected\n" in log.read_text()


def test_a_node_that_is_lost(cluster: Cluster, data: Path, folder: Path, here: Path) -> None:
    """Slurm queues the job again itself, and it counts as no failure of the run's."""
    saved = ["checkpoint.interval=10", "cluster.max_restarts=0"]
    job_id = submitted(cluster.ask(*LAUNCH, *settings(data, "lost"), *TWO_NODES, *saved, cwd=folder))
    run_dir = folder / "runs" / "lost"
    at_step(run_dir, 15)
    cluster.lose("node1")
    cluster.wait(job_id, lambda job: job["JobState"] == "PENDING")
    cluster.bring_back("node1")
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(run_dir)
    assert trajectory(run_dir) == trajectory(here)
    assert event(run_dir, "resume")["step"] >= 10


def test_a_job_that_is_cancelled_stays_ended(cluster: Cluster, data: Path, folder: Path) -> None:
    """While its ranks start, before they listen: SIGTERM ends them, which is no failure."""
    run_dir = folder / "runs" / "cancelled"
    job_id = submitted(cluster.ask(*LAUNCH, *settings(data, "cancelled"), *TWO_NODES, cwd=folder))
    cluster.wait(job_id, lambda job: (run_dir / "logs" / "ranks" / "rank-3.json").exists())
    cluster.ask("scancel", job_id)
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), logs(run_dir)
    assert "queued again: restart" not in logs(run_dir)
