"""A run as one Slurm job, a sweep as one job array: what Slurm is asked before, the submission, and the job's marks.

slurm_script.py has the script. It finds where the ranks meet (meeting.py), starts them with srun (task.py), and at
their end tells why and queues the job again where the run is to go on (job_end.py): Slurm warns every rank with SIGUSR2
ahead of the time limit and they save, or a rank failed. After a preemption or the loss of a node Slurm itself queues
the job again. The next start runs the same command, and checkpoint.resume=auto goes on from the last checkpoint.
launchers/slurm.sbatch does the same without us.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.check import Problem
from bigtrain.config.cluster_rules import time_limit_minutes
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.launching.meeting import fields_of
from bigtrain.launching.slurm_script import (
    Batch,
    RankTask,
    job_parameters,
    python_of_ranks,
    sbatch_script,
    slurm_folder,
)

SUBMISSION = "_submission.sh"
"""Behind a job's number: submitit's script of a job that sbatch took. Of one that it refused, the name is another."""


def require(batch: Batch) -> None:
    """Raises UserError where this job cannot be submitted from here, as far as Slurm says so before it is submitted."""
    for program in ("sbatch", "srun", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(
                f"cluster.kind=slurm: there is no {program} on this machine. Run it on a login node of the cluster, "
                "look at the script with dry_run=true, or leave +cluster=slurm out to run here."
            )
    problems = partition_problems(batch.config, _ask(["scontrol", "--oneliner", "show", "partition"]))
    if problems:
        raise UserError("\nerror: ".join(map(str, problems)))
    _try_out(batch)


def _try_out(batch: Batch) -> None:
    """Raises UserError where sbatch says that a value is invalid: account, qos, reservation, feature, node, resource.

    What else --test-only says counts for nothing: it also refuses a job that would wait for a node under repair."""
    command = ["sbatch", "--test-only"]
    try:
        done = subprocess.run(command, input=sbatch_script(batch), capture_output=True, text=True, timeout=90)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cluster.kind=slurm: `{shlex.join(command)}` failed: {error}") from error
    if done.returncode and "invalid" in done.stderr.lower():
        raise UserError(_refused(done.stderr))


def _refused(said: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines() if line.strip()]
    return f"sbatch refuses the job: {'; '.join(lines)}. dry_run=true shows what it is asked for."


def partition_problems(config: Config, shown: str) -> list[Problem]:
    """What is wrong with the job for its partitions. sbatch takes a job that is too large for them: it waits for ever.

    `shown`: what ``scontrol --oneliner show partition`` says, of those that this user may see."""
    known: dict[str, dict[str, str]] = {}
    for line in filter(None, shown.splitlines()):
        fields = fields_of(line)
        known[fields["PartitionName"]] = fields
    cluster = config.cluster
    default = [name for name, fields in known.items() if fields.get("Default") == "YES"]
    names = [name for name in cluster.partition.split(",") if name] if cluster.partition else default
    unknown = [name for name in names if name not in known]
    if unknown:
        fix = f"Choose of {', '.join(known)}"
        return [Problem("cluster.partition", ",".join(unknown), "Slurm has no such partition", fix)]
    problems: list[Problem] = []
    nodes = [int(known[name].get("TotalNodes", cluster.num_nodes)) for name in names]
    if nodes and max(nodes) < cluster.num_nodes:
        message = f"partition {','.join(names)} has {max(nodes)} nodes"
        problems.append(Problem("cluster.num_nodes", cluster.num_nodes, message, "Ask for fewer, or choose another"))
    limits = [time_limit_minutes(known[name].get("MaxTime", "")) for name in names]
    wanted, longest = time_limit_minutes(cluster.time), max((limit for limit in limits if limit), default=0)
    if None not in limits and cluster.qos is None and wanted and 0 < longest < wanted:
        message = f"partition {','.join(names)} gives {longest} minutes at most"
        problems.append(Problem("cluster.time", cluster.time, message, "Ask for less; the job is queued again then"))
    return problems


@dataclass(frozen=True)
class QueuedJob:
    """A job of this user, pending or running; of an array, one task of it."""

    name: str
    """Its number; of an array's task ARRAY_TASK."""
    state: str
    paths: tuple[Path, ...]
    """Words of its command, as paths."""

    def is_in(self, folder: Path) -> bool:
        """Whether it names something in a folder: submitit's script, or the argument of another."""
        return any(path.is_relative_to(folder) for path in self.paths)

    def trains_in(self, run_dir: Path) -> bool:
        """By its own script, or by the link to it that a task of an array leaves (`link`). The number alone would not
        do: a cluster that is set up anew gives it again."""
        if self.is_in(run_dir):
            return True
        link = slurm_folder(run_dir) / (self.name + SUBMISSION)
        return link.is_symlink() and self.is_in(Path(os.path.normpath(link.parent / os.readlink(link))).parent)


