"""A time limit that leaves no time to train, and a warning that leaves none to save."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config.schema import ClusterConfig, Config, RunConfig
from bigtrain.launching.time_limit import Takes, problems, too_short
from bigtrain.telemetry.goodput import Attempt
from bigtrain.telemetry.metrics import MetricsFile


@pytest.mark.parametrize(
    ("time", "signal_s", "takes", "named"),
    [
        ("03:00", 90, Takes(), []),
        ("02:59", 90, Takes(), []),  # Slurm counts minutes
        ("02:00", 90, Takes(), ["cluster.time"]),
        ("10:00", 600, Takes(), ["cluster.time"]),
        ("12:00", 600, Takes(), []),
        ("12:00", 90, Takes(start_up_s=600), ["cluster.time"]),
        ("1-0", 90, Takes(600, save_s=80, step_s=11), ["cluster.signal_s"]),
        ("1-0", 91, Takes(600, save_s=80, step_s=11), []),
        ("no time", 90, Takes(), []),  # said elsewhere
    ],
)
def test_what_must_fit(time: str, signal_s: int, takes: Takes, named: list[str]) -> None:
    cluster = ClusterConfig(kind="slurm", time=time, signal_s=signal_s)
    assert [problem.key for problem in too_short(cluster, takes)] == named


def test_what_earlier_attempts_took_counts(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    metrics.append({"kind": "event", "name": "goodput", **Attempt(1.0, {"start_up": 400.0}).to_event()})
    metrics.append({"kind": "train", "step": 1, "step_time_s": 3.0})
    metrics.append({"kind": "event", "name": "checkpoint", "step": 1, "seconds": 200.0})
    metrics.close()
    config = Config(run=RunConfig(dir=str(tmp_path)), cluster=ClusterConfig(kind="slurm", time="00:10:00"))
    assert [str(problem) for problem in problems(config)] == [
        "cluster.signal_s=90: the run takes 3 s for a step and 200 s for a save. Set it to 406.",
        "cluster.time=00:10:00: start-up takes 400 s, and Slurm tells the run 90 s ahead of the limit "
        "(cluster.signal_s), or up to 60 s earlier, to save. Ask for 12 minutes or more.",
    ]
    assert not list(problems(Config(run=RunConfig(dir=str(tmp_path)))))
