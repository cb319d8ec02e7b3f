"""What must be true of a run that a fault has met, held against one that was never interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.compare import compare
from bigtrain.checkpoint.verify import verify
from bigtrain.config.errors import UserError
from bigtrain.config.frozen import load
from bigtrain.data import passed_over
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics
from tools.batches import audited
from tools.faults.matrix import SAVING, STEPS, Cell, is_said
from tools.faults.runs import GONE_S, Run

ENDS_S = 30.0
"""From a fault, or from when a hang is seen, to the end of all ranks."""
NUMBERS = ("loss", "grad_norm", "lr")
EVALUATION = ("loss", "perplexity", "bits_per_byte")
OF_THE_CELL = ("config.run.", "config.watchdog.")
"""Entries of state.json in which a cell and its reference differ."""
OF_A_SKIP = ("step", "config.train.num_steps")


def problems(cell: Cell, run: Run, reference: Run) -> list[str]:
    """All that is wrong, in a line each; empty where the cell has passed."""
    if run.struck() is None:
        return ["the fault never struck"]
    found = list(_launches(cell, run))
    if run.launches[-1].status:
        last = next((line for line in reversed(run.launches[-1].console) if line.strip()), "it said nothing")
        return [*found, f"the run did not end well: status {run.launches[-1].status}: {last}"]
    for part in (_cause(cell, run), _committed(run), _data(cell, run)):
        found += part
    return [*found, *differences(run, reference, skipped=cell.variant.skips)]


def _launches(cell: Cell, run: Run) -> Iterator[str]:
    """How it ended, and that nothing was left of it."""
    statuses = tuple(launch.status for launch in run.launches)
    if statuses not in cell.statuses:
        yield f"exit statuses {statuses}, wanted {' or '.join(map(str, cell.statuses))}"
    for number, launch in enumerate(run.launches, 1):
        if launch.orphans:
            yield f"launch {number} left processes behind for over {GONE_S:.0f} s: {'; '.join(launch.orphans)}"
    if not cell.ends_all_ranks:
        return
    (hang,) = run.events("hang")[:1] or [{"limit_s": 0.0}]
    ended_s, limit_s = run.launches[0].ended_s, ENDS_S + hang["limit_s"]
    if ended_s is None or ended_s > limit_s:
        yield f"the ranks ended {ended_s or float('inf'):.1f} s after the fault, more than {limit_s:.0f} s"


def _cause(cell: Cell, run: Run) -> Iterator[str]:
    """What is said of it, on the console and in metrics.jsonl."""
    lines = [line for line in run.launches[0].console if line.strip()]
    if cell.outcome == "restart":
        restarts = [at for at, line in enumerate(lines[:-1]) if line.endswith("restart 1 of 1")]
        if not restarts or not is_said(cell, lines[restarts[0] + 1]):
            yield f"the console has no line /{cell.says}/ behind `restart 1 of 1`"
    elif cell.outcome == "again" and cell.says:
        if not is_said(cell, lines[-1]):
            yield f"the last line is no /{cell.says}/: {lines[-1]}"
    elif cell.outcome == "save fails":
        failed = run.events("checkpoint_failed")
        if [each["step"] for each in failed] != [SAVING] or not is_said(cell, failed[0]["reason"]):
            yield f"no event checkpoint_failed says /{cell.says}/: {failed}"
    elif cell.says and not any(is_said(cell, line) for line in lines):
        yield f"the console has no line /{cell.says}/"
    if cell.outcome in ("restart", "again") and cell.rank is not None:
        named = run.events("hang" if cell.hangs else "crash")
        wanted = f"rank {cell.rank}"
        if len(named) != 1 or not named[0].get("verdict", named[0].get("cause", "")).startswith(wanted):
            yield f"no event names {wanted}: {named}"


def _committed(run: Run) -> Iterator[str]:
    """No committed step was lost: it is there, or superseded by newer ones, and the run went on from the newest."""
    struck, starts = run.struck(), run.starts()
    assert struck is not None
    there = set(struck["committed"])
    for start in starts[1:]:
        now, both = set(start["committed"]), there | set(start["committed"])
        keep = folders.Keep(newest=load(run.run_dir).checkpoint.keep)
        gone = there - now - folders.superseded([(step, None) for step in both], keep)
        if gone:
            yield f"the checkpoint of step {max(gone)} was committed and is gone; there are {sorted(now)}"
        there = now
    went_on = [each["step"] for each in run.events("resume")]
    newest = [max(start["committed"]) for start in starts[1:] if start["committed"]]
    if went_on != newest:
        yield f"it went on from {went_on}, and the newest committed ones were {newest}"
    root = run.run_dir / "checkpoints"
    committed = folders.committed(root)
    if not committed or folders.resolve(root / "latest") != committed[-1] or list(root.glob(".*")):
        yield f"checkpoints/ has {sorted(each.name for each in root.iterdir())} at the end"
    for each in committed:
        yield from (f"{each.name}: {problem}" for problem in verify(each, files_only=True).problems)


def _data(cell: Cell, run: Run) -> Iterator[str]:
    """No sequence was repeated or skipped, but those that the cell passes over."""
    try:
        found = audited(run.run_dir)
    except UserError as error:
        yield f"the ledger cannot be audited: {error}"
        return
    yield from (f"audit: {problem}" for problem in found.problems)
    if found.steps != STEPS:
        yield f"audit: {found.steps} steps stand in the ledger, not {STEPS}"
    windows = [(each.first, each.end) for each in passed_over.read(run.run_dir)]
    wanted = [cell.variant.passes_over] if cell.outcome == "rewind" else []
    if windows != wanted:
        yield f"it passed over {windows}, not {wanted}"
    skipped = [each["step"] for each in run.events("skipped")]
    if skipped != ([cell.variant.skips] if cell.variant.skips is not None else []):
        yield f"it skipped the steps {skipped}"


def differences(run: Run, reference: Run, skipped: int | None = None) -> Iterator[str]:
    """Each step once, and what came out of it the same to the last bit; so is the state at the end. `skipped`: the step
    of the run that changed nothing, which the reference does not have."""
    yield from _first_difference("train", NUMBERS, run, reference, skipped)
    yield from _first_difference("eval", EVALUATION, run, reference, skipped)
    ours, theirs = (folders.newest(each.run_dir / "checkpoints") for each in (run, reference))
    assert ours is not None and theirs is not None
    found = compare(ours, theirs)
    if found.tensors:
        yield f"{len(found.tensors)} tensors at the end are not the reference's, {found.tensors[0].name} first"
    allowed = OF_THE_CELL + (OF_A_SKIP if skipped is not None else ())
    for name, one, other in found.state:
        if not name.startswith(allowed):
            yield f"state.json at the end: {name} is {one}, not {other}"


def _first_difference(kind: str, keys: Sequence[str], run: Run, reference: Run, skipped: int | None) -> Iterator[str]:
    """Of the records of a kind; those behind a skipped step are held against the step before."""
    records, expected = ([each for each in _records(of) if each["kind"] == kind] for of in (run, reference))
    steps = [each["step"] for each in records]
    if steps != sorted(set(steps)):
        yield f"metrics.jsonl has the {kind} records of steps {steps}"
        return
    found = {each["step"]: each for each in records}
    if skipped is not None:
        found = {step - (step > skipped): each for step, each in found.items() if step != skipped}
    wanted = {each["step"]: each for each in expected}
    in_both = found.keys() & wanted.keys()
    if found.keys() != wanted.keys() and not (kind == "eval" and skipped is not None and in_both):
        yield f"metrics.jsonl has {kind} records of steps {sorted(found)}, not {sorted(wanted)}"
    for step in sorted(in_both):
        for key in keys:
            if found[step][key] != wanted[step][key]:
                yield f"step {step}: {kind} {key} is {found[step][key]!r}, not {wanted[step][key]!r}"
                return


def _records(run: Run) -> list[dict[str, Any]]:
    return read_metrics(run.run_dir / METRICS_FILE)
