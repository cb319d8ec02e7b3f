"""The runs of a sweep (``--multirun``): a folder each in the sweep's, and the table that says which is which.

    RUN.DIR/LABEL/           one run; its name is RUN.NAME-LABEL, and LABEL comes from what it sweeps (config/sweep.py)
    RUN.DIR/.array/          of a job array: script, output of all ranks, and the code, which RUN.DIR/LABEL/code names

A sweep that is launched again goes on with the runs that have steps left and no job in the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigtrain.config.check import Problem
from bigtrain.config.errors import UserError
from bigtrain.config.frozen import FILE
from bigtrain.config.schema import Config
from bigtrain.config.sweep import Point
from bigtrain.launching import init_from
from bigtrain.launching.code_copy import CODE, copy_code, link_code, same_code
from bigtrain.launching.outcome import already_finished, damage, short
from bigtrain.launching.slurm import QueuedJob
from bigtrain.launching.slurm_script import Batch

ARRAY = ".array"


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    config: Config
    """Resolved, with the run's own name and folder."""
    swept: tuple[str, ...]
    """What tells it from the others, as on the command line."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Sweep:
    """What --multirun asks for."""

    name: str
    folder: Path
    runs: list[SweptRun]

    @staticmethod
    def of(points: Sequence[Point], compose: Callable[[Sequence[str]], Config]) -> Sweep:
        """`compose`: the resolved config of a command line. Raises UserError where run.dir is not the same for all."""
        configs = [compose(point.overrides) for point in points]
        runs = {(config.run.name, config.run.dir) for config in configs}
        if len(runs) > 1:
            raise UserError(
                "run.name and run.dir are the sweep's, the same for all its runs; each run's follow from them."
            )
        name, folder = next(iter(runs))
        return Sweep(name, Path(folder), [_placed(*pair) for pair in zip(configs, points, strict=True)])

    @property
    def first(self) -> Config:
        """What is the same for all runs, this one has, too."""
        return self.runs[0].config

    @property
    def batch(self) -> Batch:
        run_dirs = tuple(run.config.run.dir for run in self.runs)
        return Batch(self.first, self.name, self.folder, self.folder / ARRAY, run_dirs)


def _placed(config: Config, point: Point) -> SweptRun:
    run = config.run
    own = replace(run, name=f"{run.name}-{point.label}", dir=str(Path(run.dir) / point.label))
    return SweptRun(init_from.settled(replace(config, run=own)), point.swept)


def problems(sweep: Sweep) -> Iterator[Problem]:
    """What is wrong with the sweep as a whole."""
    if (sweep.folder / FILE).exists():
        message = "holds a run, and a sweep has a folder of its own"
        yield Problem("run.dir", sweep.folder, message, "Set run.name to another name")
    clusters = [run.config.cluster for run in sweep.runs]
    if any(cluster.kind == "slurm" for cluster in clusters) and any(cluster != clusters[0] for cluster in clusters):
        message = "the tasks of a job array are alike, and cluster.* differs between the runs"
        yield Problem("cluster.kind", "slurm", message, "Launch runs on other nodes as another sweep")


def open_runs(sweep: Sweep, queue: Sequence[QueuedJob]) -> tuple[Sweep, list[str]]:
    """The sweep without the runs that have nothing left to do or a job in the queue, a line about each of those,
    and a warning where the newest checkpoint of one that is finished or goes on is not what was saved."""
    left: list[SweptRun] = []
    told: list[str] = []
    for run in sweep.runs:
        job = next((job for job in queue if job.trains_in(run.run_dir)), None)
        if job is not None:
            told.append(f"{short(run.run_dir)}: job {job.name} ({job.state}) is in the queue")
        elif already_finished(run.config, ()):
            told += [f"{short(run.run_dir)}: already finished", *damage(run.run_dir)]
        else:
            left.append(run)
            told += damage(run.run_dir)
    return replace(sweep, runs=left), told


def with_data_of_their_own(sweep: Sweep) -> list[Config]:
    """One config for each data of the sweep: what serves many of its runs is prepared and opened once."""
    found: list[tuple[object, Config]] = []
    for config in (run.config for run in sweep.runs):
        what = (config.data, config.tokenizer, config.model.vocab_size, config.train.sequence_length)
        if all(what != other for other, _ in found):
            found.append((what, config))
    return [config for _, config in found]


def copy_code_of_array(sweep: Sweep, queue: Sequence[QueuedJob]) -> None:
    """One copy for all runs of the sweep. Raises UserError where a job in the queue would get other code by that."""
    code = sweep.folder / ARRAY / CODE
    job = next((job for job in queue if job.is_in(sweep.folder)), None)
    if job is not None and not same_code(code):
        raise UserError(
            f"run.dir={sweep.folder}: job {job.name} ({job.state}) of this sweep is in Slurm's queue, and the code has "
            "changed since: it would run the new one. Wait for it, end it with scancel, or set another run.name."
        )
    code.parent.mkdir(parents=True, exist_ok=True)
    copy_code(code)
    for run in sweep.runs:
        link_code(run.run_dir / CODE, code)


def table(sweep: Sweep, jobs: Sequence[str] = ()) -> str:
    """A line a run: its task of the array or its place in the order, its folder, what tells it from the others."""
    head = ("job" if jobs else "run", "run folder", "settings")
    rows: list[tuple[str, str, str]] = [head]
    for place, run in enumerate(sweep.runs):
        rows.append((jobs[place] if jobs else str(place), short(run.run_dir), " ".join(run.swept)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{job:<{widths[0]}}  {folder:<{widths[1]}}  {settings}" for job, folder, settings in rows)


def submitted(sweep: Sweep, jobs: Sequence[str]) -> str:
    """What to tell the user of a sweep whose runs are in the queue."""
    cluster, array = sweep.first.cluster, jobs[0].partition("_")[0]
    first = sweep.runs[0].run_dir / "logs" / "slurm" / f"{jobs[0]}_0_log"
    what = f"job array {array}: {len(jobs)} runs" if len(jobs) > 1 else f"job {array}: one run"
    return (
        f"submitted {what}, each {cluster.num_nodes} nodes x {cluster.procs_per_node} ranks\n\n{table(sweep, jobs)}\n\n"
        f"follow it   squeue --array -j {array}; tail -F {short(first)}.out\n"
        f"stop it     scancel {array}, or one run: scancel {jobs[0]}; the same command later goes on"
    )
