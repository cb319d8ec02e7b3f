"""A rank with a fault: ``python -m tools.faults.rank RUN``, as bigtrain.train, with FAULT in the environment.

FAULT is a `Fault` as JSON. The faults are real: signals, a limit of the process's memory, a pipe that nobody writes to,
a disk that is full, numbers that are none. Of bigtrain only one function is wrapped, the one at the fault's place.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.manifest import COMMITTED
from bigtrain.config.errors import UserError
from bigtrain.telemetry.failures import write_json

STRUCK, STARTS = "struck.json", "starts.jsonl"
LINGER_S = 1.0
"""A rank stays in its phase behind a signal to others: it takes them so long to get it."""
SMALL_DISK_BYTES = 1 << 28
"""No larger one is filled."""
SPIKE = 100.0
"""Times the loss of a microbatch."""


@dataclass(frozen=True)
class Fault:
    """Which call of which function does what first."""

    place: str
    """Of PLACES."""
    act: str
    """Of ACTS or CHANGES, or the name of a signal."""
    rank: int
    """That gets there."""
    call: int = 1
    """From 1 on, of those that count."""
    step: int | None = None
    """Only calls in this step, or for this step's checkpoint, count. None: all."""
    target: str = ""
    """Of a signal: launcher, all, or the number of a rank. Empty: the rank itself."""
    notes: str = ""
    """Folder in which STRUCK tells that it has struck, and STARTS of each start of rank 0. It strikes once then;
    without a folder, in every attempt."""

    def environment(self) -> dict[str, str]:
        return {"FAULT": json.dumps(asdict(self))}


@dataclass(frozen=True)
class Place:
    """A function of the rank's program."""

    module: str
    name: str
    step_of: Callable[[tuple[Any, ...]], int | None] = lambda arguments: progress.step
    """The step that a call with these arguments belongs to."""
    is_behind: bool = False
    """The act comes behind the call."""


@dataclass
class Progress:
    step: int = 0
    """That the rank is in; 0 before the first."""


progress = Progress()


def _commits(arguments: tuple[Any, ...]) -> int | None:
    """The step whose marker is written."""
    path = arguments[0]
    return folders.step_of(path.parent) if COMMITTED in path.name else None


PLACES = {
    "start": Place("bigtrain.distributed.start", "start"),
    "open": Place("bigtrain.trainer.run_data", "RunData.open"),
    "build": Place("bigtrain.engine.engine", "build_optimizer"),
    "data": Place("bigtrain.data.order", "Order.rows"),
    "step": Place("bigtrain.engine.engine", "Engine.forward_backward"),
    "forward": Place("bigtrain.model.attention", "DocumentAttention.forward"),
    "microbatch": Place("bigtrain.engine.engine", "Engine._forward"),
    "update": Place("torch.optim", "AdamW.step", is_behind=True),
    "evaluation": Place("bigtrain.engine.engine", "Engine.evaluate"),
    "held-out": Place("bigtrain.data.held_out", "HeldOut.rows"),
    "save": Place("bigtrain.checkpoint.writer", "Writer._write_item", lambda arguments: arguments[0]._step),
    "rename": Place("bigtrain.checkpoint.folder", "_write", _commits),
    "latest": Place("bigtrain.checkpoint.folder", "_turn_latest", lambda arguments: folders.step_of(arguments[1])),
}


def stall(run_dir: Path) -> None:
    """A read that never returns: of a pipe that nobody writes to."""
    pipe = run_dir / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    pipe.read_bytes()


def refuse(run_dir: Path) -> None:
    raise ValueError("a fault\nthat is injected")


def blame_the_user(run_dir: Path) -> None:
    raise UserError("a mistake\nthat is injected")


def exhaust(run_dir: Path) -> None:
    """Python asks for more memory than the limit of the process leaves."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 28), in_use + (1 << 28)))
    bytearray(1 << 30)


def fill(run_dir: Path) -> None:
    """Take all that is left of the disk of the run, which must be a small one."""
    if shutil.disk_usage(run_dir).total > SMALL_DISK_BYTES:
        raise AssertionError(f"{run_dir} is on a large disk, which is not filled")
    with (run_dir.parent / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:  # full
                continue


def refuse_large_files(run_dir: Path) -> None:
    """Where no disk can be mounted: this rank writes no file over 64 KiB. Python ignores the signal that goes with
    it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


