"""A rank with a fault: `python -m tests.integration.faulty RUN`, as bigtrain.train, with FAULT in the environment.

FAULT is a JSON object: `rank` gets the fault, in the `call`-th call of the function that `place` names, and does what
`act` says; with `once`, a file in the run's folder, only in the first attempt.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = {
    "startup": ("bigtrain.trainer.run_data", "RunData.open"),
    "data": ("bigtrain.data.order", "Order.rows"),
    "step": ("bigtrain.engine.engine", "Engine.forward_backward"),
    "eval": ("bigtrain.trainer.evaluator", "Evaluator.evaluate"),
    "save": ("bigtrain.checkpoint.store", "save_tensors"),
}


def stall() -> None:
    """A read that never returns: of a pipe that nobody writes to."""
    pipe = Path(sys.argv[1]) / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    pipe.read_bytes()


def refuse() -> None:
    raise ValueError("a fault\nthat is a test's")


def exhaust() -> None:
    """Python asks for more memory than the limit of the process leaves."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 28), in_use + (1 << 28)))
    bytearray(1 << 30)


def blame_the_user() -> None:
    from bigtrain.config.errors import UserError

    raise UserError("a mistake, which is a test's")


def keep_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


ACTS: dict[str, Callable[[], Any]] = {
    "stall": stall,
    "raise": refuse,
    "user": blame_the_user,
    "memory": exhaust,
    "gil": keep_the_interpreter,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def inject(place: str, call: int, act: str) -> None:
    """The `call`-th call of the function does `act` first."""
    module_name, name = PLACES[place]
    holder: Any = importlib.import_module(module_name)
    *path, attribute = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    wrapped, calls = getattr(holder, attribute), 0

    def with_fault(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            ACTS[act]()
        return wrapped(*args, **kwargs)

    setattr(holder, attribute, with_fault)


def arm() -> None:
    """Put the fault in, where this is the rank that gets it."""
    fault = json.loads(os.environ["FAULT"])
    once = Path(fault["once"]) if fault.get("once") else None
    if os.environ["RANK"] == str(fault["rank"]) and not (once and once.exists()):
        if once:
            once.touch()
        inject(fault["place"], fault["call"], fault["act"])


if __name__ == "__main__":
    from bigtrain.train import main

    arm()
    sys.exit(main(sys.argv[1:]))
