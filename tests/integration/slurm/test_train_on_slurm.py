"""2 nodes x 2 ranks on a real Slurm, through the launcher and with the plain script, stopped and queued again."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from bigtrain.launching.environment import free_port
from bigtrain.telemetry.failures import place_file
from tests.integration.runs import committed, records, trajectory
from tests.integration.slurm.cluster import DEADLINE_S, SOURCE, Cluster

pytestmark = pytest.mark.slow
LAUNCH = (sys.executable, "-m", "bigtrain.launch")
STEPS = 60
FOUR_RANKS = ["cluster.procs_per_node=4"]
TWO_NODES = [
    "+cluster=slurm",
    "cluster.num_nodes=2",
    "cluster.procs_per_node=2",
    "cluster.cpus_per_proc=1",
    "cluster.partition=main",
    "cluster.time=00:30:00",
    "precision=fp32",
]


def settings(data: Path, name: str) -> list[str]:
    """Of a tiny run; its folder is runs/NAME."""
    return [
        f"run.name={name}",
        f"data.train=[{{path: {data}/train}}]",
        f"data.valid=[{{path: {data}/valid}}]",
        "data.prepare.inputs=[]",
        "data.num_lanes=8",
        f"tokenizer.path={data}/train/tokenizer.model",
        "model.vocab_size=512",
        "tokenizer.vocab_size=512",
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.num_attention_heads=4",
        "model.num_query_groups=2",
        "model.ffn_hidden_size=128",
        "parallel.tensor=2",
        f"train.num_steps={STEPS}",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.sequence_length=64",
        "schedule.warmup_steps=5",
        "checkpoint.interval=0",
        "eval.interval=0",
        "eval.num_batches=1",
        "tracker.kind=none",
        "cluster.device=cpu",
    ]


def logs(run_dir: Path) -> str:
    """All that the ranks and the batch scripts said."""
    files = [*run_dir.glob("logs/slurm/*_log.*"), *run_dir.parent.parent.glob(f"{run_dir.name}-*.out")]
    return "\n".join(path.read_text() for path in sorted(files))


def submitted(said: str) -> str:
    """The job's id in what the launcher or sbatch said."""
    found = re.search(r"job (\d+)", said)
    assert found, said
    return found[1]


def at_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ((run_dir / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(run_dir, "train"))):
        assert time.monotonic() < deadline, logs(run_dir)
        time.sleep(0.02)


def is_the_run(run_dir: Path, here: Path, stopped_by: str) -> None:
    """Bit for bit, each step once, though `stopped_by` stopped it on the way: two nodes of two ranks are four ranks."""
    assert [record["step"] for record in records(here, "train")] == list(range(1, STEPS + 1))
    assert trajectory(run_dir) == trajectory(here)
    events = {record["name"]: record for record in records(run_dir, "event")}
    assert events["stop"]["signal"] == stopped_by and 1 <= events["stop"]["step"] < STEPS
    assert events["resume"]["step"] == events["stop"]["step"] and events["resume"]["lines_removed"] == 0
    assert committed(run_dir) == [events["stop"]["step"], STEPS]
    assert (run_dir / "code" / "bigtrain" / "__pycache__").is_dir(), "the ranks ran the copy of the code"


def test_warned_by_slurm_it_saves_and_queues_itself_again(
    cluster: Cluster, data: Path, folder: Path, here: Path
) -> None:
    """What Slurm does ahead of the time limit. The launcher returns at once; a second launch is refused meanwhile."""
    begin = time.monotonic()
    command = [*LAUNCH, *settings(data, "launched"), *TWO_NODES]
    said = cluster.ask(*command, cwd=folder)
    assert time.monotonic() - begin < 30, "the launcher waited for the job"
    run_dir, job_id = folder / "runs" / "launched", submitted(said)
    assert f"run folder  {run_dir}" in said and f"squeue -j {job_id}" in said
    for launch in (command, [*LAUNCH, *settings(data, "launched"), *FOUR_RANKS]):
        again = cluster.run(*launch, cwd=folder)
        assert again.returncode == 2 and f"job {job_id} (" in again.stderr and "in Slurm's queue" in again.stderr
    at_step(run_dir, 1)
    cluster.ask("scancel", "--signal=USR2", job_id)
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(run_dir)
    is_the_run(run_dir, here, "SIGUSR2")


