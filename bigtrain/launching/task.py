"""``python -m bigtrain.launching.task RUN``: a task of a Slurm job, started by srun. It is one rank.

It starts `bigtrain.train` and stays beside it, to leave in RUN/logs/ends how the rank ended: a signal leaves nothing
else. Slurm ends all ranks when it sees one fail; so a task whose rank failed waits a little with telling Slurm, for
the others to notice by themselves, and for a save under way. `bigtrain.launching.job_end` reads what they left.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from bigtrain.config import frozen
from bigtrain.config.errors import UserError, exit_status
from bigtrain.config.signals import listen
from bigtrain.config.status import COME_BACK, HUNG, STOPPED
from bigtrain.launching.environment import Place, rank_environment
from bigtrain.launching.failure import RankEnd, oom_kills
from bigtrain.launching.local import die_with_parent
from bigtrain.telemetry import failures

LINGER_S = 12.0
"""A failing rank gives the save under way ten seconds (`bigtrain.trainer.saver`)."""
GRACE_S = 8.0
"""That a rank has when Slurm tells it to end because another has failed. It may be stopped, or wait for ever."""
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""Slurm may have sent it to the rank as well: there a second one changes nothing."""


def place_of(names: Mapping[str, str]) -> Place:
    """Where srun has put this task. MASTER_ADDR and MASTER_PORT are of `bigtrain.launching.meeting`."""
    tasks, nodes = int(names["SLURM_NTASKS"]), int(names["SLURM_JOB_NUM_NODES"])
    return Place(
        rank=int(names["SLURM_PROCID"]),
        local_rank=int(names["SLURM_LOCALID"]),
        world=tasks,
        local_world=tasks // nodes,
        address=names["MASTER_ADDR"],
        port=int(names["MASTER_PORT"]),
    )


def run(run_dir: Path, place: Place, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command of a rank and leave a note of its end. Returns the rank's exit status, 128 + n for signal n."""
    start, kills = failures.start_of(environment), oom_kills()
    received: list[int] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for rank in running if number in PASSED_ON else ():
            rank.send_signal(number)

    # ahead of the rank: a task that a signal kills leaves no note of its end
    for number in (*PASSED_ON, signal.SIGINT):
        listen(number, pass_on)
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent())
    running.append(process)
    for number in [number for number in received if number in PASSED_ON]:  # meanwhile
        process.send_signal(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    returncode = _wait(process, lambda: signal.SIGTERM in received and _another_failed(run_dir, start))
    end = RankEnd(place.rank, returncode, oom_kills() - kills, was_told=signal.SIGTERM in received)
    failures.write_end(run_dir, place.rank, start, end.to_record())
    if returncode not in (0, HUNG):  # those that hung have waited for each other
        _linger(run_dir, start, place.world, received if returncode != STOPPED else ())  # others end well meanwhile
    return end.status


def _wait(process: subprocess.Popen[bytes], is_lost: Callable[[], bool]) -> int:
    """As subprocess has it. Slurm tells all ranks to end when one has failed; one that cannot is not waited for."""
    lost_since = math.inf
    while True:
        try:
            return process.wait(1.0)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if math.isinf(lost_since) and is_lost():
                lost_since = now
            if now - lost_since > GRACE_S:
                process.kill()


def _another_failed(run_dir: Path, start: str) -> bool:
    seen = [failures.read_json(path, start) for path in failures.ends_seen(run_dir, start)]
    ends = [RankEnd.from_record(record) for record in seen if record is not None]
    return any(end.returncode not in (0, COME_BACK, STOPPED) and not end.was_told for end in ends)


def _linger(run_dir: Path, start: str, world: int, received: Sequence[int]) -> None:
    """Until all ranks have ended, LINGER_S at most, or until Slurm tells us to end."""
    deadline = time.monotonic() + LINGER_S
    while time.monotonic() < deadline and signal.SIGTERM not in received:
        if len(failures.ends_seen(run_dir, start)) >= world:
            return
        time.sleep(0.2 + world / 500)  # many tasks look at one file system


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        raise UserError("usage: srun ... python -m bigtrain.launching.task RUN")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # Slurm's warning waits until the rank listens
    run_dir = Path(argv[0])
    place = place_of(os.environ)
    device = frozen.load(run_dir).cluster.device
    environment = {**os.environ, **rank_environment(place, device), failures.SPOKEN_FOR: "1"}
    return run(run_dir, place, [sys.executable, "-m", "bigtrain.train", str(run_dir)], environment)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
