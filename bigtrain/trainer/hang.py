"""How the watchdogs of all ranks agree that the run hangs, and on why: by files in RUN/logs/hang.

The first to see a limit passed leaves an alarm; every rank answers with its stacks; one of them claims the verdict,
waits for the answers and makes it. The others wait for that, since a launcher may end all ranks when the first ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any

from bigtrain.config.schema import WatchdogConfig
from bigtrain.telemetry import failures
from bigtrain.trainer.stacks import short
from bigtrain.trainer.verdict import verdict, where

ANSWER_S = 8.0
"""So long may a rank take to say where it is."""
VERDICT_S = 6.0
"""So long may the one that makes the verdict take then."""
CLOCKS_S = 60.0
"""By so much the clocks of two machines may differ."""
BEGIN_S = WatchdogConfig.startup_s
"""Ranks of one start begin within so long. Where starts may share a name (`failures.starts_have_names`), a place from
before is of an earlier start, and its rank has not begun in this one."""
_POLL_S, _POLL_S_A_RANK, _LONGEST_POLL_S = 0.1, 0.002, 2.0
"""Between two looks, longer the more ranks look at one file system."""
_STATES = {
    "T": "stopped",
    "t": "stopped by a debugger",
    "D": "waits for a disk",
    "Z": "has ended",
    "S": "sleeps",
    "R": "runs",
}


def alarm_of(start: str) -> str:
    return f"alarm-{start}.json"


def claim_of(start: str) -> str:
    return f"verdict-{start}.claim"


class Hang:
    """One rank's part in it."""

    def __init__(self, run_dir: Path, *, rank: int, world: int, begun: float, host: str) -> None:
        """`begun`: when this rank began, of time.time(); an alarm from before is of an earlier start."""
        self._run_dir, self._rank, self._world, self._begun, self._host = run_dir, rank, world, begun, host
        self._start, self._is_named = failures.start_of(), failures.starts_have_names()
        self._alarmed: float | None = None  # when, by the clock of who raised the alarm that this rank answers
        self._poll_s = min(_POLL_S + _POLL_S_A_RANK * world, _LONGEST_POLL_S)

    @property
    def text_file(self) -> Path:
        return self._file(f"rank-{self._rank}.txt")

    def begin(self) -> None:
        """Remove what an earlier start of the same name has left."""
        claim = claim_of(self._start)
        for stale in (f"rank-{self._rank}.json", alarm_of(self._start), claim, f"{claim}.again", "verdict.json"):
            self._file(stale).unlink(missing_ok=True)
        self._file("").mkdir(parents=True, exist_ok=True)

    def raise_alarm(self, phase: str, *, step: int, seconds: float, limit_s: float) -> dict[str, Any]:
        """Tell all ranks. Returns what they are told. Where the disk takes nothing each has only its own limits."""
        found = {"rank": self._rank, "phase": phase, "step": step, "seconds": seconds, "limit_s": limit_s}
        found["time"] = self._alarmed = time.time()
        with contextlib.suppress(OSError):
            failures.write_json(self._file(self._alarm), {"start": self._start, **found})
        return found

    def alarm(self) -> dict[str, Any] | None:
        """What a rank has told."""
        found = failures.read_json(self._file(self._alarm), self._start)
        if found is None or found["time"] <= self._begun - CLOCKS_S:
            return None
        self._alarmed = found["time"]
        return found

    def answer(self, place: dict[str, Any], threads: list[dict[str, Any]]) -> None:
        """Say where this rank is."""
        lines = [f"rank {self._rank}, {self._host}, process {os.getpid()}: {place['phase']}, step {place['step']}"]
        for each in threads:
            lines += ["", f"thread {each['name']}" + (" (of the phase)" if each["ident"] == place["thread"] else "")]
            lines += [f"  {file}:{line} ({function})" for file, line, function in each["frames"]]
            lines += [f"  last collective: {each['collective']}"] if each["collective"] else []
        record = {"rank": self._rank, "host": self._host, "pid": os.getpid(), **place, "threads": threads}
        record["alarm"] = self._alarmed
        with contextlib.suppress(OSError):
            failures.write_json(
                self._file(f"rank-{self._rank}.json"), {"start": self._start, "time": time.time(), **record}
            )
            self.text_file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def conclude(self, alarm: dict[str, Any]) -> None:
        """Return when the verdict is there. One rank claims it, and it alone reads what the others say: of thousands of
        ranks each would read all answers of all. Where it has made none in time, a second one does."""
        for claim, answer_s in ((claim_of(self._start), ANSWER_S), (f"{claim_of(self._start)}.again", 0.0)):
            if self._is_first(claim):
                self._conclude(alarm, self._reports(answer_s, alarm["time"]))
                return
            deadline = time.monotonic() + answer_s + VERDICT_S
            while time.monotonic() < deadline:
                if self._is_concluded():
                    return
                time.sleep(self._poll_s)

    def _reports(self, wait_s: float, alarmed: float) -> dict[int, dict[str, Any]]:
        """What the ranks say, by rank: of all, or of those that have said it after `wait_s`. `alarmed`: when they were
        asked, of time.time(); what a rank said before that, where starts may share a name, is of an earlier one,
        unless it names this very alarm: its clock is wrong then. Two ranks may raise one at once."""
        deadline = time.monotonic() + wait_s
        reports: dict[int, dict[str, Any]] = {}
        while True:
            for rank in self._answered() - reports.keys():
                found = failures.read_json(self._file(f"rank-{rank}.json"), self._start)
                if found is not None and (found.get("alarm") == alarmed or self._is_new(found, alarmed - CLOCKS_S)):
                    reports[rank] = found
            if len(reports) == self._world or time.monotonic() >= deadline:
                return reports
            time.sleep(self._poll_s)

    def _answered(self) -> set[int]:
        """The ranks that have a file there: one look at the folder, which NFS knows anew whenever it is opened."""
        there = {path.name for path in self._file("").glob("rank-*.json")}
        return {rank for rank in range(self._world) if f"rank-{rank}.json" in there}

    def _is_first(self, claim: str) -> bool:
        try:
            os.close(os.open(self._file(claim), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:  # a full disk, say: better twice than never
            return True
        return True

    def _conclude(self, alarm: dict[str, Any], reports: dict[int, dict[str, Any]]) -> None:
        silent = {rank: self._silence(rank) for rank in range(self._world) if rank not in reports}
        text = verdict(alarm, reports, silent)
        found = {key: alarm[key] for key in ("phase", "step", "seconds", "limit_s")}
        with contextlib.suppress(OSError):
            failures.append_event(self._run_dir, "hang", **found, verdict=text)
        if not os.environ.get(failures.SPOKEN_FOR):  # not through sys.stderr, whose lock a stuck thread may hold
            os.write(2, f"hang: {text}. All stacks: {self._file('')}\n".encode())
        with contextlib.suppress(OSError):
            failures.write_json(self._file("verdict.json"), {"start": self._start, **found, "verdict": text})

    def _silence(self, rank: int) -> str:
        """Why a rank does not answer, as far as it can be seen from here."""
        place = failures.read_json(failures.place_file(self._run_dir, rank), self._start)
        if place is None or not self._is_new(place, self._begun - BEGIN_S):
            return "has never started"
        if place["host"] != self._host:
            return f"does not answer (on {place['host']})"
        state = state_of(place["pid"])
        if state == "Z":
            return "has ended"
        kept = where_it_is_kept(self._file(f"rank-{rank}.txt")) if state not in ("T", "t") else ""
        if kept:
            return f"is in {kept}, and keeps Python's interpreter"
        return f"does not answer (state {state}: {_STATES.get(state, 'unknown')})"

    def _is_new(self, found: dict[str, Any], since: float) -> bool:
        """Whether a file with the name of this start is of it: by that alone, or not from before `since` (of
        time.time())."""
        return self._is_named or found["time"] > since

    def _is_concluded(self) -> bool:
        return failures.read_json(self._file("verdict.json"), self._start) is not None

    @property
    def _alarm(self) -> str:
        return alarm_of(self._start)

    def _file(self, name: str) -> Path:
        return failures.hang_file(self._run_dir, name)


def state_of(pid: int) -> str:
    """The kernel's letter for what a process of this machine does; Z where there is none any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "Z"
    return stat.rpartition(")")[2].split()[0]


def where_it_is_kept(text_file: Path) -> str:
    """Where the main thread is, by what faulthandler's timer wrote: its stack comes last, the innermost line first.
    Empty where it wrote nothing."""
    try:
        text = text_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    frames = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', text.rpartition("\nThread ")[2], re.MULTILINE)
    if not text.startswith("Timeout") or not frames:
        return ""
    return where({"frames": [[short(file), int(line), function] for file, line, function in frames]})
