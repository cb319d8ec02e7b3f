"""A folder that a run trains in, wherever that runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.launching.lock import only_launch, train_alone, train_beside

TRAINS = (
    "import sys, time; from pathlib import Path; from bigtrain.launching.lock import train_alone\n"
    "train_alone(Path(sys.argv[1])); print('trains', flush=True); time.sleep(600)"
)


@contextmanager
def rank_0(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Of a run, of which this machine knows nothing else. It ends by SIGKILL."""
    process = subprocess.Popen([sys.executable, "-c", TRAINS, run_dir], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "trains\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_launch_beside_a_run(tmp_path: Path) -> None:
    with (
        rank_0(tmp_path) as holder,
        pytest.raises(UserError, match=rf"a run trains in this folder \(process {holder.pid} on [^,]+\)\. Wait"),
        only_launch(tmp_path),
    ):
        pass
    with only_launch(tmp_path):
        pass


def test_a_run_beside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the other one is an earlier start of the same job, on a node that is lost: its lock may outlast it."""
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with rank_0(tmp_path):
        for job, start in (("71", "2"), ("71", "1"), ("7", "3"), ("1", "3")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", start)
            with pytest.raises(UserError, match="Slurm job 71, start 2"):
                train_alone(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "71")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "10")
        train_alone(tmp_path)
    train_alone(tmp_path)


def test_the_other_ranks_of_a_run_beside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by themselves, ahead of rank 0 perhaps; those of its own job are not."""
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    train_beside(tmp_path)
    with rank_0(tmp_path):
        train_beside(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(UserError, match="Slurm job 71"):
            train_beside(tmp_path)
    begin = time.monotonic()
    train_beside(tmp_path)
    assert time.monotonic() - begin < 8, "the name is an old one, the lock free"
    with rank_0(tmp_path):
        begin = time.monotonic()
        train_beside(tmp_path)
        assert time.monotonic() - begin < 1, "its own rank 0 has it"
