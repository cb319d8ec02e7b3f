"""RUN/metrics.jsonl: one JSON object a line, appended as the run goes.

``kind`` is train, eval or event. Floats are written as Python prints them, the shortest digits that read back to the
same bits, so that two runs compare bit for bit. JSON has no NaN or infinity: they are written as the strings "nan",
"inf" and "-inf", which `float()` reads back and `read_metrics` does.

After a crash the file may know more than the newest checkpoint: steps that the resumed run computes again.
`MetricsFile` removes them when it opens, so that no step stands in the file twice. It writes the kept lines aside and
renames, so a crash at that moment loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
LASTING = ("crash", "hang")
"""Events that stay when steps are computed again: they tell how an attempt ended, not what a step was."""
_NON_FINITE = ("nan", "inf", "-inf")


class MetricsFile:
    """Appends records to a metrics file. Every record is on its way to the disk when `append` returns."""

    def __init__(self, path: Path, *, resume_step: int, see: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        """Open `path`, new or as an earlier attempt left it. Lines of steps after `resume_step` are removed; 0 means
        that the run starts afresh, and removes every line that names a step. LASTING events stay. A last line that a
        crash cut is removed, and so is any line that is no JSON object. `see` is told each record that was there."""
        self.num_removed, self.num_unreadable = _rewind(path, resume_step, see) if path.exists() else (0, 0)
        """Lines removed on opening: of steps to be computed again, and not readable."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises OSError where the disk does not take it."""
        line = encode(record)
        while line:
            line = line[os.write(self._file, line) :]

    def sync(self) -> None:
        """What was appended is on the disk when this returns."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def encode(record: Mapping[str, Any]) -> bytes:
    """The line of one record, newline included: valid JSON whatever the numbers are."""
    return (json.dumps(_finite(record), allow_nan=False, ensure_ascii=False, default=str) + "\n").encode()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order, with non-finite numbers of train and eval records as floats again. A
    last line that is still being written is left out; any other unreadable line is left out with a warning."""
    records: list[dict[str, Any]] = []
    for number, (line, record) in enumerate(_lines(path), start=1):
        if record is None:
            if line.endswith(b"\n"):
                warnings.warn(f"{path}, line {number}: not a JSON object, left out", stacklevel=2)
            continue
        if record.get("kind") != "event":
            record = {key: float(value) if value in _NON_FINITE else value for key, value in record.items()}
        records.append(record)
    return records


def _rewind(path: Path, resume_step: int, see: Callable[[Mapping[str, Any]], None] | None) -> tuple[int, int]:
    """Remove what `MetricsFile` says it removes. Returns the numbers of lines of later steps and of unreadable
    lines."""
    num_removed = num_unreadable = 0
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as out:
        for line, record in _lines(path):
            if record is not None and see is not None:
                see(record)
            if record is None:
                num_unreadable += 1
            elif record.get("name") in LASTING:
                out.write(line)
            elif "step" in record and (resume_step == 0 or record["step"] > resume_step):
                num_removed += 1
            else:
                out.write(line)
        out.flush()
        os.fsync(out.fileno())
    if num_removed or num_unreadable:
        os.replace(aside, path)
    else:
        aside.unlink()
    return num_removed, num_unreadable


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of the file and its record; None for a line that is cut or is no JSON object with a proper step."""
    with path.open("rb") as file:
        for line in file:
            record: Any = None
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
            yield line, record if isinstance(record, dict) and isinstance(record.get("step", 0), int) else None


def _finite(value: Any) -> Any:
    """`value` with non-finite floats, at any depth, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
