"""Whether a Slurm job has time to train: behind its start-up, and ahead of the save that ends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.cluster import ClusterConfig
from bigtrain.config.cluster_rules import time_limit_minutes
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config
from bigtrain.telemetry.goodput import attempts_in
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics

EARLY_S = 60
"""Slurm may give its warning so much earlier than it was told to (sbatch --signal)."""


@dataclass(frozen=True)
class Takes:
    """Seconds that a run takes for what it must have time for: the most of its attempts."""

    start_up_s: float = 30.0
    """Few runs take less."""
    save_s: float = 0.0
    step_s: float = 0.0


def problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the time limit, by what the run's earlier attempts took, where there are any."""
    if config.cluster.kind == "slurm":
        yield from too_short(config.cluster, _takes(Path(config.run.dir) / METRICS_FILE))


def too_short(cluster: ClusterConfig, takes: Takes) -> Iterator[Problem]:
    """Pure."""
    minutes, ending_s = time_limit_minutes(cluster.time), takes.step_s + takes.save_s
    if cluster.signal_s < ending_s:
        message = f"the run takes {takes.step_s:.0f} s for a step and {takes.save_s:.0f} s for a save"
        yield Problem("cluster.signal_s", cluster.signal_s, message, f"Set it to {2 * ending_s:.0f}")
    needed_s = takes.start_up_s + EARLY_S + max(cluster.signal_s, ending_s)
    if minutes is not None and minutes * 60 < needed_s:
        message = (
            f"start-up takes {takes.start_up_s:.0f} s, and Slurm tells the run {cluster.signal_s} s ahead of the limit "
            f"(cluster.signal_s), or up to {EARLY_S} s earlier, to save"
        )
        yield Problem("cluster.time", cluster.time, message, f"Ask for {-(-needed_s // 60):.0f} minutes or more")


def _takes(metrics: Path) -> Takes:
    records = read_metrics(metrics) if metrics.is_file() else []
    start_up = [attempt.parts.get("start_up", 0.0) for attempt in attempts_in(records)]
    saves = [record["seconds"] for record in records if record.get("name") == "checkpoint"]
    steps = sorted(record["step_time_s"] for record in records if record["kind"] == "train")
    usual_step_s = steps[len(steps) // 2] if steps else 0.0
    return Takes(max(start_up, default=Takes.start_up_s), max(saves, default=0.0), usual_step_s)
