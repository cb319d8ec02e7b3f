"""Prove that nothing is lost: ``python tools/drill.py [OPTIONS]`` makes a small run fail in every way, in every phase.

Each cell of the matrix is a run of its own: two ranks on CPUs, a small model, the text of Python's own library. It is
started as bigtrain.launch starts it, the fault strikes, and the run goes on, by itself or started again as a cluster
would. Then it is held against a run that was never interrupted. --list says what each fault and phase is. Nothing of it
runs on Slurm or on a GPU. Run it from a clone: the small run is that of the tests.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bigtrain.config.errors import UserError  # noqa: E402
from tests.integration.runs import build_shards  # noqa: E402
from tools.certificate.page import require_writable  # noqa: E402
from tools.faults import check, page, runs  # noqa: E402
from tools.faults.matrix import KINDS, PHASES, WHOLE, Cell, Variant, matching  # noqa: E402
from tools.faults.runs import Run  # noqa: E402

EPILOG = """\
For each cell it is proven that
- no committed step was lost: each checkpoint that was committed when the fault struck is there, or superseded by newer
  ones, and the run went on from the newest;
- no sequence was repeated or skipped (tools/batches.py audit), and each step stands in metrics.jsonl once;
- losses, gradient norms, evaluations, and weights, moments and state at the end are the uninterrupted run's, bit for
  bit; where data were passed over on purpose, those of a run that never saw them;
- all ranks ended within 30 s, or 30 s behind the watchdog's limit, and no process was left;
- the console and an event of metrics.jsonl name the cause, and the rank where there is one.

The JSON and the page are written after each cell. What a failed cell left is kept, and named.

examples:
  python tools/drill.py                                  # all cells: up to 40 minutes on two cores
  python tools/drill.py --only 'kill-*:save,stopped'     # these
  python tools/drill.py --list                           # what there is

exit status: 0 all pass, 1 one fails, 2 an argument is wrong, 130 interrupted"""
STARTUP_FACTOR, LEAST_STARTUP_S = 3.0, 15.0
"""Times the start-up of the uninterrupted run that the watchdog gives a cell which hangs."""


@dataclass
class Row:
    """A cell that was run."""

    kind: str
    phase: str
    seconds: float
    """Of all launches together."""
    lost_s: float
    """Beyond the fastest of the uninterrupted runs."""
    start_up_s: float
    """Of these, more start-up; that of attempts that did not come to their first record is not known."""
    replay_s: float
    """Of these, steps computed again."""
    steps_again: int
    ended_s: float | None
    """From the fault to the end of all ranks, where it ended them."""
    hangs: bool
    launches: int
    problems: list[str]
    """Empty where it passes."""
    folder: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.phase}"

    @property
    def verdict(self) -> str:
        if self.problems:
            return f"FAIL: {self.problems[0]}"
        return f"PASS, {self.lost_s:.1f} s lost, {self.steps_again} steps again"


@dataclass
class Drill:
    """What was drilled, and with what outcome."""

    planned: list[Cell]
    can_mount: bool
    rows: list[Row] = field(default_factory=list[Row])
    uninterrupted_s: list[float] = field(default_factory=list[float])
    """Wall time of each."""

    @property
    def passes(self) -> bool:
        return len(self.rows) == len(self.planned) and not any(row.problems for row in self.rows)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 where all cells pass, 1 where one fails, 2 where the user has something to fix, 130 where they
    interrupted."""
    options = parse(arguments)
    work = Path(tempfile.mkdtemp(prefix="bigtrain-drill-"))
    drill = Drill([], runs.can_mount(work))
    try:
        drill.planned = matching(options.only, can_mount=drill.can_mount)
        if options.list:
            print("\n".join(f"{cell.name:<24} {KINDS[cell.kind]}; {cell.phase.what}" for cell in drill.planned))
            return 0
        require_writable(options.json, options.page)
        run_all(drill, work, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if options.keep:
            print(f"kept: {work}", flush=True)
        else:
            remove(work, but=[row.folder for row in drill.rows if row.problems])
    print(page.summary(drill), options.json, options.page, sep="\n", flush=True)
    return 0 if drill.passes else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with status 2 where it cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG
    )
    parser.add_argument(
        "--only",
        metavar="FAULT:PHASE,...",
        default="*",
        help=f"cells that fit one of these patterns. Faults: {', '.join(KINDS)}. "
        f"Phases: {', '.join(phase.name for phase in PHASES)}",
    )
    parser.add_argument("--list", action="store_true", help="show the cells and run none")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all runs, not only of failed ones")
    for name in ("json", "page"):
        default = Path("drill.json" if name == "json" else "drill.html")
        told = "default %(default)s; folders are made"
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", default=default, help=told)
    options = parser.parse_args(arguments)
    if options.json == options.page:
        parser.error(f"--json and --page are both {options.json}")
    return options


