"""A run as one Slurm job: submitit writes the sbatch script and starts one task a rank.

The script finds where the ranks meet (meeting.py), starts them with srun (task.py), and at their end tells why and
queues the job again where the run is to go on (job_end.py): Slurm warns every rank with SIGUSR2 ahead of the time limit
and they save, or a rank failed. After a preemption or the loss of a node Slurm itself queues the job again. The next
start runs the same command, and checkpoint.resume=auto goes on from the last committed checkpoint.
launchers/slurm.sbatch does the same without us.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bigtrain.config.check import Problem, time_limit_minutes
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.launching.meeting import fields_of

MEET = (
    'meeting=$("$python" -m bigtrain.launching.meeting) || exit',
    "export MASTER_ADDR=${meeting% *} MASTER_PORT=${meeting#* }",
)
"""Shell lines before srun, on the first node. launchers/slurm.sbatch has the same."""
JOB_END = ('"$python" -m bigtrain.launching.job_end "$run" $?',)
"""And behind it."""


@dataclass(frozen=True)
class RankTask:
    """What each task of the job does: it becomes one rank. submitit pickles it for the nodes."""

    run_dir: str

    def __call__(self) -> NoReturn:
        """Our task takes the place of submitit's process, whose handlers would requeue before the ranks have saved,
        and hide SIGTERM from them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # it waits until the task listens
        os.execv(sys.executable, [sys.executable, "-m", "bigtrain.launching.task", self.run_dir])


def job_parameters(config: Config) -> dict[str, Any]:
    """The job as submitit's SlurmExecutor takes it."""
    cluster = config.cluster
    flags: dict[str, Any] = {name: True if value.lower() == "true" else value for name, value in cluster.sbatch.items()}
    more: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True, **flags}
    parameters: dict[str, Any] = {
        "job_name": config.run.name,
        "nodes": cluster.num_nodes,
        "ntasks_per_node": cluster.procs_per_node,
        "cpus_per_task": cluster.cpus_per_proc,
        "gpus_per_node": cluster.procs_per_node if cluster.device == "cuda" else None,
        "time": time_limit_minutes(cluster.time),
        "signal_delay_s": cluster.signal_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "setup": [*cluster.setup, f"python={_python()}", f"run={shlex.quote(config.run.dir)}", *MEET],
        # One rank that fails ends the others. srun inherits neither the cpus of sbatch nor its open-mode, and no
        # variables where sbatch was told --export=NONE.
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={cluster.cpus_per_proc}",
            "--open-mode=append",
            "--export=ALL",
        ],
        "teardown": list(JOB_END),
        "additional_parameters": more,
    }
    set_ones = {name: value for name, value in parameters.items() if value is not None}
    return {**set_ones, "wckey": None}  # submitit's own default is a key that a cluster may refuse


def job_folder(config: Config) -> Path:
    """Where submitit keeps the script, the pickled task and each rank's output."""
    return Path(config.run.dir) / "logs" / "slurm"


def sbatch_script(config: Config) -> str:
    """The script that `submit` hands to sbatch, as submitit writes it. Touches no disk and needs no Slurm."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    writer = object.__new__(SlurmExecutor)  # its __init__ asks for srun, which a laptop lacks
    writer.folder, writer.python = job_folder(config), _python()
    return _make_sbatch_string(command=writer._submitit_command_str, folder=writer.folder, **job_parameters(config))


def require(config: Config) -> None:
    """Raises UserError where this job cannot be submitted from here, as far as Slurm says so before it is submitted.

    `sbatch --test-only` says less than it seems: it also refuses a job that would wait for a node under repair."""
    for program in ("sbatch", "srun", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(
                f"cluster.kind=slurm: there is no {program} on this machine. Run it on a login node of the cluster, "
                "look at the script with dry_run=true, or leave +cluster=slurm out to run here."
            )
    problems = partition_problems(config, _ask(["scontrol", "--oneliner", "show", "partition"]))
    if problems:
        raise UserError("\nerror: ".join(map(str, problems)))


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
    if None not in limits and "qos" not in cluster.sbatch and wanted and 0 < longest < wanted:
        message = f"partition {','.join(names)} gives {longest} minutes at most"
        problems.append(Problem("cluster.time", cluster.time, message, "Ask for less; the job is queued again then"))
    return problems


def refuse_live_job(config: Config) -> None:
    """Raises UserError where a job of this user, pending or running, is to train in the run's folder: it reads the
    config there, and two of them would write the same files. Needs no Slurm: without it there is no such job."""
    run_dir, own = Path(config.run.dir), os.environ.get("SLURM_JOB_ID")
    if not run_dir.is_dir() or shutil.which("squeue") is None:
        return
    try:
        jobs = _ask(["squeue", "--me", "--noheader", "--format=%A|%T|%Z|%o"])
    except UserError:
        if config.cluster.kind == "slurm":
            raise
        return
    for line in jobs.splitlines():
        job, state, cwd, command = line.split("|", 3)
        words = (Path(os.path.normpath(Path(cwd, word))) for word in command.split())
        if job != own and any(word.is_relative_to(run_dir) for word in words):
            raise UserError(
                f"run.dir={run_dir}: job {job} ({state}) of this run is in Slurm's queue. Wait for it, end it with "
                f"scancel {job}, or set another run.name."
            )


def _ask(command: list[str]) -> str:
    """What a command of Slurm answers. Raises UserError where it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise UserError(f"cluster.kind=slurm: `{shlex.join(command)}` failed: {said}") from error


def submit(config: Config) -> str:
    """Submit the run whose folder is frozen; returns what to tell the user: the job, its folder, how to follow it.

    Raises UserError where sbatch refuses the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=job_folder(config), python=_python())
    executor.update_parameters(**job_parameters(config))
    try:
        job = executor.submit(RankTask(config.run.dir))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {error}") from error
    log = job_folder(config) / f"{job.job_id}_0_log"
    return (
        f"submitted job {job.job_id}: {config.cluster.num_nodes} nodes x {config.cluster.procs_per_node} ranks\n"
        f"run folder  {config.run.dir}\n"
        f"follow it   squeue -j {job.job_id}; tail -F {log}.out {log}.err\n"
        f"stop it     scancel {job.job_id}; the same command later goes on from the last checkpoint"
    )


def _python() -> str:
    return shlex.quote(sys.executable)
