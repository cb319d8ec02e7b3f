"""Ranks on this machine: start them, watch them, end them together.

Each rank leads a process group of its own, so that ending it ends what it started (a compiler, say). The kernel
kills a rank whose launcher died, even by SIGKILL, so no orphan trains on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bigtrain.config.schema import Config
from bigtrain.config.signals import listen
from bigtrain.config.status import COME_BACK, HUNG, STOPPED, USER_ERROR
from bigtrain.launching.environment import Place, free_port, rank_environment
from bigtrain.launching.failure import likeliness
from bigtrain.telemetry.failures import SPOKEN_FOR

POLL_S = 0.02
SHOWN_LINES = 40
"""Of a failed rank's output."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
SAVED = (COME_BACK, STOPPED)
"""Of a rank that a signal has stopped, which is no failure."""
SETTLE_S = 2.0
"""A mistake of the user is seen by many ranks at once: so long may rank 0 take to say it on the terminal."""


@dataclass(frozen=True)
class Command:
    """One process to start."""

    label: str
    """What messages call it: rank 3."""
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to ours."""
    log: Path | None = None
    """File that its output is added to; None: straight to our stdout and stderr."""


def rank_commands(config: Config, *, port: int | None = None) -> list[Command]:
    """One command a rank: rank 0 speaks on the terminal, the others in RUN/logs/rank-N.log."""
    run_dir = Path(config.run.dir)
    world = config.cluster.procs_per_node
    port = free_port() if port is None else port
    return [
        Command(
            label=f"rank {rank}",
            arguments=[sys.executable, "-m", "bigtrain.train", str(run_dir)],
            environment={
                **rank_environment(Place(rank, rank, world, world, "127.0.0.1", port), config.cluster.device),
                SPOKEN_FOR: "1",
            },
            log=run_dir / "logs" / f"rank-{rank}.log" if rank else None,
        )
        for rank in range(world)
    ]


@dataclass(frozen=True)
class Ended:
    """How commands that ran together ended."""

    status: int
    """0, or that of the command that failed first (128 + n for signal n, as a shell says it), or 128 + n where signal n
    was sent to us; COME_BACK where SIGUSR2 was sent to us or to them, STOPPED where another was sent to them alone."""
    failed: Sequence[Child] = ()
    """Those that failed before the others were ended, the likeliest cause in front; none where a signal was sent to
    us, other than SIGUSR2."""
    num_others: int = 0
    was_warned: bool = False
    """Whether SIGUSR2 was sent to us: whoever sent it does not want another start now."""


def run(commands: Sequence[Command], *, grace_s: float = 10.0) -> int:
    """As `watch`; says on stderr who failed and why. Returns the status."""
    ended = watch(commands, grace_s=grace_s)
    if ended.failed:
        show_output(ended.failed)
        if ended.status != USER_ERROR:  # its own error line has been shown
            print(_told(ended.failed[0], ended.num_others), file=sys.stderr)
    return ended.status


def watch(
    commands: Sequence[Command],
    *,
    grace_s: float = 10.0,
    linger_s: float = 0.0,
    is_effect: Callable[[Child], bool] = lambda child: False,
) -> Ended:
    """Run all commands at once until all end; the first that fails ends the others: SIGTERM, after `grace_s` SIGKILL.

    They have `linger_s` to fail by themselves before. `is_effect`: whether a failed one fell only because another did;
    that one is then waited for, up to SETTLE_S.

    A signal sent to us (Ctrl-C, SIGTERM, SIGHUP, SIGUSR2) is passed on; a second Ctrl-C ends everything: no other
    one does, since Slurm sends SIGTERM twice within milliseconds. Call it from the main thread.
    """
    children: list[Child] = []
    failed: list[Child] = []
    with _received_signals() as received:
        try:
            for command in commands:
                if received:
                    break
                children.append(_start(command))
            failed = _watch(children, received, is_effect)
            if failed and not received:
                _linger(children, linger_s)
        finally:
            is_hung = any(child.status == HUNG for child in failed)
            _end(children, 0.0 if is_hung and not received else grace_s)  # the kernel may have stopped one
            if sys.stdout.isatty():  # a rank that was killed had hidden the cursor for its live line
                sys.stdout.write("\x1b[?25h")
                sys.stdout.flush()
    saved = next((child.status for child in children if child.status in SAVED), 0)
    was_warned = received[:1] == [signal.SIGUSR2]
    if received and not was_warned:
        return Ended(128 + received[0])
    if was_warned and (saved == COME_BACK or any(child.process.returncode == -signal.SIGUSR2 for child in failed)):
        return Ended(COME_BACK)  # the second: not ready to listen, so there was nothing to save
    if failed:
        return Ended(failed[0].status, failed, len(children) - len(failed), was_warned)
    return Ended(saved)


@dataclass
class Child:
    """A command that was started."""

    command: Command
    process: subprocess.Popen[bytes]
    log_start: int
    """Bytes of the log that were there before."""

    @property
    def status(self) -> int:
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    def signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signum)


def _start(command: Command) -> Child:
    environment = {**os.environ, **command.environment}
    with contextlib.ExitStack() as stack:
        output, start = None, 0
        if command.log is not None:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(command.log.open("ab"))
            start = output.tell()
        process = subprocess.Popen(
            command.arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=die_with_parent(),
        )
    return Child(command, process, start)


def die_with_parent() -> Callable[[], None] | None:
    """For subprocess's preexec_fn: the kernel sends the child SIGKILL when the thread that started it ends.

    Linux only; None elsewhere. The library is loaded before the fork, the child makes two system calls.
    """
    if sys.platform != "linux":
        return None
    prctl, pr_set_pdeathsig, parent = ctypes.CDLL(None).prctl, 1, os.getpid()

    def in_child() -> None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return in_child


@contextlib.contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM, SIGHUP and SIGUSR2 in a list instead of acting on them; ignored ones stay so."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    before = {signum: signal.getsignal(signum) for signum in PASSED_ON}
    for signum in PASSED_ON:
        listen(signum, note)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _watch(children: Sequence[Child], received: list[int], is_effect: Callable[[Child], bool]) -> list[Child]:
    """Wait until all children end, one fails, or Ctrl-C came twice. Returns those that failed first, the likeliest
    cause in front: a mistake of the user, then a death by signal, then the lowest rank."""
    passed_on, first_failure = 0, 0.0
    while True:
        codes = [child.process.poll() for child in children]
        failed = [child for child, code in zip(children, codes, strict=True) if code not in (None, 0, *SAVED)]
        if failed and not first_failure:
            first_failure = time.monotonic()
        is_unclear = _only_logged(failed) or all(map(is_effect, failed))
        settled = not is_unclear or time.monotonic() - first_failure > SETTLE_S
        is_urgent = received.count(signal.SIGINT) > 1
        if received and (is_urgent or not passed_on):
            passed_on = signal.SIGINT if is_urgent else received[0]
            for child in children:
                child.signal_group(passed_on)
        if (failed and settled) or is_urgent or None not in codes:
            return sorted(failed, key=lambda child: (is_effect(child), *likeliness(child.process.returncode)))
        time.sleep(POLL_S)


def _only_logged(failed: Sequence[Child]) -> bool:
    """Whether all of them ended for a mistake of the user, and none has said so on the terminal."""
    return all(child.status == USER_ERROR and child.command.log is not None for child in failed)


def _linger(children: Sequence[Child], linger_s: float) -> None:
    deadline = time.monotonic() + linger_s
    while time.monotonic() < deadline and any(child.process.poll() is None for child in children):
        time.sleep(POLL_S)


def _end(children: Sequence[Child], grace_s: float) -> None:
    """No child is left when this returns, nor anything that a failed or ended one had started."""
    running = [child for child in children if child.process.poll() is None]
    for child in running:
        child.signal_group(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for child in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
    for child in children:
        if child in running or child.process.returncode != 0:
            child.signal_group(signal.SIGKILL)
        child.process.wait()


def show_output(failed: Sequence[Child]) -> None:
    """The end of what failed ones wrote, on stderr; a child without a log has written it there itself."""
    said = any(child.status == USER_ERROR and child.command.log is None for child in failed)
    for child in failed:
        if said and child.status == USER_ERROR:
            continue
        if child.command.log is not None:
            with child.command.log.open("rb") as file:
                file.seek(child.log_start)
                lines = file.read().decode(errors="replace").splitlines()
            print("\n".join(f"[{child.command.label}] {line}" for line in lines[-SHOWN_LINES:]), file=sys.stderr)


def _told(first: Child, num_others: int) -> str:
    ended = f"with status {first.status}"
    if first.process.returncode < 0:
        number = -first.process.returncode
        ended = f"by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            ended += " (the kernel does that when memory runs out)"
    where = f" Its output: {first.command.log}" if first.command.log is not None else ""
    stopped = f"; the other {num_others} were stopped" if num_others else ""
    return f"error: {first.command.label} ended {ended}{stopped}.{where}"