def queue(config: Config) -> list[QueuedJob]:
    """The jobs of this user, but for the one that this process runs in. Needs no Slurm: without it there is none.

    Raises UserError where a Slurm job is to be submitted and Slurm does not answer."""
    if shutil.which("squeue") is None:
        return []
    try:
        jobs = _ask(["squeue", "--me", "--array", "--noheader", "--format=%A|%i|%T|%Z|%o"])
    except UserError:
        if config.cluster.kind == "slurm":
            raise
        return []
    found: list[QueuedJob] = []
    for line in jobs.splitlines():
        number, name, state, cwd, command = line.split("|", 4)
        if number != os.environ.get("SLURM_JOB_ID"):
            paths = (Path(os.path.normpath(Path(cwd, word))) for word in command.split())
            found.append(QueuedJob(name, state, tuple(paths)))
    return found


def refuse_live_job(config: Config) -> None:
    """Raises UserError where a job in the queue is to train in the run's folder: it reads config and code there, and
    two of them would write the same files."""
    run_dir = Path(config.run.dir)
    for job in queue(config) if run_dir.is_dir() else ():
        if job.trains_in(run_dir):
            raise UserError(
                f"run.dir={run_dir}: job {job.name} ({job.state}) of this run is in Slurm's queue. Wait for it, end it "
                f"with scancel {job.name}, or set another run.name."
            )


def _ask(command: list[str]) -> str:
    """What a command of Slurm answers. Raises UserError where it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise UserError(f"cluster.kind=slurm: `{shlex.join(command)}` failed: {said}") from error


def submit(batch: Batch) -> list[str]:
    """Submit the runs, whose folders are ready; returns the name of each one's job.

    Raises UserError where sbatch refuses it."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=batch.folder, python=python_of_ranks(batch.config.cluster))
    executor.update_parameters(**job_parameters(batch))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit passes on what sbatch says; the error says it, too
            jobs = executor.submit_array([RankTask(run_dir) for run_dir in batch.run_dirs])
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(_refused(str(error))) from error
    for run_dir, job in zip(batch.run_dirs, jobs, strict=True):
        link(batch, Path(run_dir), job.job_id)
    return [job.job_id for job in jobs]


def link(batch: Batch, run_dir: Path, job: str) -> None:
    """Of an array, the files lie with the sweep: the run has links to its script and to what rank 0 says. The job is in
    the queue by now: nothing may keep its number from the user. A cluster that is set up anew gives a number again."""
    own = slurm_folder(run_dir)
    if own == batch.folder:
        return
    script = batch.folder / f"{job.partition('_')[0]}{SUBMISSION}"
    outputs = [batch.folder / f"{job}_0_log.{end}" for end in ("out", "err")]
    for target, name in ((script, job + SUBMISSION), *((path, path.name) for path in outputs)):
        with contextlib.suppress(OSError):
            own.mkdir(parents=True, exist_ok=True)
            (own / name).unlink(missing_ok=True)
            (own / name).symlink_to(os.path.relpath(target, own))


def told(config: Config, job: str) -> str:
    """What to tell the user of a submitted run: the job, its folder, how to follow it."""
    log = slurm_folder(Path(config.run.dir)) / f"{job}_0_log"
    return (
        f"submitted job {job}: {config.cluster.num_nodes} nodes x {config.cluster.procs_per_node} ranks\n"
        f"run folder  {config.run.dir}\n"
        f"follow it   squeue -j {job}; tail -F {log}.out {log}.err\n"
        f"stop it     scancel {job}; the same command later goes on from the last checkpoint"
    )
