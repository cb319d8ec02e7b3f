"""Stop at a step boundary, on all ranks at the same one."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from bigtrain.distributed.start import Runtime


class StopSignal:
    """SIGTERM and SIGINT set a flag; `agreed` is true on every rank as soon as one has it. A second signal kills, as
    without us: the last checkpoint is there."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.received: str | None = None
        """Name of the signal that this rank got."""

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def agreed(self) -> bool:
        """Collective: one small all-reduce, on the host where there is a GPU, so that no kernel is waited for."""
        flag = torch.tensor([int(self.received is not None)], dtype=torch.int32)
        self._runtime.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
