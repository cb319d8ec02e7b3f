"""One launch at a time in a run's folder, and one run.

Both are locks on a file, which the kernel lets go of however their holder ends, also on a file system that several
machines share. One that knows no locks lets everyone in.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bigtrain.config.errors import UserError

TRAINS = ".trains"
"""File in the run's folder that its rank 0 holds, wherever that runs and whoever started it."""
_PROBES_S = 2.0
"""For longer than this no launch that only looks holds TRAINS."""
_SIGNS_S = 5.0
"""So long rank 0 may take to have TRAINS with its name in it."""


@contextlib.contextmanager
def only_launch(run_dir: Path) -> Iterator[None]:
    """Hold RUN/.lock. Raises UserError where another launch holds it, or where a run trains in the folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written: {error.strerror}. Choose another run.dir.") from error
    try:
        if not _taken(file, fcntl.LOCK_EX):
            raise UserError(
                f"run.dir={run_dir}: another launch is running in this folder ({_holder(file)}). "
                "Wait for it, end it, or set another run.name."
            )
        _sign(file, f"process {os.getpid()}")
        _refuse_live_run(run_dir)
        yield
    finally:
        os.close(file)


def train_alone(run_dir: Path) -> None:
    """Hold RUN/.trains to the end of this process, which is rank 0. Raises UserError where another one holds it.

    A node that is lost keeps its locks for a while, or for good; an earlier start of our own Slurm job does not count
    for that reason."""
    try:
        file = os.open(run_dir / TRAINS, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return
    deadline = time.monotonic() + _PROBES_S
    while not _taken(file, fcntl.LOCK_EX):
        if _is_earlier(_holder(file)):
            return
        if time.monotonic() > deadline:
            raise _trains(run_dir, _holder(file))
        time.sleep(0.1)
    _sign(file, f"process {os.getpid()} on {socket.gethostname()}{_job()}")


def train_beside(run_dir: Path) -> None:
    """Of a rank other than 0, ahead of all that it writes: it would spoil what a live run keeps of itself. Raises
    UserError where rank 0 of another Slurm job holds RUN/.trains, as ours will.

    Ours writes its name there at once, as a rule. Until then only the name is looked at: many ranks that look at the
    lock would keep it from rank 0."""
    job, deadline = os.environ.get("SLURM_JOB_ID"), time.monotonic() + _SIGNS_S
    while job and (holder := _last_holder(run_dir)) is not None and _job_of(holder) not in (None, job):
        if time.monotonic() > deadline:
            return _refuse_live_run(run_dir)
        time.sleep(0.1)


def _last_holder(run_dir: Path) -> str | None:
    """Opened anew each time: only so NFS asks its server for what another machine has written."""
    try:
        return (run_dir / TRAINS).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _refuse_live_run(run_dir: Path) -> None:
    try:
        file = os.open(run_dir / TRAINS, os.O_RDONLY)
    except OSError:
        return
    try:
        if not _taken(file, fcntl.LOCK_SH):
            raise _trains(run_dir, _holder(file))
    finally:
        os.close(file)


def _trains(run_dir: Path, holder: str) -> UserError:
    return UserError(
        f"run.dir={run_dir}: a run trains in this folder ({holder}). Wait for it, end it, or set another run.name. If "
        f"that machine is gone for good: rm {run_dir / TRAINS}"
    )


def _job() -> str:
    """As the holder's line ends."""
    job = os.environ.get("SLURM_JOB_ID")
    return f", Slurm job {job}, start {_start()}" if job else ""


def _start() -> int:
    """Slurm counts the starts of a job, from 0."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _job_of(holder: str) -> str | None:
    found = re.search(r", Slurm job ([^,\s]+)", holder)
    return None if found is None else found[1]


def _is_earlier(holder: str) -> bool:
    """Whether it is an earlier start of our own Slurm job."""
    found = re.search(r", Slurm job (\S+), start (\d+)$", holder)
    return found is not None and found[1] == os.environ.get("SLURM_JOB_ID") and int(found[2]) < _start()


def _taken(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace").strip() or "unknown"


def _sign(file: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.truncate(file, 0)
        os.pwrite(file, f"{text}\n".encode(), 0)
