"""Runs of the drill: started as bigtrain.launch starts them, watched from outside, and started again where a cluster
would. Two ranks on CPUs, a small model, the text of Python's own library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from bigtrain.config import frozen
from bigtrain.config.schema import AnomalyConfig, CheckpointConfig, Config, EvalConfig, ParallelConfig, ScheduleConfig
from bigtrain.data import passed_over
from bigtrain.launching.local import die_with_parent
from bigtrain.telemetry import failures
from bigtrain.telemetry.goodput import Account, account, attempts_in
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics
from bigtrain.trainer.hang import state_of
from tests.integration.runs import config_of
from tools.faults.matrix import BATCH, EVALUATED, MAX_SKIPS, SAVED, STEPS, Cell, Variant
from tools.faults.rank import STARTS, STRUCK

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
POLL_S = 0.02
DEADLINE_S = 300.0
"""Of one launch."""
GONE_S = 2.0
"""So long may what a launcher started outlive it."""
DISK = "32m"
LIMIT_S = 4.0
"""Of the watchdog, for data, step, evaluation and save, where a cell hangs."""
MARK = "BIGTRAIN_DRILL"
"""Variable that all processes of a run have, with its folder."""


@dataclass
class Launch:
    """One start of a run, ended."""

    status: int
    """As subprocess has it: minus n for signal n."""
    console: list[str]
    seconds: float
    ended_s: float | None
    """From the fault to the end of all ranks that were there; None where it did not strike in this launch, or ranks
    went on until the run ended."""
    orphans: list[str]
    """Processes that outlived it."""


@dataclass
class Run:
    """A run, from its first start until it ended well, or was given up."""

    run_dir: Path
    notes: Path
    """Of the ranks and of the drill; not on the run's disk."""
    launches: list[Launch] = field(default_factory=list[Launch])

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)

    @property
    def console(self) -> list[str]:
        return [line for launch in self.launches for line in launch.console]

    def struck(self) -> dict[str, Any] | None:
        """When the fault struck, and what was committed then."""
        path = self.notes / STRUCK
        return json.loads(path.read_text()) if path.exists() else None

    def starts(self) -> list[dict[str, Any]]:
        """When rank 0 began, and what was committed then."""
        return [json.loads(line) for line in (self.notes / STARTS).read_text().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [each for each in read_metrics(self.run_dir / METRICS_FILE) if each.get("name") == name]

    def account(self) -> Account:
        return account(attempts_in(read_metrics(self.run_dir / METRICS_FILE)))

    def steps_again(self) -> int:
        """That were computed more than once, because of where the run went back to."""
        records = read_metrics(self.run_dir / METRICS_FILE)
        back = [each["step"] for each in records if each.get("name") in ("resume", "restart", "rewind")]
        return max(attempts_in(records)[-1].replay_to - back[-1], 0) if back else 0


def config_for(run_dir: Path, data: Path, variant: Variant, *, num_steps: int, startup_s: float = 0.0) -> Config:
    """`startup_s`: of the watchdog, which then has the short limits of a drill; 0: those of a real run."""
    base = config_of(run_dir, data)
    dropout = 0.1 if variant.skips is None else 0.0
    config = replace(
        base,
        model=replace(base.model, hidden_dropout=dropout, attention_dropout=dropout),
        parallel=ParallelConfig(zero_stage=1),
        schedule=ScheduleConfig(warmup_steps=2)
        if variant.skips is None
        else ScheduleConfig("constant", warmup_steps=0),
        train=replace(base.train, num_steps=num_steps, global_batch_size=BATCH),
        eval=EvalConfig(interval=EVALUATED // 2, num_batches=2),
        checkpoint=CheckpointConfig(interval=SAVED, keep=2),
        anomaly=AnomalyConfig(spike=variant.spike, window=4, max_skips=MAX_SKIPS),
        cluster=replace(base.cluster, procs_per_node=RANKS, max_restarts=1),
    )
    if not startup_s:
        return config
    short = dict.fromkeys(("data_s", "step_s", "eval_s", "save_s"), LIMIT_S)
    return replace(config, watchdog=replace(config.watchdog, startup_s=startup_s, **short))


def uninterrupted(variant: Variant, data: Path, folder: Path) -> Run:
    """The run that cells are held against. Its windows are passed over from the start: it never saw those data."""
    run = Run(folder / "run", folder)
    config = config_for(run.run_dir, data, variant, num_steps=variant.num_steps)
    frozen.save(config, run.run_dir)
    if variant.passes_over is not None:
        first, end = variant.passes_over
        passed_over.add(run.run_dir, passed_over.Window(first, end, 0, 0, "the uninterrupted run"))
    run.launches.append(launch(run))
    if run.launches[-1].status:
        raise RuntimeError("the uninterrupted run failed:\n" + "\n".join(run.launches[-1].console[-20:]))
    return run


def run_cell(cell: Cell, data: Path, folder: Path, *, startup_s: float) -> Run:
    """Start the cell's run, and again as long as it fails and its outcome knows more launches. The folder has all of it
    at the end. `startup_s`: of the watchdog, where the cell hangs."""
    folder.mkdir(parents=True)
    with small_disk(folder / "disk") if cell.on_small_disk else plain(folder) as place:
        run = Run(place / "run", folder)
        limit_s = startup_s if cell.hangs else 0.0
        frozen.save(config_for(run.run_dir, data, cell.variant, num_steps=STEPS, startup_s=limit_s), run.run_dir)
        fault = replace(cell.fault, notes=str(folder))
        for _ in range(max(map(len, cell.statuses))):
            run.launches.append(launch(run, fault.environment()))
            if run.launches[-1].status == 0:
                break
            (place / "filler").unlink(missing_ok=True)  # someone makes room
        if cell.on_small_disk:
            shutil.copytree(run.run_dir, folder / "run", symlinks=True, ignore=shutil.ignore_patterns("pipe"))
            run.run_dir = folder / "run"
    return run


@contextmanager
def plain(folder: Path) -> Iterator[Path]:
    yield folder


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own at `place`. Raises CalledProcessError where it may not be mounted."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def can_mount(folder: Path) -> bool:
    try:
        with small_disk(folder / "disk"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        shutil.rmtree(folder / "disk", ignore_errors=True)


def launch(run: Run, environment: dict[str, str] | None = None) -> Launch:
    """Start the run's command once, and wait until all is over."""
    console = run.notes / f"console-{len(run.launches) + 1}.txt"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, MARK: str(run.notes)}
    had_struck = run.struck()
    begin = time.time()
    with console.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.faults.launcher", str(run.run_dir)],
            cwd=run.notes,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ours, **(environment or {})},
            preexec_fn=die_with_parent(),
        )
    try:
        ended_s = _watch(process, run, begin, has_struck=had_struck is not None)
        seconds = time.time() - begin
        orphans = _orphans(str(run.notes))
    finally:
        process.kill()
        process.wait()
    lines = console.read_text(encoding="utf-8", errors="replace").splitlines()
    return Launch(process.returncode, lines, seconds, ended_s, orphans)


