"""Stop between two steps, or two batches of an evaluation, on all ranks at the same place."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from bigtrain.config.signals import listen
from bigtrain.distributed.start import Runtime

STOPPING = "stopping: this step ends, then the run is saved; Ctrl-C again stops at once"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def _say_nothing(text: str) -> None:
    pass


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP (a terminal that is closed) and SIGUSR2 set a flag; `agreed` is true on every rank as
    soon as one has it.

    A second SIGINT kills, as without us: the last checkpoint is there. A second SIGTERM does not: Slurm sends two
    within milliseconds when it preempts a job, and SIGKILL where it wants an end. SIGUSR2 is Slurm's warning ahead of
    the time limit: who gets it wants to go on later."""

    def __init__(self, runtime: Runtime, say: Callable[[str], None] = _say_nothing) -> None:
        """`say` gets STOPPING once, at once: inside the signal handler where this rank got the signal."""
        self._runtime, self._say = runtime, say
        self._number = 0
        self.told = ""
        """Name of the signal that all ranks have agreed to stop for, the same on each; empty before."""

    @property
    def received(self) -> str | None:
        """Name of the signal that this rank got, or that another got and `agreed` told of."""
        return signal.Signals(self._number).name if self._number else None

    def install(self) -> None:
        for number in SIGNALS:
            listen(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])  # blocked since the start of bigtrain.train

    def agreed(self) -> bool:
        """Collective: one small all-reduce, on the host where there is a GPU, so that no kernel is waited for."""
        flag = torch.tensor([self._number], dtype=torch.int32)
        number = int(self._runtime.all_reduce(flag, op=dist.ReduceOp.MAX).item())
        if number:  # else leave it: a signal that came during the all-reduce counts at the next step
            self._note(number)
            self._number = number  # the same on all ranks
            self.told = signal.Signals(number).name
        return number != 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self._note(number)

    def _note(self, number: int) -> None:
        """The first one counts."""
        if not self._number:
            self._number = number
            self._say(STOPPING)