def test_a_save_that_ends_behind_the_time_limit_is_queued_again(
    cluster: Cluster, data: Path, folder: Path, here: Path
) -> None:
    """Slurm sends its warning and SIGTERM, and the job is over; the save has until SIGKILL."""
    run_dir = folder / "runs" / "limit"
    job_id = submitted(cluster.ask(*LAUNCH, *settings(data, "limit"), *TWO_NODES, cwd=folder))
    at_step(run_dir, 1)
    process = json.loads(place_file(run_dir, 3).read_text())["pid"]
    os.kill(process, signal.SIGSTOP)  # Slurm looks at time limits twice a minute: all steps would be done before
    cluster.ask("scontrol", "update", f"JobId={job_id}", "EndTime=now")
    cluster.wait(job_id, lambda job: job["JobState"] != "RUNNING")
    os.kill(process, signal.SIGCONT)
    cluster.wait(job_id, lambda job: job["JobState"] == "PENDING")
    cluster.ask("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(run_dir)
    assert "DUE TO TIME LIMIT" in logs(run_dir)
    (stop,) = [record for record in records(run_dir, "event") if record["name"] == "stop"]
    is_the_run(run_dir, here, stop["signal"])


def test_the_plain_script_is_preempted_and_goes_on(cluster: Cluster, data: Path, folder: Path, here: Path) -> None:
    """A job of a better partition takes its nodes: Slurm sends SIGTERM, twice, and queues it again."""
    cluster.ask(*LAUNCH, *settings(data, "plain"), *TWO_NODES, "--freeze", cwd=folder)
    run_dir = folder / "runs" / "plain"
    script = ["--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--job-name=plain"]
    variables = {"BIGTRAIN_PYTHON": sys.executable}
    command = ["sbatch", "--partition=spot", "--time=30", *script, SOURCE / "launchers" / "slurm.sbatch", run_dir]
    job_id = submitted(cluster.ask(*command, cwd=folder, **variables))
    again = cluster.run(*LAUNCH, *settings(data, "plain"), *FOUR_RANKS, "--freeze", cwd=folder)
    assert again.returncode == 2 and f"job {job_id} (" in again.stderr
    at_step(run_dir, 1)
    cluster.ask("sbatch", "--partition=main", "--nodes=2", "--cpus-per-task=8", "--output=/dev/null", "--wrap=true")
    job = cluster.ended(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(run_dir)
    is_the_run(run_dir, here, "SIGTERM")


def test_torchrun(cluster: Cluster, data: Path, folder: Path, here: Path) -> None:
    """Two ranks instead of four: the same run to rounding."""
    few = ["train.stop_after=3", "cluster.procs_per_node=2"]
    cluster.ask(*LAUNCH, *settings(data, "torchrun"), *few, "--freeze", cwd=folder)
    run_dir, torchrun = folder / "runs" / "torchrun", Path(sys.executable).with_name("torchrun")
    variables = {"RANKS": "2", "PORT": str(free_port()), "TORCHRUN": str(torchrun), "OMP_NUM_THREADS": "1"}
    cluster.ask(SOURCE / "launchers" / "torchrun.sh", run_dir, cwd=folder, **variables)
    losses = [[record["loss"] for record in records(path, "train")[:3]] for path in (run_dir, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and committed(run_dir) == [3]
    assert (run_dir / "code" / "bigtrain" / "__pycache__").is_dir(), "the ranks ran the copy of the code"
