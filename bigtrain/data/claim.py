"""The folder in which a build works until it is done: beside the wanted one, and one build's alone.

    .NAME.lock                  held by the process that builds NAME, gone with it
    .NAME.building-HASH/        what was begun (`work`); HASH is that of the options and the tokenizer

The name is the same for the same command, so a build that was killed is found again, and one of other options never is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigtrain.config.errors import UserError

MANIFEST = "build.json"
"""Without it a folder is not one to go on with."""
_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Busy(UserError):
    """Another process builds this folder at this moment."""


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the only right to build `target`, on all machines that see its file system. Raises Busy where another
    process has it. The system takes it back from a process that dies."""
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _take(path, target)
    while os.fstat(lock).st_nlink == 0:  # it was that of a build that has just ended, and is gone
        os.close(lock)
        lock = _take(path, target)
    try:
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _take(path: Path, target: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace")
        os.close(lock)
        if error.errno in _BUSY:
            raise Busy(
                f"{target} is being built at this moment by {holder or 'another process'}. Wait for it, or choose "
                "another folder."
            ) from error
        raise UserError(
            f"{path}: cannot be locked: {error.strerror}. Build on another file system, and move the folder."
        ) from error
    return lock


def folder_of(target: Path, identity: dict[str, Any]) -> Path:
    """Where the build of `target` with these options works."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return target.with_name(f".{target.name}.building-{digest[:12]}")


def begun(target: Path) -> list[Path]:
    """The folders of all builds of `target` that were begun and not finished."""
    start = f".{target.name}.building-"
    return sorted(path for path in target.parent.iterdir() if path.name.startswith(start))


def discard(folder: Path) -> None:
    """Remove what was begun, MANIFEST first: half of a folder must not look like one to go on with."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
