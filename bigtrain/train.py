"""One rank of a training run: ``python -m bigtrain.train RUN_DIR``, started by a launcher, torchrun or srun.

It reads RUN_DIR/config.yaml and nothing else; RANK, WORLD_SIZE and LOCAL_RANK say which rank it is.
To start a run: ``python -m bigtrain.launch --help``. It ends with a status of `bigtrain.config.status`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from bigtrain.config.errors import UserError
from bigtrain.config.frozen import load
from bigtrain.config.signals import listen
from bigtrain.config.status import COME_BACK, CRASHED, STOPPED, USER_ERROR
from bigtrain.config.vendors import check_versions, importing
from bigtrain.launching.lock import train_alone, train_beside
from bigtrain.telemetry import failures
from bigtrain.telemetry.console import Console
from bigtrain.trainer.watchdog import Watchdog


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__.strip() if __doc__ else "", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else USER_ERROR
    run_dir, rank, world = Path(arguments[0]), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for vendor in ("megatron", "deepspeed", r"torch\.distributed"):  # what they say to their developers, at each call
        warnings.filterwarnings("ignore", module=vendor)
    # Vendors turn a KeyboardInterrupt in their imports into all sorts of errors. There is nothing to save before run().
    listen(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    # Slurm's warning, ahead of the time limit, waits until a StopSignal listens.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    watchdog = Watchdog()
    try:
        check_versions()
        config = load(run_dir)
        if rank == 0:
            train_alone(run_dir)
        else:
            train_beside(run_dir)
        failures.forget_ends(run_dir, rank)  # not ahead of the lock: a live run may have them
        watchdog = Watchdog(config.watchdog)
        watchdog.start(run_dir, rank=rank, world=world)
        console = Console(enabled=rank == 0, log_interval=config.tracker.log_interval)
        with console.phase("importing torch, DeepSpeed and Megatron"), importing():
            from bigtrain.trainer.run import run
        stopped_by = run(config, run_dir, console, watchdog)
    except UserError as error:  # often on all ranks alike; the launcher shows it once
        _say(f"error: {error}")
        return USER_ERROR
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _say(_disk_full(error, run_dir, rank, watchdog.step))
            return USER_ERROR
        _say_crash(error, run_dir, rank, watchdog.step)
        leave(CRASHED)
    watchdog.stop()
    if not stopped_by:
        return 0
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun ends the others once rank 0 has said it: they end well
    if rank:
        return 0
    return COME_BACK if stopped_by == "SIGUSR2" else STOPPED


def _say_crash(error: Exception, run_dir: Path, rank: int, step: int) -> None:
    """A defect, or a rank that another took along: for people on stderr, for the launcher in RUN/logs/crash."""
    text = traceback.format_exc()
    named = failures.named({"rank": rank, "error": type(error).__name__, "message": failures.first_line(error)})
    is_spoken_for = bool(os.environ.get(failures.SPOKEN_FOR))
    with contextlib.suppress(OSError):
        crash = failures.write_crash(run_dir, rank, error, text, step=step)
        if crash["lost_peer"]:
            text = f"{named[:200]}\nanother rank is gone; the traceback: {failures.crash_file(run_dir, rank)}\n"
        elif not is_spoken_for:
            failures.append_event(run_dir, "crash", rank=rank, cause=named, step=step)
    _say(text.rstrip("\n") if is_spoken_for else f"{text}error: {named}")


def _disk_full(error: OSError, run_dir: Path, rank: int, step: int) -> str:
    """Which disk, as far as that is known: it may not be the run's. The traceback is kept where there is room."""
    where = f"the disk of {error.filename}" if error.filename else f"a disk, that of {run_dir} or another,"
    text, kept = traceback.format_exc(), ""
    with contextlib.suppress(OSError):
        failures.write_crash(run_dir, rank, error, text, step=step)
        kept = f" The traceback: {failures.crash_file(run_dir, rank)}"
    again = "Make room; the same command goes on from the newest checkpoint."
    return f"error: {where} is full ({error.strerror}). {again}{kept}"


def _say(text: str) -> None:
    """On stderr, which may be a log on a disk that is full: the exit status must still be what it is to be."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # else Python tries again at its end, and makes the status 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def leave(status: int) -> NoReturn:
    """End this process at once. Python would wait for its threads, and libraries for other ranks or a server, with
    nobody to watch over it; all that counts is on the disk."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
