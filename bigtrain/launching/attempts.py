"""A run on this machine from its start to its end: when it fails the cause is told, and it is started again where that
can help."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from bigtrain.config.schema import Config
from bigtrain.launching import failure, local
from bigtrain.launching.failure import RankEnd
from bigtrain.launching.restarts import Failure, refused
from bigtrain.telemetry import failures

LINGER_S = 4.0
"""A rank that lost another notices by itself, and closes W&B as failed."""


def train(config: Config) -> int:
    """As `run`. Returns the exit status of the last attempt."""
    return run(config).status


def run(config: Config) -> local.Ended:
    """Start the ranks until the run ends, at most `cluster.max_restarts` times again. Returns how the last attempt
    ended."""
    run_dir, limit = Path(config.run.dir), config.cluster.max_restarts
    failed: list[Failure] = []
    while True:
        metrics, kills = failures.stamp(run_dir), failure.oom_kills()
        commands = local.rank_commands(config)
        start = failures.start_of({**os.environ, **commands[0].environment})
        ended = local.watch(
            commands,
            linger_s=LINGER_S,
            is_effect=lambda child, start=start: failure.is_effect(run_dir, _end_of(child), start),
        )
        if not ended.failed:
            return ended
        new_kills = failure.oom_kills() - kills
        found = failure.find(run_dir, [_end_of(child, new_kills) for child in ended.failed], start, metrics)
        failed.append(found)
        why_not = refused(failed, limit, has_trained=failure.has_trained(run_dir)) or (
            "SIGUSR2 told it to end" if ended.was_warned else ""
        )
        if found.kind == "crash":
            with contextlib.suppress(OSError):  # the disk may be full
                failures.append_event(run_dir, "crash", rank=found.rank, cause=found.cause, step=found.step)
        _say(found, ended, why_not, f"restart {len(failed)} of {limit}")
        if why_not:
            return ended


def _say(found: Failure, ended: local.Ended, why_not: str, restart: str) -> None:
    """The cause is the last line; what the rank wrote is above it."""
    if found.kind != "hang":
        local.show_output(ended.failed[:1] if found.kind == "crash" else ended.failed)
    if found.kind == "user":
        return
    print(f"not started again: {why_not}" if why_not else restart, file=sys.stderr)
    print(f"error: {failure.told(found, ended.failed[0].command.log)}", file=sys.stderr, flush=True)


def _end_of(child: local.Child, new_kills: int = 0) -> RankEnd:
    rank = int(child.command.environment["RANK"])
    return RankEnd(rank, child.process.returncode, new_kills)