ACTS: dict[str, Callable[[Path], None]] = {
    "stall": stall,
    "raise": refuse,
    "user": blame_the_user,
    "memory": exhaust,
    "fill": fill,
    "small files": refuse_large_files,
}


def no_gradient(losses: Any) -> Any:
    """The gradient of the losses, on its way back, is none."""
    losses.register_hook(lambda gradient: gradient * math.nan)
    return losses


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nan": lambda losses: losses * math.nan,
    "nan gradient": no_gradient,
    "spike": lambda losses: losses * SPIKE,
}
"""What becomes of what a function returns."""


def spoil_weights(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0].data.view(-1)[0] = math.nan


def send(number: signal.Signals, target: str) -> None:
    """Send a signal as a user, a cluster or the kernel would."""
    if not target:
        os.kill(os.getpid(), number)
        return
    launcher = psutil.Process(os.getppid())
    ranks = {rank.environ().get("RANK"): rank.pid for rank in launcher.children()}
    targets = {"launcher": [launcher.pid], "all": [launcher.pid, *ranks.values()]}.get(target) or [ranks[target]]
    for pid in targets:
        os.kill(pid, number)
    time.sleep(LINGER_S)


def inject(fault: Fault, run_dir: Path) -> None:
    """Wrap the function at the fault's place."""
    if fault.step is not None:
        _follow_steps()
    place = PLACES[fault.place]
    holder, attribute = _holder(place)
    wrapped, calls = getattr(holder, attribute), 0

    def with_fault(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if fault.step is not None and place.step_of(arguments) != fault.step:
            return wrapped(*arguments, **options)
        calls += 1
        if calls != fault.call:
            return wrapped(*arguments, **options)
        if not place.is_behind:
            _strike(fault, run_dir, arguments)
        result = wrapped(*arguments, **options)
        if place.is_behind:
            _strike(fault, run_dir, arguments)
        return CHANGES[fault.act](result) if fault.act in CHANGES else result

    setattr(holder, attribute, with_fault)


def _strike(fault: Fault, run_dir: Path, arguments: tuple[Any, ...]) -> None:
    if fault.notes:
        write_json(Path(fault.notes) / STRUCK, _moment(run_dir))
    if fault.act in ACTS:
        ACTS[fault.act](run_dir)
    elif fault.act == "nan weights":
        spoil_weights(arguments[0])
    elif fault.act not in CHANGES:
        send(signal.Signals[fault.act], fault.target)


def _moment(run_dir: Path) -> dict[str, Any]:
    committed = folders.committed(run_dir / "checkpoints")
    return {"time": time.time(), "committed": [folders.step_of(folder) for folder in committed]}


def _follow_steps() -> None:
    from bigtrain.engine.engine import Engine

    wrapped = Engine.forward_backward

    def followed(engine: Engine, *arguments: Any) -> Any:
        progress.step = engine.steps_taken + 1
        return wrapped(engine, *arguments)

    setattr(Engine, "forward_backward", followed)  # noqa: B010 - a method


def _holder(place: Place) -> tuple[Any, str]:
    """The module or class that has the function, and the function's name there."""
    holder: Any = importlib.import_module(place.module)
    *path, attribute = place.name.split(".")
    for part in path:
        holder = getattr(holder, part)
    return holder, attribute


def arm(run_dir: Path) -> None:
    """Put the fault of the environment in, where this is the rank that gets it."""
    fault, rank = Fault(**json.loads(os.environ["FAULT"])), os.environ["RANK"]
    notes = Path(fault.notes) if fault.notes else None
    if notes and rank == "0":
        with (notes / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_moment(run_dir)) + "\n")
    if rank == str(fault.rank) and not (notes and (notes / STRUCK).exists()):
        inject(fault, run_dir)


if __name__ == "__main__":
    from bigtrain.train import leave, main

    arm(Path(sys.argv[1]))
    leave(main(sys.argv[1:]))
