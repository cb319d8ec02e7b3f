"""One launch at a time in a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from bigtrain.config.errors import UserError


@contextlib.contextmanager
def only_launch(run_dir: Path) -> Iterator[None]:
    """Hold RUN/.lock; the kernel lets go of it however the process ends. Raises UserError where another launch holds
    it. A file system that knows no locks lets everyone in."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written: {error.strerror}. Choose another run.dir.") from error
    try:
        _take(file, run_dir)
        yield
    finally:
        os.close(file)


def _take(file: int, run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
        raise UserError(
            f"run.dir={run_dir}: another launch is running in this folder (process {holder}). "
            "Wait for it, end it, or set another run.name."
        ) from error
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.truncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
