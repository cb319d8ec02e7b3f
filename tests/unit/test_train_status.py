"""How a rank ends, by what its training comes to: a stand-in for that, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bigtrain.config import frozen
from bigtrain.config.schema import Config, RunConfig
from bigtrain.config.status import COME_BACK, STOPPED, USER_ERROR
from bigtrain.telemetry import failures

RANK = """
import sys, types
training = types.ModuleType("bigtrain.trainer.run")
exec(sys.argv[2], training.__dict__)
sys.modules["bigtrain.trainer.run"] = training
from bigtrain import train
sys.exit(train.main([sys.argv[1]]))
"""
HOLDS = """
import sys
from pathlib import Path
from bigtrain.launching.lock import train_alone
train_alone(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def ended(run_dir: Path, lines: str, rank: int = 0, by: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`lines`: that define run(). `by`: a command that starts another."""
    frozen.save(Config(run=RunConfig(dir=str(run_dir))), run_dir)
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
    command = [*by, sys.executable, "-c", RANK, run_dir, lines]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("stopped_by", "rank", "status"),
    [(None, 0, 0), ("SIGUSR2", 0, COME_BACK), ("SIGTERM", 0, STOPPED), ("SIGINT", 0, STOPPED), ("SIGTERM", 1, 0)],
)
def test_a_run_that_was_stopped_is_not_done(tmp_path: Path, stopped_by: str | None, rank: int, status: int) -> None:
    done = ended(tmp_path, f"run = lambda *_: {stopped_by!r}", rank)
    assert (done.returncode, done.stderr) == (status, "")


def test_an_ignored_ctrl_c_stays_ignored_from_the_start(tmp_path: Path) -> None:
    sends = "import os, signal\ndef run(*_):\n    os.kill(os.getpid(), signal.SIGINT)"
    assert ended(tmp_path, sends, by=["sh", "-c", 'trap "" INT; exec "$@"', "sh"]).returncode == 0
    assert ended(tmp_path, sends).returncode == 130


def test_how_earlier_starts_ended_is_forgotten_by_who_trains(tmp_path: Path) -> None:
    """Not by a second start beside a live run: it is refused."""
    frozen.save(Config(run=RunConfig(dir=str(tmp_path))), tmp_path)
    failures.write_end(tmp_path, 0, "earlier", {})
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    done = ended(tmp_path, "run = lambda *_: None")
    assert done.returncode == USER_ERROR and "a run trains in this folder" in done.stderr
    assert len(failures.ends(tmp_path, "earlier", 1)) == 1
    holder.communicate()
    assert ended(tmp_path, "run = lambda *_: None").returncode == 0
    assert failures.ends(tmp_path, "earlier", 1) == []


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("open('/dev/full', 'w').write('x' * 10_000)", "a disk, that of {run} or another, is full"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', '/scratch/cache')",
            "the disk of /scratch/cache is full",
        ),
        ("raise OSError(errno.EDQUOT, 'Disk quota exceeded', '/home/me/x')", "the disk of /home/me/x is full"),
    ],
)
def test_a_full_disk_is_named_where_it_is_known(tmp_path: Path, act: str, says: str) -> None:
    done = ended(tmp_path, f"import errno\ndef run(*_):\n    {act}")
    assert done.returncode == USER_ERROR and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {says.format(run=tmp_path)} (") and done.stderr.count("\n") == 1
    crash = failures.crash_file(tmp_path, 0)
    assert str(crash) in done.stderr and "in run" in crash.read_text()
