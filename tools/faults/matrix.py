"""Which faults meet which phases of a run, and what has to come of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from bigtrain.config.errors import UserError
from bigtrain.config.status import COME_BACK
from tools.faults.rank import Fault

STEPS, BATCH = 12, 8
"""Of every run of the drill: optimizer steps, and sequences in each."""
SAVED, BAD, SAVING, EVALUATED = 3, 5, 6, 4
"""A checkpoint every third step, an evaluation every second; faults come in steps that are neither the first of their
kind, so the watchdog knows what is normal, nor near the last: behind a save there is another that waits for it."""
MAX_SKIPS = 2


@dataclass(frozen=True)
class Phase:
    """Where a run is when a fault meets it."""

    name: str
    what: str
    place: str
    """Of tools.faults.rank.PLACES."""
    call: int = 1
    step: int | None = None
    on_rank_0: bool = False
    """No other rank comes here."""

    @property
    def is_before_first_step(self) -> bool:
        return self.step is None

    def fault(self, act: str, *, rank: int = 1, target: str = "") -> Fault:
        """`target` is who a signal is for; the rank that gets here sends it, unless that is itself."""
        by = 0 if self.on_rank_0 else rank
        return Fault(self.place, act, by, self.call, self.step, "" if target == str(by) else target)


PHASES = (
    Phase("start", "importing, before the ranks have met", "start"),
    Phase("build", "the model is built, the engine is not (on a CPU nothing is compiled)", "build"),
    Phase("data", "the first batch is read", "data"),
    Phase("forward", f"in the second layer, step {BAD}", "forward", call=2, step=BAD),
    Phase("between", f"between two microbatches, step {BAD}", "microbatch", call=2, step=BAD),
    Phase("update", f"the optimizer has updated some of the weights, step {BAD}", "update", step=BAD),
    Phase("evaluation", f"between two batches, step {EVALUATED}", "evaluation", call=2, step=EVALUATED),
    Phase("save", f"a thread writes the checkpoint of step {SAVING}", "save", call=3, step=SAVING),
    Phase("rename", "its folder is renamed, and not committed yet", "rename", step=SAVING, on_rank_0=True),
    Phase("latest", "it is committed, the link `latest` is not turned", "latest", step=SAVING, on_rank_0=True),
)
SAVES = ("save", "rename", "latest")


@dataclass(frozen=True)
class Variant:
    """The uninterrupted run that a cell is held against: its settings, and data that it passes over from the start."""

    passes_over: tuple[int, int] | None = None
    """Global sequences [first, end)."""
    spike: str = "off"
    """anomaly.spike"""
    skips: int | None = None
    """The step that the cell skips: here it is not there at all. The learning rate is constant then, and there is no
    dropout, so that steps that have another number are the same."""

    @property
    def num_steps(self) -> int:
        return STEPS if self.skips is None else STEPS - 1


WHOLE = Variant()
WITHOUT_BAD = ((BAD - 1) * BATCH, BAD * BATCH)
REWOUND = Variant(passes_over=(SAVED * BATCH, BAD * BATCH), spike="rewind")
REWOUND_LATE = Variant(passes_over=(SAVED * BATCH, (BAD + MAX_SKIPS) * BATCH))
"""Weights that are spoiled at the end of step BAD show in the next, which is skipped as often as may be."""
SKIPPED = Variant(passes_over=WITHOUT_BAD, skips=BAD)
SKIPPED_SPIKE = Variant(passes_over=WITHOUT_BAD, spike="skip", skips=BAD)


@dataclass(frozen=True)
class Cell:
    """A fault in a phase, and what has to come of it."""

    kind: str
    phase: Phase
    fault: Fault
    outcome: str
    """stop: saved as told, and started again. restart: the launcher does it by itself. again: it failed before its
    first step, so whoever started it does it again. save fails: and training goes on. skip, rewind: of the data.
    full: it stops, or its save fails, until there is room."""
    statuses: tuple[tuple[int, ...], ...]
    """Exit statuses of the launches that may be."""
    says: str = ""
    """Regular expression: of the line that names the cause."""
    rank: int | None = None
    """That the cause names."""
    variant: Variant = field(default=WHOLE)
    hangs: bool = False
    on_small_disk: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.phase.name}"

    @property
    def ends_all_ranks(self) -> bool:
        return self.outcome in ("stop", "restart", "again")


KINDS = {
    "usr2": "SIGUSR2 to all ranks and the launcher, as Slurm's warning",
    "term": "SIGTERM to the launcher",
    "int": "SIGINT to the launcher, as Ctrl-C",
    "kill-0": "SIGKILL of rank 0",
    "kill-1": "SIGKILL of rank 1",
    "kill-launcher": "SIGKILL of the launcher",
    "exception": "an exception on one rank",
    "memory": "one rank is out of memory",
    "stopped": "one rank stands still (SIGSTOP)",
    "stalled": "a read of data, or a write of a checkpoint, that does not end",
    "nan": "numbers that are none: loss, gradient, weights",
    "spike": "a loss that jumps",
    "full-disk": "the disk of the run is full",
}
SIGNALS = {"usr2": ("SIGUSR2", "all"), "term": ("SIGTERM", "launcher"), "int": ("SIGINT", "launcher")}
STATUS = {"usr2": COME_BACK, "term": 143, "int": 130}
STALLS = {
    "build": ("open", 1, None),
    "data": ("data", 1, None),
    "forward": ("data", 6, None),
    "evaluation": ("held-out", 2, EVALUATED),
    "save": ("save", 3, SAVING),
    "rename": ("rename", 1, SAVING),
    "latest": ("latest", 1, SAVING),
}
"""Where something is read or written: place, call, step. In the forward a thread reads ahead."""


def cell(kind: str, phase: Phase, *, can_mount: bool = True) -> Cell | str:
    """The cell, or why there is none. `can_mount`: whether a small disk may be mounted here."""
    if kind in SIGNALS:
        return _signal(kind, phase)
    if kind.startswith("kill-"):
        return _kill(kind, phase)
    if kind in ("exception", "memory"):
        return _error(kind, phase)
    if kind in ("stopped", "stalled"):
        return _hang(kind, phase)
    return _full(phase, can_mount) if kind == "full-disk" else _anomaly(kind, phase)


def _signal(kind: str, phase: Phase) -> Cell:
    name, target = SIGNALS[kind]
    hears = phase.name != "start" or kind == "usr2"  # else nothing is there to be saved, and the rank just ends
    says = rf"^stopped by {name}: step \d+ is saved in .*; the same command goes on from there$" if hears else ""
    return Cell(kind, phase, phase.fault(name, target=target), "stop", ((STATUS[kind], 0),), says)


def _kill(kind: str, phase: Phase) -> Cell:
    whom = kind.removeprefix("kill-")
    if whom == "launcher":
        return Cell(kind, phase, phase.fault("SIGKILL", target=whom), "again", ((-9, 0),))
    rank = int(whom)
    says = rf"^error: rank {rank} was killed by SIGKILL \("
    return _crash(Cell(kind, phase, phase.fault("SIGKILL", rank=rank, target=whom), "", (), says, rank), 137)


def _error(kind: str, phase: Phase) -> Cell:
    fault = phase.fault("raise" if kind == "exception" else "memory")
    words = "ValueError: a fault" if kind == "exception" else "MemoryError"
    if phase.name in SAVES:
        says = rf"^the checkpoint of step {SAVING} was not saved: rank {fault.rank}: {words}"
        return Cell(kind, phase, fault, "save fails", ((0,),), says, fault.rank)
    return _crash(Cell(kind, phase, fault, "", (), rf"^error: rank {fault.rank}: {words}, ", fault.rank), 1)


def _hang(kind: str, phase: Phase) -> Cell | str:
    fault = phase.fault("SIGSTOP")
    says = rf"^error: rank {fault.rank} does not answer \(state T: stopped\); "
    if kind == "stalled":
        if phase.name not in STALLS:
            return "no data are read there, and nothing is written"
        place, call, step = STALLS[phase.name]
        fault = replace(fault, place=place, call=call, step=step, act="stall")
        says = rf"^error: rank {fault.rank} is in .* pathlib\.py:\d+ "
    return Cell(kind, phase, fault, "restart", ((0,),), says, fault.rank, hangs=True)


def _crash(cell: Cell, status: int) -> Cell:
    """What comes of a rank that ends by itself."""
    if cell.phase.is_before_first_step:
        return replace(cell, outcome="again", statuses=((status, 0),))
    return replace(cell, outcome="restart", statuses=((0,),))


def _anomaly(kind: str, phase: Phase) -> Cell | str:
    if phase.name not in ("forward", "between", "update"):
        return "no loss and no gradient are computed there"
    found = {
        ("nan", "forward"): (1, "nan", "skip", SKIPPED),
        ("nan", "between"): (2, "nan gradient", "skip", SKIPPED),
        ("nan", "update"): (1, "nan weights", "rewind", REWOUND_LATE),
        ("spike", "forward"): (1, "spike", "rewind", REWOUND),
        ("spike", "between"): (2, "spike", "skip", SKIPPED_SPIKE),
    }.get((kind, phase.name))
    if found is None:
        return "the loss of this step is known already"
    call, act, outcome, variant = found
    place = "update" if act == "nan weights" else "microbatch"
    fault = replace(phase.fault(act), place=place, call=call)
    return Cell(kind, phase, fault, outcome, ((0,),), variant=variant)


def _full(phase: Phase, can_mount: bool) -> Cell | str:
    if phase.name in ("start", "build"):
        return "nothing is written there that a run needs"
    if phase.name in ("between", "update", "evaluation"):
        return "as in the forward: the next line of metrics.jsonl or of the ledger is not written"
    says = r"disk is full|No space left on device|GB free"
    full = Cell("full-disk", phase, phase.fault("fill"), "full", ((0,), (2, 0)), says, on_small_disk=True)
    if can_mount:
        return full
    if phase.name != "save":
        return "a small disk may not be mounted here"
    return replace(full, fault=phase.fault("small files"), on_small_disk=False, says="File too large")


def matching(patterns: str, *, can_mount: bool = True) -> list[Cell]:
    """The cells whose FAULT:PHASE fits one of these patterns, separated by commas, in their order. Raises UserError for
    a pattern that fits none."""
    wanted = [pattern if ":" in pattern else f"{pattern}:*" for pattern in patterns.split(",")]
    found = list(every(can_mount=can_mount))
    for pattern in wanted:
        if not any(fnmatchcase(each.name, pattern) for each in found):
            raise UserError(f"--only {pattern}: there is no such cell. --list shows all.")
    return [each for each in found if any(fnmatchcase(each.name, pattern) for pattern in wanted)]


def every(*, can_mount: bool = True) -> Iterator[Cell]:
    for kind in KINDS:
        for phase in PHASES:
            found = cell(kind, phase, can_mount=can_mount)
            if isinstance(found, Cell):
                yield found


def is_said(cell: Cell, line: str) -> bool:
    return re.search(cell.says, line) is not None
