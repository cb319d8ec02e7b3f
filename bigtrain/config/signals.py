"""Which signals a process of ours listens to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

LEFT_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""nohup has the first ignored, a shell without job control the second of what it starts with &: its Ctrl-C is for what
runs in the foreground."""


def listen(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
    """As signal.signal, but what whoever started us has ignored stays ignored (`LEFT_IGNORED`), here and in our
    children, which inherit that."""
    if number not in LEFT_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, handler)