def run_all(drill: Drill, work: Path, options: argparse.Namespace) -> None:
    """The uninterrupted runs, and then every cell."""
    data = build_shards(work / "data")
    first = reference(WHOLE, data, work, drill)
    references = {variant: reference(variant, data, work, drill) for variant in variants(drill)}
    if differences := list(check.differences(first, references[WHOLE])):
        raise UserError(f"two uninterrupted runs are not the same on this machine: {differences[0]}")
    startup_s = max(STARTUP_FACTOR * references[WHOLE].account().parts["start_up"], LEAST_STARTUP_S)
    try:
        for number, cell in enumerate(drill.planned, 1):
            folder = work / cell.name.replace(":", "-")
            row = run(cell, data, folder, references[cell.variant], drill, startup_s)
            drill.rows.append(row)
            page.write(drill, options.json, options.page)
            print(
                f"{number:>3} of {len(drill.planned)}  {row.name:<24} {row.seconds:5.1f} s  {row.verdict}", flush=True
            )
            for problem in row.problems[1:]:
                print(f"{'':<39}and {problem}", flush=True)
            if row.problems:
                print(f"{'':<39}{row.folder}", flush=True)
            elif not options.keep:
                shutil.rmtree(folder)
    except KeyboardInterrupt:
        print(f"\n{page.outcome(drill)}\n{options.json}\n{options.page}", flush=True)
        raise


def variants(drill: Drill) -> list[Variant]:
    """Of the uninterrupted runs that the cells are held against."""
    return list(dict.fromkeys([WHOLE, *(cell.variant for cell in drill.planned)]))


def reference(variant: Variant, data: Path, work: Path, drill: Drill) -> Run:
    what = "uninterrupted run"
    if variant.passes_over is not None:
        what += f" that never saw sequences {variant.passes_over[0]} to {variant.passes_over[1] - 1}"
    print(f"{what} ...", end="", flush=True)
    found = runs.uninterrupted(variant, data, work / f"uninterrupted-{len(drill.uninterrupted_s) + 1}")
    drill.uninterrupted_s.append(found.seconds)
    print(f" {found.seconds:.1f} s", flush=True)
    return found


def run(cell: Cell, data: Path, folder: Path, expected: Run, drill: Drill, startup_s: float) -> Row:
    """One cell, run and judged."""
    begin = time.monotonic()
    try:
        found = runs.run_cell(cell, data, folder, startup_s=startup_s)
        problems = check.problems(cell, found, expected)
        account, steps_again = found.account(), found.steps_again()
    except Exception as error:  # a run that left something else than a run does: that cell has failed, and no other
        seconds = time.monotonic() - begin
        problems = [f"{type(error).__name__}: {error}"]
        return Row(cell.kind, cell.phase.name, seconds, seconds, 0, 0, 0, None, cell.hangs, 0, problems, str(folder))
    return Row(
        kind=cell.kind,
        phase=cell.phase.name,
        seconds=round(found.seconds, 2),
        lost_s=round(found.seconds - min(drill.uninterrupted_s), 2),
        start_up_s=round(account.parts["start_up"] - expected.account().parts["start_up"], 2),
        replay_s=round(account.parts["replay"], 2),
        steps_again=steps_again,
        ended_s=found.launches[0].ended_s if cell.ends_all_ranks else None,
        hangs=cell.hangs,
        launches=len(found.launches),
        problems=problems,
        folder=str(folder),
    )


def remove(work: Path, *, but: Sequence[str]) -> None:
    """All of it, or all but these folders."""
    for made in list(work.iterdir()):
        if str(made) not in but:
            shutil.rmtree(made, ignore_errors=True)
    if not but:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a small disk would stay mounted
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell script that starts us with & has it ignored
    sys.exit(main())
