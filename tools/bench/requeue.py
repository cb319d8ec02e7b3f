"""Seconds from a fault to the next step of a Slurm job, and the steps that it cost.

    make slurm                                                 # two nodes on this machine, or a cluster of your own
    python tools/bench/requeue.py --rounds 3                   # 2 nodes x 2 ranks of a small model on CPUs
    python tools/bench/requeue.py cluster.partition=gpu ...    # any settings of bigtrain.launch behind these

One job is submitted as a user does it. In each round SIGUSR2 goes to it, as Slurm sends it ahead of the time limit, and
then SIGKILL to the last rank, where that runs on this machine. The job is cancelled at the end. Times are seen by
polling, so they may be a tenth of a second late.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bigtrain.launching.meeting import fields_of
from bigtrain.telemetry.failures import place_file
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics

LIMIT_S = 600.0
POLL_S = 0.05
STEPS_BETWEEN = 15
"""From a start to the next fault: more than a checkpoint apart."""
SETTINGS = [
    "+cluster=slurm", "cluster.num_nodes=2", "cluster.procs_per_node=2", "cluster.cpus_per_proc=1",
    "cluster.device=cpu", "cluster.time=00:30:00", "cluster.max_restarts=1000", "precision=fp32", "tracker=none",
    "model=tiny", "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "train.sequence_length=64", "train.num_steps=1000000", "eval.interval=0", "checkpoint.interval=10",
]  # fmt: skip


@dataclass
class Run:
    """A job, and what is to be seen of it."""

    folder: Path
    job: str
    restarts: int = 0
    faults: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def shown(self) -> dict[str, str]:
        return fields_of(slurm("scontrol", "--oneliner", "show", "job", self.job))

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS_FILE
        return read_metrics(path) if path.is_file() else []

    def last_step(self) -> int:
        return max((record["step"] for record in self.records() if record["kind"] == "train"), default=0)

    def resumed(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if record.get("name") == "resume"]


def main() -> int:
    options, more = parse()
    name = f"bench-requeue-{os.getpid()}"
    launch = [sys.executable, "-m", "bigtrain.launch", *SETTINGS, f"run.name={name}", *more]
    said = subprocess.run(launch, stdout=subprocess.PIPE, text=True)
    found = re.search(r"\bjob (\d+)", said.stdout)
    placed = re.search(r"^run folder\s+(.+)$", said.stdout, re.MULTILINE)
    if said.returncode or found is None or placed is None:
        print(said.stdout, end="")
        return said.returncode or 1
    run = Run(Path(placed[1]), found[1])
    try:
        for _ in range(options.rounds):
            one("SIGUSR2 to the job", run, lambda: slurm("scancel", "--signal=USR2", run.job))
            if (last := last_rank_here(run)) is not None:
                one("SIGKILL of a rank", run, partial(os.kill, last, signal.SIGKILL))
    finally:
        slurm("scancel", run.job)
    print(table(run))
    wait("the job's end", lambda: run.shown()["JobState"] not in ("RUNNING", "COMPLETING"))
    shutil.rmtree(run.folder)
    return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="of bigtrain.launch")
    options = parser.parse_intermixed_args()
    return options, options.settings


def one(fault: str, run: Run, strike: Callable[[], object]) -> None:
    """Let the run train, strike, and time what follows."""
    start = run.last_step()
    wait("steps", lambda: run.last_step() >= start + STEPS_BETWEEN)
    resumed, at = len(run.resumed()), run.last_step()
    marks = {"fault": time.time()}
    strike()
    marks["queued again"] = wait("the requeue", lambda: int(run.shown()["Restarts"]) > run.restarts)
    run.restarts += 1
    marks["allocation"] = wait("the allocation", lambda: run.shown()["JobState"] == "RUNNING")
    marks["rank 0's process"] = wait("rank 0", lambda: begun(run.folder) > marks["allocation"] - 1)
    marks["first step"] = wait("a step", lambda: len(run.resumed()) > resumed and stepped(run))
    times = list(marks.values())
    spans = {name: end - begin for name, begin, end in zip(list(marks)[1:], times, times[1:], strict=False)}
    (*_, last) = run.resumed()
    found = {**spans, "in all": times[-1] - times[0], "steps again": max(at - last["step"], 0)}
    run.faults.setdefault(fault, []).append(found)
    print(f"{fault}: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()), file=sys.stderr, flush=True)


def begun(folder: Path) -> float:
    """When the newest process of rank 0 said where it is; 0 before the first."""
    path = place_file(folder, 0)
    return path.stat().st_mtime if path.exists() else 0.0


def stepped(run: Run) -> bool:
    """Whether a step stands behind the last resume."""
    names = [record.get("name", record["kind"]) for record in run.records()]
    return "train" in names[len(names) - names[::-1].index("resume") :]


def last_rank_here(run: Run) -> int | None:
    """Process of the last rank, where it runs on this machine."""
    last = max((run.folder / "logs" / "ranks").glob("rank-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    place = json.loads(last.read_text(encoding="utf-8"))
    return place["pid"] if place["host"] == socket.gethostname() else None


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait(what: str, until: Callable[[], bool]) -> float:
    """Returns when it was so, of time.time()."""
    deadline = time.monotonic() + LIMIT_S
    while not until():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {what} did not come within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)
    return time.time()


def table(run: Run) -> str:
    rows: list[str] = []
    for fault, rounds in run.faults.items():
        rows.append(f"{fault}, {len(rounds)} rounds: median (lowest to highest)")
        for name in rounds[0]:
            values = [each[name] for each in rounds]
            unit = "" if name == "steps again" else " s"
            spread = f"({min(values):.1f} to {max(values):.1f})"
            rows.append(f"  {statistics.median(values):6.1f}{unit:<2} {spread:<16} {name}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
