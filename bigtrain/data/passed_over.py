"""Windows of the training data that a run passes over on purpose, after the loss went wrong in them.

RUN/passed_over.json lists them. It is replaced as a whole, durably, so a window is either there or not: this is what
makes a rewind (trainer/rewind.py) one act. Whoever reads the data asks `first_of_step`, so a run that starts again from
any of its checkpoints passes over the same windows, and the audit (audit.py) knows them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.config.errors import UserError

FILE = "passed_over.json"


@dataclass(frozen=True)
class Window:
    """Global sequences [first, end), and the rewind that they are passed over for."""

    first: int
    end: int
    from_step: int
    """The step at which the numbers went wrong."""
    to_step: int
    """The step of the checkpoint that the run went back to; the window begins behind it."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Window:
        """Raises KeyError, TypeError or ValueError for what is no window."""
        numbers = {name: int(values[name]) for name in ("first", "end", "from_step", "to_step")}
        if not 0 <= numbers["first"] < numbers["end"]:
            raise ValueError(f"sequences {numbers['first']} to {numbers['end']} are no window")
        return Window(**numbers, reason=str(values["reason"]))


def read(run_dir: Path) -> list[Window]:
    """The windows of a run, in the order in which they were added; none where it never went back. Raises UserError
    where the file is damaged."""
    path = run_dir / FILE
    try:
        return [Window.from_dict(each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: it does not say which data are passed over: {error}") from error


def add(run_dir: Path, window: Window) -> list[Window]:
    """Add a window, durable on return; returns all. A crash leaves the file with it or without it. Raises OSError where
    the disk does not take it, and UserError as `read` does."""
    path, aside = run_dir / FILE, run_dir / f"{FILE}.tmp"
    windows = [*read(run_dir), window]
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps([each.to_dict() for each in windows], indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return windows


def behind(windows: Sequence[Window], number: int) -> int:
    """The first global sequence from `number` on that is in no window."""
    while ends := [window.end for window in windows if window.first <= number < window.end]:
        number = max(ends)
    return number


def first_of_step(windows: Sequence[Window], start: int, size: int, step: int) -> int:
    """The global sequence that step `step` (from 0) behind `start` begins with, where steps of `size` sequences follow
    each other and none begins in a window."""
    first = behind(windows, start)
    while True:
        ahead = [window.first for window in windows if window.first > first]
        steps_to_window = -(-(min(ahead) - first) // size) if ahead else step + 1
        if steps_to_window > step:
            return first + step * size
        reached = first + steps_to_window * size
        first, step = behind(windows, reached), step - steps_to_window
