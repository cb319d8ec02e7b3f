"""The drill as text, JSON and a page."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tools.certificate.page import aligned, line, whole_page, write_texts
from tools.faults import matrix
from tools.faults.matrix import KINDS, PHASES, Cell

if TYPE_CHECKING:
    from tools.drill import Drill

LEGEND = (
    "A cell: seconds lost, which is wall time beyond the uninterrupted run's, and optimizer steps that were computed "
    "again. PASS is each cell with numbers: what was committed before the fault was not lost, each step stands once in "
    "metrics.jsonl and the ledger, and losses, gradient norms, evaluations, weights and moments are those of the "
    "uninterrupted run (where data were passed over: of one that never saw them), bit for bit. -: no such cell."
)


def table(drill: Drill) -> list[list[str]]:
    """Faults x phases, with a heading."""
    rows = {(row.kind, row.phase): row for row in drill.rows}
    planned = {(cell.kind, cell.phase.name) for cell in drill.planned}
    shown = [["fault", *(phase.name for phase in PHASES)]]
    for kind in KINDS:
        cells: list[str] = []
        for phase in PHASES:
            row = rows.get((kind, phase.name))
            if row is not None:
                cells.append("FAIL" if row.problems else f"{row.lost_s:.0f} s, {row.steps_again}")
            elif (kind, phase.name) in planned:
                cells.append("not run")
            else:
                exists = isinstance(matrix.cell(kind, phase, can_mount=drill.can_mount), Cell)
                cells.append("" if exists else "-")
        if any(text not in ("", "-") for text in cells):
            shown.append([kind, *cells])
    return shown


def explained(drill: Drill) -> list[str]:
    """What the names mean, and why some cells are not there."""
    kinds = {cell.kind for cell in drill.planned}
    lines = ["phases: " + "; ".join(f"{phase.name}: {phase.what}" for phase in PHASES)]
    lines.append("faults: " + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items() if kind in kinds))
    reasons: dict[str, list[str]] = {}
    for kind in KINDS:
        for phase in PHASES if kind in kinds else ():
            why = matrix.cell(kind, phase, can_mount=drill.can_mount)
            if isinstance(why, str):
                reasons.setdefault(why, []).append(f"{kind}:{phase.name}")
    return lines + [f"- {', '.join(names)}: {why}" for why, names in reasons.items()]


def outcome(drill: Drill) -> str:
    """The drill in a line."""
    failed, left = sum(bool(row.problems) for row in drill.rows), len(drill.planned) - len(drill.rows)
    said = f"INCOMPLETE, {left} not run: " if left else ""
    said += f"{len(drill.rows) - failed} of {len(drill.rows)} cells pass" + (f"; {failed} FAIL" if failed else "")
    slowest = max((row.ended_s for row in drill.rows if row.ended_s is not None and not row.hangs), default=None)
    return said + (f". Behind a crash or a signal all ranks ended within {slowest:.1f} s" if slowest else "")


def summary(drill: Drill) -> str:
    failures = [f"FAIL {row.name}: {problem}" for row in drill.rows for problem in row.problems]
    return "\n".join(["", *aligned(table(drill)), "", LEGEND, *explained(drill), *failures, outcome(drill)])


def write(drill: Drill, to_json: Path, to_page: Path) -> None:
    """Also makes their folders. Raises UserError where a file cannot be written."""
    record = {
        "passes": drill.passes,
        "outcome": outcome(drill),
        "versions": {name: version(name) for name in ("bigtrain", "torch", "deepspeed", "megatron-core")},
        "uninterrupted_s": [round(seconds, 2) for seconds in drill.uninterrupted_s],
        "cells": [{"cell": row.name, "passes": not row.problems, **asdict(row)} for row in drill.rows],
        "explained": explained(drill),
    }
    heading, *rows = table(drill)
    lines = [line("th", heading), *(line("td", row, "FAIL" in row) for row in rows)]
    shown = [outcome(drill), LEGEND, *explained(drill)]
    shown += [f"FAIL {row.name}: {problem}" for row in drill.rows for problem in row.problems]
    page = whole_page("Failure drill", "Every failure, one run", shown, lines)
    write_texts({to_json: json.dumps(record, indent=1, default=str) + "\n", to_page: page})
