"""A task of a Slurm job: the process beside a rank, over a shell in the rank's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.config.status import HUNG, STOPPED
from bigtrain.launching.environment import Place
from bigtrain.launching.failure import RankEnd
from bigtrain.launching.task import place_of
from bigtrain.telemetry import failures

WATCH = """
import os, sys
from pathlib import Path
from bigtrain.launching import task
place = task.Place(1, 1, 2, 2, "127.0.0.1", 1)
sys.exit(task.run(Path(sys.argv[1]), place, sys.argv[2:], os.environ))
"""
TOLD_AT_ONCE = """
import signal, subprocess
start = subprocess.Popen.__init__
def told(*arguments, **options):
    signal.raise_signal(signal.SIGTERM)
    start(*arguments, **options)
subprocess.Popen.__init__ = told
"""
LISTENS = """
import signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: print("warned", flush=True))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("ready", flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
time.sleep(20)
"""
START = failures.start_of()


def started(run_dir: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WATCH, run_dir, *command], stdout=subprocess.PIPE, text=True)


def shell(run_dir: Path, lines: str) -> subprocess.Popen[str]:
    return started(run_dir, "bash", "-c", lines)


def ready(task: subprocess.Popen[str]) -> None:
    assert task.stdout is not None and task.stdout.readline() == "ready\n"


@pytest.mark.parametrize(
    ("lines", "status", "returncode"), [("exit 0", 0, 0), ("exit 75", 75, 75), ("kill -9 $$", 137, -9)]
)
def test_the_end_of_a_rank_is_told(tmp_path: Path, lines: str, status: int, returncode: int) -> None:
    """What the other rank left tells that nobody is to be waited for. What another start left stays: it may be of a
    live run, which the rank finds out."""
    failures.write_end(tmp_path, 0, START, {})
    failures.write_end(tmp_path, 1, "another", {})
    begin = time.monotonic()
    assert shell(tmp_path, lines).wait(20) == status
    assert time.monotonic() - begin < 8
    (found,) = [record for record in failures.ends(tmp_path, START, 2) if record["rank"] == 1]
    assert (found["returncode"], found["was_told"]) == (returncode, False)
    assert len(failures.ends(tmp_path, "another", 2)) == 1


def test_a_signal_while_the_rank_is_started_leaves_a_note_too(tmp_path: Path) -> None:
    failures.write_end(tmp_path, 0, START, {})
    command = [sys.executable, "-c", TOLD_AT_ONCE + WATCH, tmp_path, "sleep", "20"]
    assert subprocess.Popen(command).wait(15) == 128 + signal.SIGTERM
    (found,) = [record for record in failures.ends(tmp_path, START, 2) if record["rank"] == 1]
    assert (found["returncode"], found["was_told"]) == (-signal.SIGTERM, True)


def test_a_failure_waits_for_the_other_ranks(tmp_path: Path) -> None:
    """Slurm would kill them at once."""
    task = shell(tmp_path, "echo ready; exit 1")
    ready(task)
    with pytest.raises(subprocess.TimeoutExpired):
        task.wait(1.5)
    failures.write_end(tmp_path, 0, START, {})
    assert task.wait(5) == 1


def test_rank_0_that_was_told_to_stop_waits_for_the_others_too(tmp_path: Path) -> None:
    """Its status is no failure, and Slurm would kill them all the same."""
    task = started(tmp_path, sys.executable, "-c", LISTENS.replace("sys.exit(3)", f"sys.exit({STOPPED})"))
    ready(task)
    task.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        task.wait(1.5)
    failures.write_end(tmp_path, 0, START, {})
    assert task.wait(5) == STOPPED


def test_slurms_signals_reach_the_rank(tmp_path: Path) -> None:
    """Also where Slurm signals the task alone."""
    failures.write_end(tmp_path, 0, START, {})
    task = started(tmp_path, sys.executable, "-c", LISTENS)
    ready(task)
    os.kill(task.pid, signal.SIGINT)  # of a terminal: the rank gets its own
    os.kill(task.pid, signal.SIGUSR2)
    assert task.stdout is not None and task.stdout.readline() == "warned\n"
    os.kill(task.pid, signal.SIGTERM)
    assert task.wait(15) == 3
    (found,) = [record for record in failures.ends(tmp_path, START, 2) if record["rank"] == 1]
    assert found["was_told"]


def test_a_rank_does_not_outlive_its_task(tmp_path: Path) -> None:
    task = shell(tmp_path, "echo ready; echo $$; exec sleep 600")
    ready(task)
    assert task.stdout is not None
    pid = int(task.stdout.readline())
    task.kill()
    task.wait(5)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_srun_has_put_it() -> None:
    names = {
        "SLURM_NTASKS": "6",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "12345",
    }
    assert place_of(names) == Place(4, 1, 6, 3, "n1", 12345)


def test_a_rank_that_is_stopped_does_not_keep_the_others(tmp_path: Path) -> None:
    """Slurm tells it to end, which it cannot, once another has failed."""
    task = shell(tmp_path, "echo ready; kill -STOP $$")
    ready(task)
    failures.write_end(tmp_path, 0, START, RankEnd(0, HUNG).to_record())
    os.kill(task.pid, signal.SIGTERM)
    assert task.wait(20) in (137, 143)  # both signals are pending when it is let go
