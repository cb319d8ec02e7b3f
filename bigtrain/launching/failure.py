"""Why a run failed: what the ranks left behind (`bigtrain.telemetry.failures`), and how their processes ended."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config.status import HUNG, USER_ERROR
from bigtrain.launching.restarts import PORT_TAKEN, Failure
from bigtrain.telemetry import failures
from bigtrain.telemetry.metrics import METRICS_FILE

NEVER_BEGAN = "never began"
"""Sign of an attempt that none of the ranks began."""


@dataclass(frozen=True)
class RankEnd:
    """How the process of a rank ended."""

    rank: int
    returncode: int
    """As subprocess has it: minus n for signal n."""
    oom_kills: int = 0
    """Processes that the kernel has killed for want of memory while it ran (`oom_kills`)."""
    was_told: bool = False
    """Whether it was told to end before."""
    time: float = 0.0
    """Of its end, in seconds since the epoch, where it is known."""

    @property
    def status(self) -> int:
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def to_record(self) -> dict[str, Any]:
        return {"returncode": self.returncode, "oom_kills": self.oom_kills, "was_told": self.was_told}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> RankEnd:
        return RankEnd(record["rank"], record["returncode"], record["oom_kills"], record["was_told"], record["time"])


def is_effect(run_dir: Path, end: RankEnd, start: str) -> bool:
    """Whether a rank only fell because another did: it says so itself."""
    crash = failures.read_json(failures.crash_file(run_dir, end.rank), start)
    return end.returncode > 0 and crash is not None and bool(crash["lost_peer"])


def likeliness(returncode: int, fell: float = 0.0) -> tuple[bool, bool, float, bool]:
    """To sort by, where several ranks failed: a mistake of the user comes first, which all may see and which ends a
    rank slowly; then who fell first (`fell`: when), then a death by signal. SIGABRT is last: NCCL ends a rank so that
    has lost another."""
    return returncode != USER_ERROR, returncode == -signal.SIGABRT, fell, returncode >= 0


def fell(run_dir: Path, end: RankEnd, start: str) -> float:
    """When a rank fell, in seconds since the epoch: its exception, which may be a while ahead of its end."""
    crash = failures.read_json(failures.crash_file(run_dir, end.rank), start)
    return end.time if crash is None or end.returncode <= 0 else min(end.time, crash["time"])


def find(run_dir: Path, ends: Sequence[RankEnd], start: str, metrics: tuple[int, int]) -> Failure:
    """Why an attempt failed. `ends`: of the ranks that failed by themselves, the likeliest cause in front; `start`: of
    the attempt, `failures.start_of` of a rank's environment; `metrics`: `failures.stamp` of before."""
    first = ends[0]
    step, has_stepped = progress(run_dir, metrics)
    if (verdict := hang(run_dir, start, has_stepped=has_stepped)) is not None:
        return verdict
    crash = failures.read_json(failures.crash_file(run_dir, first.rank), start)
    if first.status == USER_ERROR:
        return Failure("user", f"rank {first.rank} says why", "", USER_ERROR, first.rank, step, has_stepped)
    if first.returncode < 0:
        name = signal.Signals(-first.returncode).name
        cause = f"rank {first.rank} was killed by {name}" + _memory(name, first.oom_kills)
        return Failure("crash", cause, name, first.status, first.rank, step + 1, has_stepped)
    if crash is not None:
        cause, step = failures.named(crash), crash["step"]
        sign = PORT_TAKEN if PORT_TAKEN in cause or "Address already in use" in cause else crash["error"]
        return Failure("crash", cause, sign, first.status, first.rank, step, has_stepped)
    sign = f"status {first.status}"
    return Failure("crash", f"rank {first.rank} ended with {sign}", sign, first.status, first.rank, step, has_stepped)


def hang(run_dir: Path, start: str, *, has_stepped: bool) -> Failure | None:
    """What the watchdogs of the ranks found, if they did."""
    found = failures.read_json(failures.hang_file(run_dir, "verdict.json"), start)
    if found is None:
        return None
    return Failure("hang", found["verdict"], f"hang in {found['phase']}", HUNG, None, found["step"], has_stepped)


def told(found: Failure, log: Path | None = None) -> str:
    """The cause as the last line of the console says it. `log`: what the rank wrote."""
    if found.kind == "hang" or found.sign == NEVER_BEGAN:
        return found.cause
    step = f"at step {found.step}" if found.step else "before the first step"
    return f"{found.cause}, {step}" + (f"; its output: {log}" if log is not None else "")


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory: in this process's control group, else on the machine."""
    groups = _text(Path("/proc/self/cgroup")).splitlines()
    own = next((line.partition("::")[2] for line in groups if line.startswith("0::")), "/")
    places = (
        Path("/sys/fs/cgroup" + own) / "memory.events",
        Path("/sys/fs/cgroup/memory.events"),
        Path("/proc/vmstat"),
    )
    for place in places:
        for line in _text(place).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _memory(name: str, kills: int) -> str:
    """What was seen, no more: the count may be another control group's than the rank's, or the whole machine's."""
    if name != "SIGKILL":
        return ""
    return (
        f" (out of memory, it seems: the kernel's oom_kill went up by {kills})"
        if kills
        else " (the kernel's oom_kill, as far as it is seen here, did not change)"
    )


def progress(run_dir: Path, metrics: tuple[int, int]) -> tuple[int, bool]:
    """The last step in metrics.jsonl, and whether this attempt has done one: the events of its own start come first.
    `metrics`: `failures.stamp` of before."""
    path = run_dir / METRICS_FILE
    step, has_stepped = 0, False
    for line in _text(path).splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:  # cut off by the death of its writer
            continue
        if record.get("kind") == "train":
            step, has_stepped = record["step"], True
        elif record.get("name") in ("resume", "restart"):
            step, has_stepped = record["step"], False
    return step, has_stepped and failures.stamp(run_dir) != metrics


def has_trained(run_dir: Path) -> bool:
    """Whether the run has ever done a step that it has kept."""
    return progress(run_dir, failures.stamp(run_dir))[0] > 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