def _watch(process: subprocess.Popen[bytes], run: Run, begin: float, *, has_struck: bool) -> float | None:
    """Wait for the launcher, and, from the fault on, for the ranks that were there. Returns the seconds from the fault
    to the end of the last of them."""
    pids: list[int] | None = [] if has_struck else None
    ended_s, struck = None, None
    while process.poll() is None and time.time() - begin < DEADLINE_S:
        if pids is None and (struck := run.struck()) is not None:
            pids = _ranks_before(run.run_dir, struck["time"])
        if struck and pids and ended_s is None and all(state_of(pid) == "Z" for pid in pids):
            ended_s = time.time() - struck["time"]
        time.sleep(POLL_S)
    if process.poll() is None:
        return None
    struck = struck or (None if has_struck else run.struck())
    pids = pids or (_ranks_before(run.run_dir, struck["time"]) if struck else [])
    while struck and ended_s is None and time.time() - begin < DEADLINE_S:
        if all(state_of(pid) == "Z" for pid in pids):
            ended_s = time.time() - struck["time"]
        time.sleep(POLL_S)
    return ended_s


def _ranks_before(run_dir: Path, moment: float) -> list[int]:
    """Processes of the ranks that had begun by then, as they say themselves."""
    found = [json.loads(path.read_text()) for path in failures.place_file(run_dir, 0).parent.glob("rank-*.json")]
    return [place["pid"] for place in found if place["time"] <= moment]


def _orphans(mark: str) -> list[str]:
    """Processes that carry the mark; those that end by themselves have GONE_S for it."""
    deadline = time.monotonic() + GONE_S
    while (found := list(_marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _marked(mark: str) -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield f"{process.pid} {' '.join(process.cmdline()[:4])}"
        except psutil.Error:
            continue
