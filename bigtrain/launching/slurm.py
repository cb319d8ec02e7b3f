"""A run as one Slurm job: submitit writes the sbatch script and starts one task a rank.

A requeued job (node failure, preemption, the time limit with cluster.requeue) runs the same command again, and
checkpoint.resume=auto goes on from the last committed checkpoint.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config.check import time_limit_minutes
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.launching.environment import Place, rank_environment
from bigtrain.launching.local import die_with_parent


@dataclass(frozen=True)
class RankTask:
    """What each task of the job does: one rank. submitit pickles it for the nodes."""

    run_dir: str
    device: str
    requeue: bool

    def __call__(self) -> None:
        """Run `bigtrain.train` to its end; raises SystemExit with its status where that is not 0."""
        import submitit

        job = submitit.JobEnvironment()
        place = Place(
            rank=job.global_rank,
            local_rank=job.local_rank,
            world=job.num_tasks,
            local_world=job.num_tasks // job.num_nodes,
            address=job.hostnames[0],
            port=rendezvous_port(job.job_id),
        )
        if not self.requeue:  # submitit would end the task at Slurm's warning, 90 s before the limit
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        status = subprocess.call(
            [sys.executable, "-m", "bigtrain.train", self.run_dir],
            env={**os.environ, **rank_environment(place, self.device)},
            preexec_fn=_rank_starts(),
        )
        if status:
            raise SystemExit(status)

    def checkpoint(self) -> Any:
        """submitit calls it before the time limit and on preemption: the job comes back as it was, or not at all."""
        import submitit

        return submitit.helpers.DelayedSubmission(self) if self.requeue else None


def _rank_starts() -> Callable[[], None]:
    """The rank dies with its task, and not of Slurm's warning, which goes to every process of the step."""
    with_parent = die_with_parent()

    def in_child() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if with_parent is not None:
            with_parent()

    return in_child


def rendezvous_port(job_id: str) -> int:
    """The same port on every node, another for each job, below the kernel's range for outgoing connections."""
    digits = "".join(character for character in job_id if character.isdigit())
    return 12000 + int(digits or 0) % 20000


def job_parameters(config: Config) -> dict[str, Any]:
    """The job as submitit's SlurmExecutor takes it."""
    cluster = config.cluster
    more: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True, **cluster.sbatch}
    parameters: dict[str, Any] = {
        "job_name": config.run.name,
        "nodes": cluster.num_nodes,
        "ntasks_per_node": cluster.procs_per_node,
        "cpus_per_task": cluster.cpus_per_proc,
        "gpus_per_node": cluster.procs_per_node if cluster.device == "cuda" else None,
        "time": time_limit_minutes(cluster.time),
        "partition": cluster.partition,
        "account": cluster.account,
        "setup": list(cluster.setup) or None,
        # one rank that fails ends the others; srun does not inherit the cpus of sbatch
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_proc}"],
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


def require() -> None:
    """Raises UserError where jobs cannot be submitted from here."""
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"cluster.kind=slurm: there is no {program} on this machine. Run it on a login node of the cluster, "
                "look at the script with dry_run=true, or leave +cluster=slurm out to run here."
            )


def submit(config: Config) -> str:
    """Submit the run whose folder is frozen; returns what to tell the user: the job, its folder, how to follow it.

    Raises UserError where sbatch refuses the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=job_folder(config), python=_python(), max_num_timeout=1_000_000)
    executor.update_parameters(**job_parameters(config))
    try:
        job = executor.submit(RankTask(config.run.dir, config.cluster.device, config.cluster.requeue))
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
